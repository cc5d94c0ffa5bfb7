"""A key-value cache of pages, and one token's attention over the pages of its row.

A pool of pages is shared by all rows of a replica; a table says which pages hold a row's positions. Page 0 belongs to
no row: rows without a response write there. Keys and values of a token lie side by side, k and v of head 0,
of head 1, and so on, so that a token is one contiguous write.

`xla` gathers the table's pages and is the reference, on every backend. `ragged` is jax's kernel for the TPU, `triton`
ours for the GPU (models/pages_gpu.py); both read the pages of a row's own context and no others. jax's kernel has one
scale for all int8 keys, not one per token: int8 pages on a TPU are gathered, which reads more than a dense cache does.
"""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from models import pages_gpu
from models.attention import attend
from models.config import DecoderConfig
from models.layout import quantise

PAGE = 64  # tokens of a page by default
BLOCK = 256  # tokens that the TPU's kernel reads at once; of a row's last block it reads all

log = logging.getLogger(__name__)


class Place(NamedTuple):
    """Where a step writes and what it sees. table: int32 [B, M]. positions: int32 [B], counted from the start of the
    table's first page. window: how many last tokens are seen, 0: all. implementation: see the module."""

    table: Any
    positions: Any
    window: int
    implementation: str


@flax.struct.dataclass
class Pages:
    """The cache as the decoder takes it (models.decoder.Cache is the other one); a step is one token per row.

    kv: one [P, page, 2K, H] array per layer; P pages of every replica, one replica after the other. scales: of an int8
    kv, float32 [P, page, 2K] per layer; else None. table: int32 [B, M], page numbers within the row's own replica.
    local: (table int32 [B, M'], position of its first token int32 [B]) of the sliding-window layers, which hold only
      their window; None where all layers hold everything.
    """

    kv: tuple
    scales: tuple | None
    table: Any
    local: tuple | None = None
    implementation: str = flax.struct.field(pytree_node=False, default="xla")

    end = None

    @property
    def arrays(self) -> tuple:
        """(kv,) or (kv, scales), each by layer."""
        return (self.kv,) if self.scales is None else (self.kv, self.scales)

    def with_arrays(self, arrays) -> Pages:
        """The cache with other `arrays`."""
        return self.replace(kv=arrays[0], scales=arrays[1] if len(arrays) > 1 else None)

    def begin(self, used) -> Pages:
        """The same cache: each step is given the positions of its rows."""
        return self

    def stepped(self, arrays, steps: int) -> Pages:
        """The cache after a step."""
        return self.with_arrays(arrays)

    def sees(self, positions, window: int) -> Place:
        """What the queries at positions int32 [B, 1] write and see."""
        table, begin = self.local if window and self.local else (self.table, 0)
        return Place(table, positions[:, 0] - begin, window, self.implementation)


def default_page(platform: str, config: DecoderConfig, int8: bool, tensor: int = 1) -> int:
    """Tokens of a page where the platform has a kernel for pages of this model; else 0, a dense cache."""
    return PAGE if _kernel(platform, config, PAGE, int8, tensor) else 0


def implementation(platform: str, config: DecoderConfig, page: int, int8: bool, tensor: int = 1) -> str:
    """The implementation to use on `platform` ("cpu", "gpu" or "tpu") for pages of `page` tokens, with heads split over
    `tensor` devices: the platform's kernel where it takes these sizes, else "xla"."""
    if kernel := _kernel(platform, config, page, int8, tensor):
        return kernel
    if platform != "cpu":
        log.warning("sampler: no kernel for pages of %d%s tokens, heads of %d, on %s: they are gathered in every step, "
                    "which a dense cache (pages=0) is not", page, " int8" * int8, config.head_dim, platform)
    return "xla"


def _kernel(platform: str, config: DecoderConfig, page: int, int8: bool, tensor: int) -> str:
    H, divides = config.head_dim, config.num_kv_heads % tensor == 0
    if platform == "tpu" and H % 128 == 0 and divides and not int8:
        return "ragged"
    powers = all(n >= 16 and n & (n - 1) == 0 for n in (page, H))
    return "triton" if platform == "gpu" and powers else ""


def local_window(config: DecoderConfig) -> int:
    """The largest sliding window, in tokens, if other layers have none; else 0: all layers hold the same tokens."""
    windows = [kind.window for kind in config.kinds]
    return max(windows) if 0 in windows else 0


