"""Tiny models of every supported family, as Hugging Face configs and weights, without torch.

The tensor list is written out here from the published checkpoints, independently of models/weights.py.
"""

import json
import pathlib

import numpy as np
from safetensors.numpy import save_file

_BASE = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
# Frequencies of an 8- or 16-wide head at theta 10000 fall on all three branches of this scaling.
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LINEAR_ROPE = {"rope_type": "linear", "factor": 4.0}
_YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_LLAMA = {**_BASE, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}
_QWEN2 = {**_BASE, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rms_norm_eps": 1e-6}
_QWEN3 = {**_BASE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rms_norm_eps": 1e-6}

CASES = {
    "llama2": _LLAMA | {"num_key_value_heads": 4},
    "llama3": _LLAMA | {"rope_scaling": _LLAMA3_ROPE, "head_dim": 16},
    "llama3_tied": _LLAMA | {"rope_scaling": _LLAMA3_ROPE, "tie_word_embeddings": True},
    "qwen2": _QWEN2 | {"use_sliding_window": False, "sliding_window": 4096, "rope_theta": 1e6},
    "qwen2_tied": _QWEN2 | {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "qwen3": _QWEN3 | {"head_dim": 16, "rope_theta": 1e6},
    "qwen3_tied": _QWEN3 | {"head_dim": 12, "tie_word_embeddings": True},
    "llama_bias": _LLAMA | {"attention_bias": True, "mlp_bias": True, "rope_scaling": _LINEAR_ROPE},
    "llama_yarn": _LLAMA | {"head_dim": 16, "rope_scaling": _YARN_ROPE | {"beta_fast": 8, "truncate": False}},
    "qwen2_linear": _QWEN2 | {"rope_scaling": _LINEAR_ROPE},
    "qwen2_window": _QWEN2 | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3_yarn": _QWEN3 | {"head_dim": 32, "rope_scaling": _YARN_ROPE, "attention_bias": True},
    "qwen3_moe": _BASE | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 6,
                          "num_experts_per_tok": 2, "moe_intermediate_size": 20, "norm_topk_prob": True},
    "mistral": _BASE | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 7},
    "smollm3": _BASE | {"architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "tie_word_embeddings": True,
                        "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 7,
                        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "olmo2": _BASE | {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"},
    "gemma3": _BASE | {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "head_dim": 12,
                       "query_pre_attn_scalar": 20, "sliding_window": 7, "sliding_window_pattern": 2,
                       "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": _LINEAR_ROPE,
                       "tie_word_embeddings": True, "hidden_activation": "gelu_pytorch_tanh"},
}  # fmt: skip


_NORMS = {
    "olmo2": ("post_attention", "post_feedforward"),
    "gemma3_text": ("input", "post_attention", "pre_feedforward", "post_feedforward"),
}


def hf_tensors(hf: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 tensors of a config under Hugging Face names and shapes ([out, in]).

    From RandomState, whose streams are frozen. Norm scales and biases are random too, and the matrices large
    enough that attention is far from uniform: a swapped or forgotten tensor moves the logits.
    """
    D, F, V = hf["hidden_size"], hf["intermediate_size"], hf["vocab_size"]
    H = hf.get("head_dim") or D // hf["num_attention_heads"]
    Q, K = hf["num_attention_heads"] * H, hf["num_key_value_heads"] * H
    shapes, family = {"model.embed_tokens.weight": (V, D)}, hf["model_type"]
    for i in range(hf["num_hidden_layers"]):
        layer = {
            "self_attn.q_proj.weight": (Q, D),
            "self_attn.k_proj.weight": (K, D),
            "self_attn.v_proj.weight": (K, D),
            "self_attn.o_proj.weight": (D, Q),
        }
        mlps, width = [f"mlp.experts.{e}" for e in range(hf.get("num_experts", 0))], hf.get("moe_intermediate_size", F)
        for mlp in mlps or ["mlp"]:
            layer |= {f"{mlp}.gate_proj.weight": (width, D), f"{mlp}.up_proj.weight": (width, D)}
            layer[f"{mlp}.down_proj.weight"] = (D, width)
        if mlps:
            layer["mlp.gate.weight"] = (len(mlps), D)
        layer |= {f"{norm}_layernorm.weight": (D,) for norm in _NORMS.get(family, ("input", "post_attention"))}
        if family == "qwen2" or hf.get("attention_bias"):
            layer |= {f"self_attn.{n}_proj.bias": (size,) for n, size in (("q", Q), ("k", K), ("v", K))}
        if hf.get("attention_bias"):
            layer["self_attn.o_proj.bias"] = (D,)
        if hf.get("mlp_bias"):
            layer |= {f"mlp.{n}_proj.bias": (size,) for n, size in (("gate", F), ("up", F), ("down", D))}
        if family in ("qwen3", "qwen3_moe", "gemma3_text", "olmo2"):
            sizes = (Q, K) if family == "olmo2" else (H, H)
            layer |= {f"self_attn.{n}_norm.weight": (size,) for n, size in zip("qk", sizes, strict=True)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (D,)
    if not hf["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    random, tensors = np.random.RandomState(seed), {}
    for name, shape in shapes.items():
        x = random.standard_normal(shape)
        if name.endswith("norm.weight"):
            x = 1 + 0.3 * x
        elif name.endswith("bias"):
            x = 0.5 * x
        else:
            x = x * 1.5 / np.sqrt(shape[-1])
        tensors[name] = x.astype(np.float32)
    return tensors


def write_model(directory: pathlib.Path, hf: dict, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    """A model directory as published: config.json and model.safetensors."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
