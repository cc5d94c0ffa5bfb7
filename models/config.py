"""Shape of the decoder, to and from the `config.json` of a Hugging Face model directory.

One config covers three families. What separates them is two flags: qwen2 adds a bias to the q, k and v
projections, qwen3 normalises each q and k head. Anything the decoder does not compute (sliding windows, other
rotary scalings, other activations, quantised weights) is refused here, by key, before any weight is read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

# model_type -> (architecture, qkv_bias, qk_norm)
FAMILIES = {
    "llama": ("LlamaForCausalLM", False, False),
    "qwen2": ("Qwen2ForCausalLM", True, False),
    "qwen3": ("Qwen3ForCausalLM", False, True),
}
_LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *_LLAMA3_KEYS}


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1 rotary scaling: wavelengths above original_max_position_embeddings / low_freq_factor are
    stretched by `factor`, those below original_max_position_embeddings / high_freq_factor are kept, and those
    between are interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise ValueError(f"{self}: need factor >= 1 and 0 < low_freq_factor < high_freq_factor")


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """How a layer attends. rope_theta, rope_scaling: of its rotary positions. window: how many tokens a token sees,
    itself included; 0: all before it."""

    rope_theta: float
    rope_scaling: Llama3Scaling | None = None
    window: int = 0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that fixes the decoder's parameters and arithmetic; hashable, so that jit can close over it.

    Raises ValueError when sizes are not positive or heads do not divide. `head_dim` is explicit because qwen3
    does not derive it from hidden_size. `init_std` is the scale of randomly initialised matrices. layer_kinds: one a
    layer, where they differ; () means all layers rotate by rope_theta and rope_scaling and see everything.
    lora_scale: factor of the adapters' product, if the parameters have adapters (models/lora.py).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: Llama3Scaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    max_position_embeddings: int = 2048
    model_type: str = "llama"
    init_std: float = 0.02
    layer_kinds: tuple[LayerKind, ...] = ()
    lora_scale: float = 1.0

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The different kinds of layers, in order of appearance."""
        return tuple(dict.fromkeys(self.layer_kinds)) or (LayerKind(self.rope_theta, self.rope_scaling),)

    @property
    def kind_of_layer(self) -> tuple[int, ...]:
        """Index into `kinds` of every layer."""
        return tuple(map(self.kinds.index, self.layer_kinds)) or (0,) * self.num_layers

    @property
    def untied(self) -> bool:
        """Whether the head is a matrix of its own."""
        return not self.tie_embeddings

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.type == "int" and (value := getattr(self, field.name)) < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even (rotary embedding turns pairs)")
        if self.layer_kinds and len(self.layer_kinds) != self.num_layers:
            raise ValueError(f"layer_kinds has {len(self.layer_kinds)} entries for {self.num_layers} layers")
        if self.model_type not in FAMILIES:
            raise ValueError(f"model_type={self.model_type!r} is not one of {', '.join(FAMILIES)}")