def local_layers(config: DecoderConfig) -> tuple[bool, ...]:
    """Which layers hold only their window."""
    return tuple(local_window(config) > 0 and config.kinds[kind].window > 0 for kind in config.kind_of_layer)


def empty_pages(config: DecoderConfig, count: int, size: int, dtype, local: int = 0) -> tuple:
    """The `arrays` of zeroed Pages: `count` pages of `size` tokens, `local` pages in local_layers. dtype: int8 adds
    scales."""

    def zeros(dtype, *rest):
        counts = (local if small else count for small in local_layers(config))
        return tuple(jnp.zeros((n, size, 2 * config.num_kv_heads, *rest), dtype) for n in counts)

    return (zeros(dtype, config.head_dim), zeros(jnp.float32))[: 2 if dtype == jnp.int8 else 1]


def side_by_side(k, v, axis: int):
    """k and v [.., K, ..] with the heads at `axis` -> [.., 2K, ..]: k and v of each head in turn."""
    return jnp.stack([k, v], axis + 1).reshape(*k.shape[:axis], 2 * k.shape[axis], *k.shape[axis + 1 :])


def attend_pages(layer, q, k, v, place: Place):
    """Write one token per row and attend to the row's own context.

    Args:
      layer: (kv,) or (kv, scales) of one layer. q: [B, 1, N, H]. k, v: [B, 1, K, H].

    On a mesh each device does this with its own rows, pages and heads, as the logical axis rules in force say; where
    key-value heads do not divide over the devices, every device does all heads.

    Returns:
      (layer, out [B, 1, N, H]).
    """
    local = functools.partial(_attend_local, window=place.window, implementation=place.implementation)
    args = (tuple(layer), q[:, 0], k[:, 0], v[:, 0], place.table, place.positions)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        rows, heads = nn.logical_to_mesh_axes(("batch", "kv_heads"))
        pool, row, head = PartitionSpec(rows, None, heads), PartitionSpec(rows), PartitionSpec(rows, heads)
        specs = ((pool,) * len(layer), head, head, head, row, row)
        local = jax.shard_map(local, in_specs=specs, out_specs=(specs[0], head), check_vma=False)
    layer, out = local(*args)
    return layer, out[:, None]


def _attend_local(layer, q, k, v, table, positions, window: int, implementation: str):
    kv, *scales = layer
    page, last = kv.shape[1], table.shape[1] - 1
    new = [side_by_side(k, v, 1)]
    if scales:
        new = quantise(new[0], -1)
    to = jnp.take_along_axis(table, jnp.minimum(positions // page, last)[:, None], axis=1)[:, 0]
    layer = tuple(a.at[to, positions % page].set(n.astype(a.dtype)) for a, n in zip(layer, new, strict=True))
    if implementation == "ragged":
        return layer, _ragged(q, layer[0], table, positions, window)
    if implementation == "triton":
        return layer, pages_gpu.attend_pages(q, layer, table, positions, window)
    return layer, _gathered(q, layer, table, positions, window)


def _gathered(q, layer, table, positions, window: int):
    """The reference: all pages of the table, masked."""
    B, K = len(q), layer[0].shape[2] // 2
    seen = [a[table].reshape(B, -1, K, 2, *a.shape[3:]) for a in layer]  # [B, S, K, 2, (H)]
    (keys, values), *scales = [(a[:, :, :, 0].swapaxes(1, 2), a[:, :, :, 1].swapaxes(1, 2)) for a in seen]
    column = jnp.arange(keys.shape[2])
    mask = column <= positions[:, None]
    mask = mask & (column > positions[:, None] - window) if window else mask
    return attend(q[:, None], keys, values, mask[:, None], *scales)[:, 0]


def _ragged(q, kv, table, positions, window: int):
    from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

    B = len(q)
    starts, count = jnp.arange(B + 1, dtype=jnp.int32), jnp.array([B], jnp.int32)
    # the kernel's own choice of blocks asks for the chip, and a machine that only compiles has none
    pages = min(max(BLOCK // kv.shape[1], 1), table.shape[1])
    options = dict(num_queries_per_block=min(B, 8), num_kv_pages_per_block=pages, sliding_window=window or None)
    options["sm_scale"] = q.shape[-1] ** -0.5
    return ragged_paged_attention(q, kv, positions + 1, table, starts, count, **options)
