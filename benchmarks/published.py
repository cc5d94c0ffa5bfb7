"""Peers' published throughput on TPUs beside what is expected of our programs for the same work.

    python benchmarks/published.py             # by arithmetic
    python benchmarks/published.py --compile   # by the TPU compiler's estimate, some minutes (pip install libtpu)

Sampling: Qwen3-8B in bfloat16 over four chips of v6e (tensor 4); published are SGLang-JAX's figures, with vLLM's beside
them. Training: Llama-3.1-8B on v6e-8, three sequences of 8192 tokens a chip; published is MaxText's share of the peak
(MFU). Nothing of ours was run. By arithmetic: rollout_goals.py says what is assumed and left out; its known error is
there, too: preflight's compiled estimates of dense decoding were 1.5 to 2.4 times as long. By the compiler: as
`jaxrl.preflight` does it, which says what its estimate is worth.
"""

from __future__ import annotations

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from rollout_goals import Host

from configs.pods.recipes import pod
from configs.pods.shapes import LLAMA_3_1_8B
from jaxrl import build, preflight
from jaxrl.runtime import compilers, hardware, roofline
from models.config import DecoderConfig
from models.pages import BLOCK
from models.table import matrix_elements

QWEN3_8B = DecoderConfig(
    vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_layers=36, num_heads=32, num_kv_heads=8,
    head_dim=128, qk_norm=True, tie_embeddings=False, model_type="qwen3", max_position_embeddings=40960,
)  # fmt: skip
CHIPS, BYTES = 4, 2
PUBLISHED = {(256, 1024, 1024): (7572, 4051), (64, 8192, 1024): (1459, 874)}  # requests, prompt, answer: tokens/s

MAXTEXT = 0.45  # MFU, Llama-3.1-8B on v6e-8


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


def _rows(config, names: tuple[str, ...]) -> tuple[dict[str, preflight.Row], DecoderConfig]:
    """Those programs of a config, compiled for its topology."""
    config.model.path = ""
    target, decoder = compilers.target(config.topology), build.decoder_config(config)
    found = preflight.programs(config, decoder, build.mesh(config, target.devices))
    return {p.name: preflight.check(p, target.chip) for p in found if p.name in names}, decoder


def compiled_sampling(requests: int, prompt: int, answer: int) -> float:
    """Answer tokens/s as `expected`, from the compiled prefill and decode programs. A decode step takes the compiled
    one's time, whose cache is full, in proportion to the bytes that it reads."""
    shape = {k: getattr(QWEN3_8B, k) for k in LLAMA_3_1_8B if hasattr(QWEN3_8B, k)} | dict(rms_norm_eps=1e-6)
    c = pod("qwen3_8b", "Qwen3-8B", shape | dict(qk_norm=True), prompt, answer)
    c.topology, c.optimizer.state_dtype = "v6e:2x2", "bfloat16"
    c.sampling.slots, c.sampling.tensor, c.sampling.pages = requests, CHIPS, 64
    c.sampling.cache_tokens = requests * (prompt + answer)
    c.batch.prompts, c.batch.group_size = requests, 1
    rows, _ = _rows(c, ("prefill", "decode"))
    calls, decode = rows["prefill"].program.calls, rows["decode"]
    prefill = rows["prefill"].seconds * calls
    cache, total = decode.program.cache, decode.compiled.arguments
    share = (total - cache + cache * (prompt + answer / 2) / (prompt + answer)) / total
    return requests * answer / (prefill + answer * decode.seconds / c.sampling.chunk * share)


def compiled_training() -> tuple[float, float]:
    """(MFU, GiB a chip) of an update of Llama-3.1-8B: recomputation counts as time, not as work."""
    c = pod("llama31_8b", "Llama-3.1-8B", LLAMA_3_1_8B, 4096, 4096)
    c.topology, c.batch.row_tokens, c.batch.micro_tokens = "v6e:2x4", 8192, 3 * 8192
    rows, decoder = _rows(c, ("update",))
    update, chip = rows["update"], hardware.chip("tpu v6")
    flops = 3 * hardware.model_flops_per_token(decoder, c.batch.row_tokens / 2) * update.program.tokens
    return flops / (8 * update.seconds * chip.flops), update.needed / hardware.GIB


def main() -> None:
    if "--compile" in sys.argv:
        for work, published in PUBLISHED.items():
            rate = compiled_sampling(*work)
            print(f"{work}: published {published}, by the compiler {rate:,.0f} tokens/s", flush=True)
        mfu, needed = compiled_training()
        print(f"Llama-3.1-8B on v6e-8: published {MAXTEXT:.0%} MFU, by the compiler {mfu:.0%}, {needed:.1f} GiB a chip")
        return
    print(f"{'work':<20}{'SGLang-JAX':>12}{'vLLM':>8}{'expected here':>15}{'of it prefill':>15}{'twice as long':>15}")
    for work, (sglang, vllm) in PUBLISHED.items():
        rate, prefill, decode = expected(*work)
        name = "{} x ({} + {})".format(*work)
        print(f"{name:<20}{sglang:>12,}{vllm:>8,}{rate:>15,.0f}{prefill / (prefill + decode):>15.0%}{rate / 2:>15,.0f}")


if __name__ == "__main__":
    main()
