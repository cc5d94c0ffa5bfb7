"""Shape of the decoder, to and from the `config.json` of a Hugging Face model directory.

One config covers all families; FAMILIES says what each of them fixes and which keys it reads, models/table.py what
parameters it has. Every key that changes the arithmetic of transformers is honoured here, or refused by name before
any weight is read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from typing import Any

from models.rope import Scaling, read_rope, write_rope

ACTIVATIONS = ("silu", "gelu_pytorch_tanh")  # of the MLP's gate


@dataclasses.dataclass(frozen=True)
class Family:
    """What a model_type means beyond its keys.

    fixed: fields of DecoderConfig. biases: which of attention_bias and mlp_bias it reads. defaults: of transformers
    for absent keys, where they are not those of _DEFAULTS. windows: which layers have a sliding window: never, always,
    upper (Qwen: from max_window_layers on), nope (SmolLM3: those without rotary positions, every fourth), pattern
    (Gemma: all but every sixth); the last three also read layer_types. activation: the key that names it.
    """

    architecture: str
    fixed: dict[str, Any] = dataclasses.field(default_factory=dict)
    biases: tuple[str, ...] = ()
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    windows: str = "never"
    activation: str = "hidden_act"


_DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 32768, "initializer_range": 0.02,
             "tie_word_embeddings": False, "sliding_window": 4096}  # fmt: skip
_BIASES = ("attention_bias", "mlp_bias")
FAMILIES = {
    "llama": Family("LlamaForCausalLM", biases=_BIASES, defaults={"max_position_embeddings": 2048}),
    "mistral": Family(
        "MistralForCausalLM", windows="always",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM", {"qkv_bias": True}, windows="upper", defaults={"num_key_value_heads": 32},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", {"qk_norm": True}, _BIASES[:1], windows="upper",
        defaults={"num_key_value_heads": 32, "head_dim": 128},
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM", {"qk_norm": True}, _BIASES[:1],
        defaults={"num_key_value_heads": 4, "intermediate_size": 6144, "num_experts": 128, "num_experts_per_tok": 8,
                  "moe_intermediate_size": 768},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM", biases=_BIASES, windows="nope",
        defaults={"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True, "sliding_window": None},
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM", {"qk_norm": True}, _BIASES[:1],
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", {"qk_norm": True, "norm_offset": True, "scale_embeddings": True}, _BIASES[:1],
        windows="pattern", activation="hidden_activation",
        defaults={"vocab_size": 262208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
                  "max_position_embeddings": 131072, "rope_theta": 1e6, "tie_word_embeddings": True,
                  "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256},
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """How a layer attends. rope_theta, rope_scaling: of its rotary positions; theta 0: it has none. window: how many
    tokens a token sees, itself included; 0: all before it."""

    rope_theta: float
    rope_scaling: Scaling | None = None
    window: int = 0


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Everything that fixes the decoder's parameters and arithmetic; hashable, so that jit can close over it.

    Raises ValueError when sizes are not positive or heads do not divide. `head_dim` is explicit because qwen3
    does not derive it from hidden_size. `init_std` is the scale of randomly initialised matrices. layer_kinds: one per
    layer, where they differ; () means all layers rotate by rope_theta and rope_scaling and see everything.
    query_scale: of the scores; 0 means head_dim ** -0.5. norm_offset: norms multiply by 1 + scale. scale_embeddings:
    looked-up rows are multiplied by sqrt(hidden_size). num_experts: 0 means one dense MLP; else each token goes to
    experts_per_token of them, whose MLPs are expert_size wide; normalise_experts: their weights sum to 1.
    lora_scale: factor of the adapters' product, if the parameters have adapters (models/lora.py). narrow: matrices are
    multiplied in bfloat16 and summed in float32, whatever the compute dtype is (models/cpu.py).
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
    rope_scaling: Scaling | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    max_position_embeddings: int = 2048
    model_type: str = "llama"
    init_std: float = 0.02
    layer_kinds: tuple[LayerKind, ...] = ()
    o_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    query_scale: float = 0.0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0
    normalise_experts: bool = False
    norm_offset: bool = False
    scale_embeddings: bool = False
    lora_scale: float = 1.0
    narrow: bool = False

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
            if field.type == "int" and field.default != 0 and (value := getattr(self, field.name)) < 1:
                raise ValueError(f"{field.name} must be at least 1, got {value}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_attention_heads={self.num_heads} is not a multiple of "
                f"num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even (rotary embedding turns pairs)")
        if not 0 <= self.experts_per_token <= self.num_experts or (self.num_experts > 0) != (self.expert_size > 0):
            raise ValueError(
                f"num_experts={self.num_experts}, experts_per_token={self.experts_per_token}, "
                f"expert_size={self.expert_size}: need 0 < experts_per_token <= num_experts and a size, or zeros"
            )
        if self.layer_kinds and len(self.layer_kinds) != self.num_layers:
            raise ValueError(f"layer_kinds has {len(self.layer_kinds)} entries for {self.num_layers} layers")
        if self.model_type not in FAMILIES:
            raise ValueError(f"model_type={self.model_type!r} is not one of {', '.join(FAMILIES)}")


def from_hf(source: dict[str, Any] | str | os.PathLike) -> DecoderConfig:
    """DecoderConfig from a config dict, a `config.json`, or the directory that holds one.

    Accepts the rotary keys of transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters); where both are given,
    rope_scaling holds, as in transformers.
    Raises ValueError, one line naming file and key, for what is missing, malformed or not implemented.
    """
    path = pathlib.Path("config" if isinstance(source, dict) else source)
    path = path / "config.json" if path.is_dir() else path
    hf = source if isinstance(source, dict) else read_json(path)
    try:
        return _Reader(hf, str(path)).config()
    except (TypeError, AttributeError, OverflowError, RecursionError) as e:  # values of types that no config has
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


class _Reader:
    """Reads one config.json; every error names the file and the key."""

    def __init__(self, hf: dict[str, Any], where: str):
        self.hf, self.where = hf, where
        self.model_type = hf.get("model_type")
        if not isinstance(self.model_type, str) or self.model_type not in FAMILIES:
            self.refuse("model_type", f"supported are {', '.join(FAMILIES)}")
        self.family = FAMILIES[self.model_type]
        self.defaults = _DEFAULTS | self.family.defaults

    def refuse(self, key: str, need: str):
        raise ValueError(f"{self.where}: key '{key}' is {json.dumps(self.hf.get(key), default=str)}: {need}")

    def number(self, key: str, default=None, kind: type = int):
        """A positive number. Absent: transformers' default of the family; null: `default`, or the same."""
        absent = self.defaults.get(key, default)
        value = self.hf.get(key, absent)
        value = (absent if default is None else default) if value is None else value
        if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)) or value <= 0:
            self.refuse(key, f"need a positive {'integer' if kind is int else 'number'}")
        return kind(value)

    def flag(self, key: str) -> bool:
        value = self.hf.get(key, self.defaults.get(key, False))
        if not isinstance(value, bool):
            self.refuse(key, "need true or false")
        return value

    def config(self) -> DecoderConfig:
        self.refuse_what_is_not_computed()
        heads, hidden, layers = map(self.number, ("num_attention_heads", "hidden_size", "num_hidden_layers"))
        if layers > 10_000:
            self.refuse("num_hidden_layers", "need at most 10000")
        head_dim = self.hf.get("head_dim", self.defaults.get("head_dim"))
        if head_dim is None and hidden % heads:
            self.refuse("hidden_size", f"not a multiple of num_attention_heads={heads} and no head_dim is given")
        theta, scaling = self.rope()
        attention_bias, mlp_bias = (key in self.family.biases and self.flag(key) for key in _BIASES)
        fields = dict(qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=mlp_bias) | self.family.fixed
        if "query_pre_attn_scalar" in self.defaults:
            fields["query_scale"] = self.number("query_pre_attn_scalar", kind=float) ** -0.5
        if "num_experts" in self.defaults:
            fields |= self.experts()
        try:
            return DecoderConfig(
                vocab_size=self.number("vocab_size"),
                hidden_size=hidden,
                intermediate_size=self.number("intermediate_size"),
                num_layers=layers,
                num_heads=heads,
                num_kv_heads=self.number("num_key_value_heads", heads),
                head_dim=hidden // heads if head_dim is None else self.number("head_dim"),
                rms_norm_eps=self.number("rms_norm_eps", kind=float),
                rope_theta=theta,
                rope_scaling=scaling,
                tie_embeddings=self.flag("tie_word_embeddings"),
                max_position_embeddings=self.number("max_position_embeddings"),
                model_type=self.model_type,
                init_std=self.number("initializer_range", kind=float),
                layer_kinds=self.layer_kinds(layers, theta, scaling),
                activation=self.hf.get(self.family.activation, self.defaults.get(self.family.activation, "silu")),
                **fields,
            )
        except ValueError as e:
            raise ValueError(str(e) if str(e).startswith(self.where) else f"{self.where}: {e}") from None

    def experts(self) -> dict[str, Any]:
        """Fields of a mixture of experts."""
        for key, plain in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
            if self.hf.get(key) not in (None, plain) or isinstance(self.hf.get(key), bool):
                self.refuse(key, f"layers without experts are not implemented, need {plain}")
        return dict(
            num_experts=self.number("num_local_experts" if "num_local_experts" in self.hf else "num_experts"),
            experts_per_token=self.number("num_experts_per_tok"),
            expert_size=self.number("moe_intermediate_size"),
            normalise_experts=self.flag("norm_topk_prob"),
        )

    def refuse_what_is_not_computed(self):
        hf, family = self.hf, self.family
        if hf.get("architectures") and family.architecture not in hf["architectures"]:
            self.refuse("architectures", f"{self.model_type} needs {family.architecture}")
        for key in set(_BIASES) - set(family.biases):
            if hf.get(key):
                self.refuse(key, f"{self.model_type} does not read it, need false")
        if hf.get(family.activation, "silu") not in ACTIVATIONS:
            self.refuse(family.activation, f"supported are {', '.join(ACTIVATIONS)}")
        if hf.get("quantization_config"):
            self.refuse("quantization_config", "quantised weights are not supported, need an unquantised checkpoint")
        if hf.get("per_layer_config"):
            self.refuse("per_layer_config", "layers of different sizes are not implemented")
        if hf.get("is_causal", True) is not True or hf.get("use_bidirectional_attention"):
            key = "use_bidirectional_attention" if hf.get("use_bidirectional_attention") else "is_causal"
            self.refuse(key, "only causal attention is implemented")
        for key in ("attn_logit_softcapping", "final_logit_softcapping"):
            if hf.get(key) is not None:
                self.refuse(key, "not implemented, need null")

    # --- rotary positions and kinds of layers

    def rope(self) -> tuple[float, Scaling | None]:
        """(theta, scaling) of the layers that see everything."""
        hf = self.hf
        key = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
        rope = hf.get(key) or {}
        if self.family.windows == "pattern":
            nested = self.nested_rope("full_attention")
            if key == "rope_scaling" and isinstance(rope, dict) and "rope_type" not in rope:
                self.refuse(key, "need a rope_type; transformers does not read 'type' here")
            rope = nested | rope if key == "rope_scaling" and isinstance(rope, dict) else nested
        return self.read_rope(rope, key, hf.get("rope_theta", self.defaults["rope_theta"]))

    def nested_rope(self, layer_type: str) -> dict:
        nested = self.hf.get("rope_parameters") or {}
        if not isinstance(nested, dict) or set(nested) - {"full_attention", "sliding_attention"}:
            self.refuse("rope_parameters", "need objects under full_attention and sliding_attention")
        return nested.get(layer_type) or {}

    def read_rope(self, rope, key: str, theta) -> tuple[float, Scaling | None]:
        hf, partial = self.hf, "partial_rotary_factor"
        for place in (hf, rope if isinstance(rope, dict) else {}):
            if place.get(partial) not in (None, 1, 1.0):
                raise ValueError(f"{self.where}: key '{partial}': only 1.0 (all of the head) is implemented")
        original = (hf.get("original_max_position_embeddings"), self.number("max_position_embeddings"))
        return read_rope(rope, key, self.where, theta, original)

    def layer_kinds(self, layers: int, theta: float, scaling) -> tuple[LayerKind, ...]:
        """One per layer; () if all of them are of the default kind."""
        windowed, ropeless = self.windowed(layers), self.ropeless(layers)
        plain, local = LayerKind(theta, scaling), (theta, scaling)
        if self.family.windows == "pattern":
            local = self.read_rope(
                self.nested_rope("sliding_attention"), "rope_parameters", self.hf.get("rope_local_base_freq", 10000.0))
        kinds = [LayerKind(*local) if w else plain for w in windowed]
        window = self.number("sliding_window") if any(windowed) else 0
        for i, (without_rope, has_window) in enumerate(zip(ropeless, windowed, strict=True)):
            kinds[i] = LayerKind(0.0, None) if without_rope else kinds[i]
            kinds[i] = dataclasses.replace(kinds[i], window=window * has_window)
        return () if set(kinds) == {plain} else tuple(kinds)

    def layer_types(self, layers: int) -> list[bool] | None:
        """From key layer_types, whether each layer has a sliding window; None if the key is absent."""
        types = self.hf.get("layer_types")
        if types is None:
            return None
        known = ("full_attention", "attention", "sliding_attention")
        if not isinstance(types, list) or len(types) != layers or any(t not in known for t in types):
            self.refuse("layer_types", f"need full_attention or sliding_attention for each of {layers} layers")
        return [t == "sliding_attention" for t in types]

    def windowed(self, layers: int) -> list[bool]:
        """Whether each layer has a sliding window."""
        how, types = self.family.windows, self.layer_types(layers)
        if how in ("never", "always") and any(types or ()):
            self.refuse("layer_types", f"{self.model_type} does not read it, need full_attention only or null")
        if how == "never":
            on = self.hf.get("use_sliding_window", self.hf.get("sliding_window") is not None)
            if on is not False:
                self.refuse("sliding_window", f"{self.model_type} has none, need null and use_sliding_window false")
            return [False] * layers
        on = self.hf.get("sliding_window", self.defaults["sliding_window"]) is not None
        on = on and (how not in ("upper", "nope") or self.flag("use_sliding_window"))
        if how == "always":
            return [on] * layers
        if types is None and how == "pattern":
            every = self.number("sliding_window_pattern", 6)
            types = [bool((i + 1) % every) for i in range(layers)]
        elif types is None and how == "nope":
            types = [on and ropeless for ropeless in self.ropeless(layers)]
        elif types is None:
            first = self.hf.get("max_window_layers", 28)
            if isinstance(first, bool) or not isinstance(first, int):
                self.refuse("max_window_layers", "need an integer")
            types = [on and i >= first for i in range(layers)]
        if any(types) and not on:
            self.refuse("layer_types", "sliding_attention needs a sliding_window (and use_sliding_window true)")
        return types

    def ropeless(self, layers: int) -> list[bool]:
        """Whether each layer has no rotary positions."""
        if self.family.windows != "nope":
            return [False] * layers
        rotary = self.hf.get("no_rope_layers")
        if rotary is None:
            every = self.number("no_rope_layer_interval", 4)
            rotary = [int((i + 1) % every != 0) for i in range(layers)]
        if not isinstance(rotary, list) or len(rotary) < layers or any(x not in (0, 1) for x in rotary):
            self.refuse("no_rope_layers", f"need 0 (no rotary positions) or 1 for each of {layers} layers")
        return [not x for x in rotary[:layers]]


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The `config.json` content that transformers reads back as the same model.

    Uses the key names of transformers 4, which 5 reads as well. Raises ValueError for a combination of fields
    that the family cannot have.
    """
    c = config
    family = FAMILIES[c.model_type]
    hf = {
        "architectures": [family.architecture],
        "model_type": c.model_type,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        family.activation: c.activation,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": write_rope(c.rope_scaling),
        "tie_word_embeddings": c.tie_embeddings,
        "max_position_embeddings": c.max_position_embeddings,
        "initializer_range": c.init_std,
        "attention_dropout": 0.0,
        "use_cache": True,
        "pad_token_id": None,  # the default of some families lies outside of a small vocabulary
        "attention_bias": "attention_bias" in family.biases and c.o_bias,
        "mlp_bias": c.mlp_bias,
    }
    if c.num_experts:
        hf |= {"num_experts": c.num_experts, "num_experts_per_tok": c.experts_per_token, "decoder_sparse_step": 1}
        hf |= {"moe_intermediate_size": c.expert_size, "norm_topk_prob": c.normalise_experts, "mlp_only_layers": []}
    kinds = [c.kinds[kind] for kind in c.kind_of_layer]
    windows = [kind.window for kind in kinds]
    hf["sliding_window"] = max(windows) or None
    if family.windows in ("upper", "nope", "pattern"):
        hf |= {"layer_types": ["sliding_attention" if w else "full_attention" for w in windows]}
    if family.windows in ("upper", "nope"):
        hf |= {"use_sliding_window": any(windows)}
    if family.windows == "nope":
        hf |= {"no_rope_layers": [int(kind.rope_theta > 0) for kind in kinds]}
    if family.windows == "pattern":
        hf |= {"rope_local_base_freq": next((k.rope_theta for k in kinds if k.window), 10000.0)}
        scalar = round((c.query_scale or c.head_dim**-0.5) ** -2, 6)
        hf |= {"query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar}
    c = dataclasses.replace(c, lora_scale=1.0, narrow=False)  # adapters and rounding are not part of a directory
    if (same := from_hf(hf)) != c:
        field = next(f.name for f in dataclasses.fields(c) if getattr(c, f.name) != getattr(same, f.name))
        value, read = getattr(c, field), getattr(same, field)
        raise ValueError(f"{field}={value} cannot be exported as {c.model_type}, which would read {field}={read}")
    return hf
