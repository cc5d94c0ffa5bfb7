"""Memory of a chip in bytes, from shapes alone: what a run keeps there, and what is left for KV-cache pages.

The learner's state stays on the chip while the sampler works. Beside it are the sampler's weights, prefilled prompts
that wait for a slot, and the working memory of prefill. Only the last is an estimate, because the compiler decides it;
`python -m jaxrl.preflight` compiles the programs and says whether the sum was right.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import jax
from jax.sharding import NamedSharding

from jaxrl.learner.learner import Learner, needs_reference
from jaxrl.learner.state import HOST
from jaxrl.rollout.cache import bucket
from jaxrl.rollout.paged import PREFILL, Rings
from jaxrl.rollout.placement import Placement
from jaxrl.runtime import hardware
from models.config import DecoderConfig
from models.decoder import abstract_params
from models.layout import sampling_layout
from models.pages import default_page, local_layers, local_window

RESERVE = 0.05  # share of the memory left free for decoding's own buffers and for fragmentation
ACTIVATIONS = 12  # most arrays of the width of the MLP that prefill holds at once, as compiled for the pod configs

log = logging.getLogger(__name__)


def placed(tree, shardings):
    """Shapes with shardings. shardings: a tree, or one for all."""
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def bytes_of(tree) -> float:
    """Bytes of a tree of placed shapes or arrays on one chip; arrays offloaded to the host count 0."""
    leaves = [x for x in jax.tree.leaves(tree) if x.sharding.memory_kind != HOST]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def of_reference(config, learner: Learner) -> float:
    """Bytes per chip of the frozen reference model, 0 without one; with adapters it is their base and adds 0."""
    return bytes_of(learner.abstract_state().params) if needs_reference(config) and not learner.lora else 0.0


def of_learner(config, learner: Learner) -> float:
    """Bytes per chip of everything that the learner keeps while the sampler works."""
    kept = bytes_of(learner.abstract_state()) + bytes_of(learner.abstract_base())
    return kept + of_reference(config, learner)


def of_sampler(decoder: DecoderConfig, dtype, placement: Placement | None, int8: bool = False) -> float:
    """Bytes per chip of the sampler's weights."""
    fused, untied = placement.fused if placement else True, placement and placement.platform == "cpu"
    tree = jax.eval_shape(
        lambda p: sampling_layout(p, decoder, dtype, fused, untie=untied, int8=int8), abstract_params(decoder)[0]
    )
    if placement is None:
        return float(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)))
    return bytes_of(placed(tree, placement.params(decoder)))


def of_token(decoder: DecoderConfig, dtype, placement: Placement | None, int8: bool = False, *,
             local: bool | None = None) -> float:
    """Bytes per chip of one token's keys and values. local: only in layers that keep a window of tokens (True), or only
    in layers that keep all tokens (False)."""
    tensor = placement.mesh.shape["tensor"] if placement and placement.rules["kv_heads"] else 1
    entry = decoder.head_dim * (1 if int8 else jax.numpy.dtype(dtype).itemsize) + 4 * int8
    layers = sum(local in (None, small) for small in local_layers(decoder))
    return 2.0 * layers * decoder.num_kv_heads / tensor * entry


def free_tokens(decoder: DecoderConfig, dtype, placement: Placement | None, *, memory: float, lives: float,
                max_prompt: int, int8_weights: bool = False, int8_cache: bool = False) -> int:
    """Tokens that the pages of a host can hold on chips of `memory` bytes, of which `lives` bytes are in use."""
    replicas, tensor = (placement.row_multiple, placement.mesh.shape["tensor"]) if placement else (1, 1)
    token, kept = (of_token(decoder, dtype, placement, int8_cache, local=local) for local in (None, False))
    least = max(4, replicas) / replicas * bucket(max_prompt, 32)  # see PagedCache.prefill_sizes
    prefilled = max(PREFILL, least)  # tokens of one call, on each replica
    wide = max(decoder.intermediate_size / tensor, decoder.hidden_size) * jax.numpy.dtype(dtype).itemsize
    free = memory * (1 - RESERVE) - lives - of_sampler(decoder, dtype, placement, int8_weights)
    free -= prefilled * (2 * token + ACTIVATIONS * wide)  # one batch of prompts waits while the next is prefilled
    return max(int(free / kept), 0) * replicas


def pages_of(flags: dict, run: dict) -> int:
    """--pages of a command: if not given, sampling.pages of the run's settings, which may be {}."""
    return flags["pages"] if flags["pages"] >= 0 else run.get("sampling", {}).get("pages", -1)


def cache_sizes(decoder: DecoderConfig, dtype, placement: Placement | None, device: Any, *, lives, slots: int,
                max_prompt: int, max_tokens: int, pages: int = -1, tokens: int = 0, chunk: int = 64,
                int8_weights: bool = False, int8_cache: bool = False) -> dict[str, int]:
    """{"pages", "cache_tokens"} for the engine: tokens per page (0: a dense cache), and tokens that all pages hold.

    pages: -1 for pages where the chip has a kernel for them. tokens: 0 for what the memory has room for, at most what
    `slots` responses of full length take. lives: a function that returns the bytes per chip that are already in use.
    """
    platform = {"cuda": "gpu"}.get(device.platform, device.platform)
    if pages < 0:
        tensor = placement.mesh.shape["tensor"] if placement else 1
        pages = default_page(platform, decoder, int8_cache, tensor)
    if not pages:
        if tokens:
            log.warning("sampler: cache_tokens=%d is ignored: by default the cache is not in pages here "
                        "(sampling.pages=64)", tokens)
        return dict(pages=0, cache_tokens=0)
    replicas = placement.row_multiple if placement else 1
    most = -(-(max_prompt + max_tokens) // pages) * pages
    if not tokens and platform != "cpu":
        if memory := hardware.memory(device):
            taken = lives()
            if window := local_window(decoder):
                rings = Rings(window, page=pages, chunk=chunk, most=most // pages, slots=slots, replicas=replicas)
                taken += rings.pages * pages * of_token(decoder, dtype, placement, int8_cache, local=True)
            tokens = free_tokens(decoder, dtype, placement, memory=memory, lives=taken, max_prompt=max_prompt,
                                 int8_weights=int8_weights, int8_cache=int8_cache)
            tokens = max(min(tokens, most * slots), most * replicas)
        else:
            log.warning("sampler: how much memory %r has is unknown: the pages hold %d tokens, %d responses of full "
                        "length; set cache_tokens for less", device.device_kind, most * slots, slots)
    return dict(pages=pages, cache_tokens=tokens)
