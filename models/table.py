"""One table of weights per family: everything known of a parameter is in its row, and nowhere else.

The decoder, the Hugging Face files, the sampler's layout and placement, weight decay, mixed precision, int8 and FLOP
counts read it. A new family is a new tuple of rows in FAMILIES, and what it computes in models/decoder.py.

Letters of `dims`: D width, Q query heads x head size, K key-value heads x head size, H head size, F MLP width,
V vocabulary, R rank of an adapter, E experts, M width of an expert.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax

from models.config import DecoderConfig

MATRIX, NORM, BIAS, EMBEDDING = "matrix", "norm", "bias", "embedding"
ROUTER, EXPERTS = "router", "experts"
LINEAR = (MATRIX, ROUTER, EXPERTS)  # multiplied from the right, transposed in the file, have FLOPs, decay
# what may stand beside a matrix, as NAME + suffix: float32 scales of an int8 one, low-rank adapters (models/lora.py)
SCALE, LORA_A, LORA_B = "_scale", "_lora_a", "_lora_b"
TRANSPOSED = "_transposed"  # NAME + suffix instead of the matrix: the transposed one, in the sampling layout of a CPU
# letter -> logical axis; what an axis means on a mesh is said in jaxrl/runtime/mesh.py
_AXES = {"D": "embed", "Q": "heads", "K": "kv_heads", "H": "norm", "F": "mlp", "V": "vocab", "R": None, "E": "expert",
         "M": "expert_mlp"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Weight:
    """A row. Rows of `weights(config)` have a shape, those of FAMILIES do not have one yet.

    path: in the parameter tree; arrays under "layers" have the layer as axis 0, before `dims`.
    hf: Hugging Face name; "{}" is the layer, a second one the expert.
    kind: MATRIX: may be int8, takes an adapter. ROUTER: chooses experts. EXPERTS: one matrix per expert, of which a
      token uses some; both stay in the compute dtype. See LINEAR for what all three have in common.
      EMBEDDING: looked up by token, decays. BIAS: does not decay. NORM: neither decays nor is rounded for compute.
    fused: parameter of the sampling layout that holds all rows of this name side by side; "" if it stays alone.
    flag: field of DecoderConfig that says whether the row exists; "" for always.
    """

    path: tuple[str, ...]
    hf: str
    kind: str
    dims: str
    fused: str = ""
    flag: str = ""
    shape: tuple[int, ...] = ()

    @property
    def layered(self) -> bool:
        return self.path[0] == "layers"

    @property
    def axes(self) -> tuple[str | None, ...]:
        """Logical axis of every dimension of `shape`."""
        own = {NORM: dict.fromkeys("DQKH", "norm"), EXPERTS: {"D": "expert_embed"}, ROUTER: {"E": None}}
        return tuple((_AXES | own.get(self.kind, {}))[letter] for letter in self.dims)

    @property
    def stacked(self) -> int:
        """Leading axes of the whole array along which the file has separate tensors."""
        return self.hf.count("{}")


def _row(path: str, hf: str, kind: str, dims: str, *, fused: str = "", flag: str = "") -> Weight:
    if path.startswith("layers/"):
        hf = f"model.layers.{{}}.{hf}"
    return Weight(tuple(path.split("/")), hf, kind, dims, fused, flag)


def _norm(name: str, hf: str) -> Weight:
    return _row(f"layers/{name}/scale", f"{hf}.weight", NORM, "D")


_EMBEDDING = _row("embed/embedding", "model.embed_tokens.weight", EMBEDDING, "VD")
_ENDS = (
    _row("final_norm/scale", "model.norm.weight", NORM, "D"),
    _row("lm_head/kernel", "lm_head.weight", MATRIX, "DV", flag="untied"),
)
_ATTENTION = (
    _row("layers/attn/q", "self_attn.q_proj.weight", MATRIX, "DQ", fused="qkv"),
    _row("layers/attn/k", "self_attn.k_proj.weight", MATRIX, "DK", fused="qkv"),
    _row("layers/attn/v", "self_attn.v_proj.weight", MATRIX, "DK", fused="qkv"),
    _row("layers/attn/o", "self_attn.o_proj.weight", MATRIX, "QD"),
    _row("layers/attn/q_bias", "self_attn.q_proj.bias", BIAS, "Q", fused="qkv_bias", flag="qkv_bias"),
    _row("layers/attn/k_bias", "self_attn.k_proj.bias", BIAS, "K", fused="qkv_bias", flag="qkv_bias"),
    _row("layers/attn/v_bias", "self_attn.v_proj.bias", BIAS, "K", fused="qkv_bias", flag="qkv_bias"),
    _row("layers/attn/o_bias", "self_attn.o_proj.bias", BIAS, "D", flag="o_bias"),
)


def _qk_norms(q: str, k: str) -> tuple[Weight, ...]:
    """Of dims q and k: each head by itself ("H"), or all heads of a token as one vector."""
    return (
        _row("layers/attn/q_norm", "self_attn.q_norm.weight", NORM, q, flag="qk_norm"),
        _row("layers/attn/k_norm", "self_attn.k_norm.weight", NORM, k, flag="qk_norm"),
    )


_MLP = (
    _row("layers/mlp/gate", "mlp.gate_proj.weight", MATRIX, "DF", fused="gate_up"),
    _row("layers/mlp/up", "mlp.up_proj.weight", MATRIX, "DF", fused="gate_up"),
    _row("layers/mlp/down", "mlp.down_proj.weight", MATRIX, "FD"),
    _row("layers/mlp/gate_bias", "mlp.gate_proj.bias", BIAS, "F", fused="gate_up_bias", flag="mlp_bias"),
    _row("layers/mlp/up_bias", "mlp.up_proj.bias", BIAS, "F", fused="gate_up_bias", flag="mlp_bias"),
    _row("layers/mlp/down_bias", "mlp.down_proj.bias", BIAS, "D", flag="mlp_bias"),
)
_EXPERTS = (
    _row("layers/mlp/router", "mlp.gate.weight", ROUTER, "DE"),
    _row("layers/mlp/experts_gate", "mlp.experts.{}.gate_proj.weight", EXPERTS, "EDM", fused="experts_gate_up"),
    _row("layers/mlp/experts_up", "mlp.experts.{}.up_proj.weight", EXPERTS, "EDM", fused="experts_gate_up"),
    _row("layers/mlp/experts_down", "mlp.experts.{}.down_proj.weight", EXPERTS, "EMD"),
)

_LLAMA = (
    _EMBEDDING,
    _norm("attn_norm", "input_layernorm"),
    _norm("mlp_norm", "post_attention_layernorm"),
    *_ATTENTION, *_qk_norms("H", "H"), *_MLP, *_ENDS,
)  # fmt: skip
_QWEN3_MOE = (*(row for row in _LLAMA if row not in _MLP), *_EXPERTS)
_OLMO2 = (
    _EMBEDDING,
    _norm("attn_post_norm", "post_attention_layernorm"),
    _norm("mlp_post_norm", "post_feedforward_layernorm"),
    *_ATTENTION, *_qk_norms("Q", "K"), *_MLP, *_ENDS,
)  # fmt: skip
_GEMMA3 = (
    _EMBEDDING,
    _norm("attn_norm", "input_layernorm"),
    _norm("attn_post_norm", "post_attention_layernorm"),
    _norm("mlp_norm", "pre_feedforward_layernorm"),
    _norm("mlp_post_norm", "post_feedforward_layernorm"),
    *_ATTENTION, *_qk_norms("H", "H"), *_MLP, *_ENDS,
)  # fmt: skip

FAMILIES: dict[str, tuple[Weight, ...]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3"), _LLAMA),
    "qwen3_moe": _QWEN3_MOE,
    "olmo2": _OLMO2,
    "gemma3_text": _GEMMA3,
}
_KINDS = {row.path: row.kind for rows in FAMILIES.values() for row in rows}


@functools.lru_cache(maxsize=64)
def weights(config: DecoderConfig) -> dict[tuple[str, ...], Weight]:
    """The table of one model: path -> row, in the order of the files."""
    c, H = config, config.head_dim
    sizes = {"D": c.hidden_size, "Q": c.num_heads * H, "K": c.num_kv_heads * H, "H": H, "F": c.intermediate_size,
             "V": c.vocab_size, "E": c.num_experts, "M": c.expert_size}  # fmt: skip
    rows = (row for row in FAMILIES[c.model_type] if not row.flag or getattr(c, row.flag))
    return {row.path: dataclasses.replace(row, shape=tuple(sizes[d] for d in row.dims)) for row in rows}


def find(config: DecoderConfig, module: str, name: str) -> Weight | None:
    """The row of parameter `name` in a module of the decoder ("attn", "final_norm", ...); None if there is none."""
    table = weights(config)
    return table.get(("layers", module, name)) or table.get((module, name))


def whole_shape(row: Weight, config: DecoderConfig) -> tuple[int, ...]:
    """Shape of the parameter in the training tree, where layers are stacked on axis 0."""
    return (config.num_layers, *row.shape) if row.layered else row.shape


def kinds(params):
    """The tree with the kind of each parameter in its place. params: (part of) a training tree, of any family; what
    is in no table, such as an adapter, counts as MATRIX, the scales of an int8 matrix as NORM."""

    def one(path, _):
        keys = tuple(p.key for p in path)
        return _KINDS.get(keys, NORM if keys[-1].endswith(SCALE) else MATRIX)

    return jax.tree_util.tree_map_with_path(one, params)


def matrix_elements(config: DecoderConfig) -> tuple[int, int]:
    """(elements of the matrices that a token is multiplied by in all layers, elements of the head's matrix)."""
    share = {EXPERTS: config.experts_per_token / max(config.num_experts, 1)}
    rows = [row for row in weights(config).values() if row.kind in LINEAR and row.layered]
    layer = sum(_size(row) * share.get(row.kind, 1) for row in rows)
    return round(config.num_layers * layer), config.hidden_size * config.vocab_size


def _size(row: Weight) -> int:
    return functools.reduce(lambda a, b: a * b, row.shape, 1)


def set_path(tree: dict, path: tuple[str, ...], value: Any) -> None:
    """Put a value into nested dicts, making those that are missing."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


def get_path(tree: Any, path: tuple[str, ...]) -> Any:
    """The value at a path of nested dicts; None if it is not there."""
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