def from_hf(source: dict[str, Any] | str | os.PathLike) -> DecoderConfig:
    """DecoderConfig from a config dict, a `config.json`, or the directory that holds one.

    Accepts the rotary keys of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters).
    Raises ValueError, one line naming file and key, for what is missing, malformed or not implemented.
    """
    path = pathlib.Path("config" if isinstance(source, dict) else source)
    path = path / "config.json" if path.is_dir() else path
    hf = source if isinstance(source, dict) else read_json(path)
    try:
        return _parse(hf, str(path))
    except (TypeError, AttributeError, OverflowError) as e:  # values of types that no config has
        raise ValueError(f"{path}: malformed: {e}") from e


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError naming file and line if absent or not an object."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; expected a Hugging Face model directory") from None
    except (OSError, RecursionError) as e:
        raise ValueError(f"{path}: cannot be read: {e.strerror if isinstance(e, OSError) else e}") from None
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 text at byte {e.start}") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}:{e.lineno}: not valid JSON: {e.msg}") from None
    except ValueError as e:  # an integer of more digits than Python reads
        raise ValueError(f"{path}: not valid JSON: {e}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def _parse(hf: dict[str, Any], where: str) -> DecoderConfig:
    def refuse(key, need):
        raise ValueError(f"{where}: key '{key}' is {json.dumps(hf.get(key), default=str)}: {need}")

    def number(key, default, kind):
        value = default if hf.get(key) is None else hf[key]
        allowed = int if kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, allowed) or value <= 0:
            refuse(key, f"need a positive {'integer' if kind is int else 'number'}")
        return kind(value)

    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        refuse("model_type", f"supported are {', '.join(FAMILIES)}")
    architecture, qkv_bias, qk_norm = FAMILIES[model_type]
    if hf.get("architectures") and architecture not in hf["architectures"]:
        refuse("architectures", f"{model_type} needs {architecture}")
    if hf.get("hidden_act", "silu") != "silu":
        refuse("hidden_act", "only silu is supported")
    for key in ("attention_bias", "mlp_bias"):
        if hf.get(key):
            refuse(key, "not supported, need false (qwen2 has its q, k, v biases without this key)")
    if hf.get("quantization_config"):
        refuse("quantization_config", "quantised weights are not supported, need an unquantised checkpoint")
    if hf.get("use_sliding_window"):
        refuse("use_sliding_window", "sliding-window attention is not implemented, need false")
    if model_type == "llama" and hf.get("sliding_window") is not None:
        refuse("sliding_window", "sliding-window attention is not implemented, need null")
    if any(kind != "full_attention" for kind in hf.get("layer_types") or ()):
        refuse("layer_types", "only full_attention layers are implemented")

    heads, hidden = number("num_attention_heads", None, int), number("hidden_size", None, int)
    # transformers takes 128 for a qwen3 config without head_dim, hidden_size / heads for the others
    if hf.get("head_dim") is None and model_type != "qwen3" and hidden % heads:
        refuse("hidden_size", f"not a multiple of num_attention_heads={heads} and no head_dim is given")
    theta, scaling = _rope(hf, where)
    try:
        return DecoderConfig(
            vocab_size=number("vocab_size", None, int),
            hidden_size=hidden,
            intermediate_size=number("intermediate_size", None, int),
            num_layers=number("num_hidden_layers", None, int),
            num_heads=heads,
            num_kv_heads=number("num_key_value_heads", heads, int),
            head_dim=number("head_dim", 128 if model_type == "qwen3" else hidden // heads, int),
            rms_norm_eps=number("rms_norm_eps", 1e-6, float),
            rope_theta=theta,
            rope_scaling=scaling,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            tie_embeddings=bool(hf.get("tie_word_embeddings", False)),
            max_position_embeddings=number(
                "max_position_embeddings", 2048 if model_type == "llama" else 32768, int
            ),
            model_type=model_type,
            init_std=number("initializer_range", 0.02, float),
        )
    except ValueError as e:
        raise ValueError(str(e) if str(e).startswith(where) else f"{where}: {e}") from None


def _rope(hf: dict[str, Any], where: str) -> tuple[float, Llama3Scaling | None]:
    key = "rope_parameters" if hf.get("rope_parameters") else "rope_scaling"
    rope = hf.get(key) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{where}: key '{key}' must be an object or null, got {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{where}: key '{key}' has rope_type {kind!r}: supported are default, llama3")
    if unknown := sorted(set(rope) - _ROPE_KEYS):
        raise ValueError(f"{where}: key '{key}' has '{unknown[0]}', not implemented for rope_type {kind}")
    if any(d.get("partial_rotary_factor", 1.0) != 1.0 for d in (hf, rope)):
        raise ValueError(f"{where}: key 'partial_rotary_factor': only 1.0 (all of the head) is implemented")
    theta = rope.get("rope_theta", hf.get("rope_theta", 10000.0))
    values = {"rope_theta": theta}
    if kind == "llama3":
        values |= {name: rope.get(name) for name in _LLAMA3_KEYS}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0:
            raise ValueError(f"{where}: key '{name}' ({key}) is {value!r}: need a positive number")
    if kind == "default":
        return float(theta), None
    *floats, original = (values[name] for name in _LLAMA3_KEYS)
    try:
        return float(theta), Llama3Scaling(*map(float, floats), int(original))
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from None


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` content that transformers reads back as the same model.

    Uses the key names of transformers 4, which 5 reads as well. Raises ValueError for a combination of flags
    that no supported family has.
    """
    architecture, qkv_bias, qk_norm = FAMILIES[config.model_type]
    if (config.qkv_bias, config.qk_norm) != (qkv_bias, qk_norm):
        raise ValueError(
            f"qkv_bias={config.qkv_bias}, qk_norm={config.qk_norm} cannot be exported as "
            f"{config.model_type}, which has qkv_bias={qkv_bias}, qk_norm={qk_norm}"
        )
    scaling = config.rope_scaling
    hf = {
        "architectures": [architecture],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling and {"rope_type": "llama3", **dataclasses.asdict(scaling)},
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
        "use_cache": True,
    }
    if config.model_type == "llama":
        return hf | {"attention_bias": False, "mlp_bias": False}
    return hf | {"attention_bias": False, "use_sliding_window": False, "sliding_window": None}
