"""Shapes of published checkpoints, from their config.json, so that preflight needs no weights.

A pod config names both the checkpoint (`model.path`, for the run) and its shape (for preflight). Llama's rotary
scaling changes no size and comes with the checkpoint.
"""

_QWEN2 = dict(model_type="qwen2", qkv_bias=True, head_dim=128, rms_norm_eps=1e-6, tie_embeddings=False)

QWEN25_MATH_7B = dict(
    _QWEN2,
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_layers=28,
    num_heads=28,
    num_kv_heads=4,
    rope_theta=10000.0,
    max_position_embeddings=4096,
)
R1_DISTILL_QWEN_1_5B = dict(
    _QWEN2,
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_layers=28,
    num_heads=12,
    num_kv_heads=2,
    rope_theta=10000.0,
    max_position_embeddings=131072,
)
R1_DISTILL_QWEN_7B = dict(QWEN25_MATH_7B, max_position_embeddings=131072)
R1_DISTILL_QWEN_14B = dict(
    _QWEN2,
    vocab_size=152064,
    hidden_size=5120,
    intermediate_size=13824,
    num_layers=48,
    num_heads=40,
    num_kv_heads=8,
    rms_norm_eps=1e-5,
    rope_theta=1000000.0,
    max_position_embeddings=131072,
)
QWEN3_4B = dict(
    model_type="qwen3",
    qk_norm=True,
    tie_embeddings=True,
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_layers=36,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    max_position_embeddings=32768,
)
LLAMA_3_2_3B = dict(
    model_type="llama",
    tie_embeddings=True,
    vocab_size=128256,
    hidden_size=3072,
    intermediate_size=8192,
    num_layers=28,
    num_heads=24,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    max_position_embeddings=131072,
)
LLAMA_3_1_8B = dict(
    LLAMA_3_2_3B,
    tie_embeddings=False,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
)
QWEN3_30B_A3B = dict(
    QWEN3_4B,
    model_type="qwen3_moe",
    tie_embeddings=False,
    hidden_size=2048,
    intermediate_size=6144,
    num_layers=48,
    num_kv_heads=4,
    max_position_embeddings=40960,
    num_experts=128,
    experts_per_token=8,
    expert_size=768,
    normalise_experts=True,
)
