"""Peers' published throughput on v6e-4 beside what is expected of our programs for the same work, by arithmetic.

    python benchmarks/published.py

Qwen3-8B in bfloat16 over four chips (tensor 4). Published: SGLang-JAX's figures, vLLM's beside them. Ours is an
estimate from shapes; nothing was run or compiled. rollout_goals.py says what the estimate assumes and leaves out. Its
known error applies here, too: preflight's compiled estimates of dense decoding were 1.5 to 2.4 times as long.
"""

from __future__ import annotations

from rollout_goals import Host

from jaxrl.runtime import hardware, roofline
from models.config import DecoderConfig
from models.pages import BLOCK
from models.table import matrix_elements

QWEN3_8B = DecoderConfig(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32, num_kv_heads=8,
    head_dim=128, qk_norm=True, tie_embeddings=False, model_type="qwen3", max_position_embeddings=40960,
)  # fmt: skip
CHIPS, BYTES = 4, 2
PUBLISHED = {(256, 1024, 1024): (7572, 4051), (64, 8192, 1024): (1459, 874)}  # requests, prompt, answer: tokens/s


def host(model: DecoderConfig = QWEN3_8B) -> Host:
    """One replica on four chips of v6e."""
    token = 2 * model.num_layers * model.num_kv_heads * model.head_dim * BYTES / CHIPS
    weights = sum(matrix_elements(model)) * BYTES / CHIPS
    return Host(hardware.chip("tpu v6"), 1, CHIPS, weights, token, hardware.model_flops_per_token(model, 0))


def expected(requests: int, prompt: int, answer: int, model: DecoderConfig = QWEN3_8B) -> tuple[float, float, float]:
    """(answer tokens/s, seconds of prefill, seconds of decoding) with all requests decoding together.

    Raises ValueError if their caches do not fit into the memory beside the weights."""
    one = host(model)
    held = one.weights + one.token * requests * (prompt + answer)
    if held > one.chip.hbm * 0.95:
        raise ValueError(f"{held / hardware.GIB:.1f} GiB a chip of {one.chip.hbm / hardware.GIB:.1f}")
    work = requests * prompt * hardware.model_flops_per_token(model, prompt / 2)
    prefill = work / (CHIPS * roofline.KERNEL_SHARE * one.chip.flops)
    ends = (prompt + i for i in range(1, answer + 1))
    decode = sum(one.step(requests, requests * -(-end // BLOCK) * BLOCK) for end in ends)
    return requests * answer / (prefill + decode), prefill, decode


def main() -> None:
    print(f"{'work':<20}{'SGLang-JAX':>12}{'vLLM':>8}{'expected here':>15}{'of it prefill':>15}{'twice as long':>15}")
    for work, (sglang, vllm) in PUBLISHED.items():
        rate, prefill, decode = expected(*work)
        name = "{} x ({} + {})".format(*work)
        print(f"{name:<20}{sglang:>12,}{vllm:>8,}{rate:>15,.0f}{prefill / (prefill + decode):>15.0%}{rate / 2:>15,.0f}")


if __name__ == "__main__":
    main()
