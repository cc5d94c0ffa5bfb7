"""Log-probs of learner and sampler in a mixture of experts: with the learner's own routing, and with the sampler's.

    python benchmarks/router_replay.py

A random Qwen3-MoE (4 layers, 16 experts, 4 a token), 32 answers of 64 tokens sampled in bfloat16, scored by a learner
in float32 or bfloat16 with the same parameters. "clipped": tokens whose ratio lies outside 0.8 to 1.2.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl.learner.learner import Learner
from jaxrl.learner.packing import PackSettings, pack
from jaxrl.rollout.engine import Engine, Request
from jaxrl.rollouts import Prompt, begin
from jaxrl.runtime.config import base_config
from jaxrl.runtime.mesh import make_mesh
from jaxrl.types import Problem
from models.config import DecoderConfig
from models.decoder import init_params

MODEL = DecoderConfig(
    512, 128, 256, 4, 4, 2, 32, model_type="qwen3_moe", init_std=0.12, qk_norm=True, num_experts=16,
    experts_per_token=4, expert_size=64, normalise_experts=True,
)
PROMPT, TOKENS, PROMPTS, GROUP = 12, 64, 8, 4


def sample(params, seed: int):
    """Rollouts drawn in bfloat16, with their experts."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(1, MODEL.vocab_size, PROMPT).astype(np.int32) for _ in range(PROMPTS)]
    engine = Engine(MODEL, (0,), max_prompt=16, max_tokens=TOKENS, slots=PROMPTS * GROUP, chunk=16, dtype=jnp.bfloat16,
                    record=("experts",))
    requests = [Request(p, GROUP, TOKENS, i) for i, p in enumerate(prompts)]
    drawn = engine.generate(engine.layout(params), requests, seed=1)
    rows = begin(Prompt(Problem(str(i), "", ""), p, GROUP, i) for i, p in enumerate(prompts))
    rows = rows.extend([c for group in drawn for c in group], 0, TOKENS)
    return rows.replace(valid=np.ones(len(rows), bool))


def difference(params, rows, dtype: str, replay: bool) -> np.ndarray:
    """The learner's log-prob of each token less the sampler's."""
    config = base_config()
    config.sampling.router_replay, config.model.dtype = replay, dtype
    learner = Learner(config, MODEL, make_mesh(devices=jax.devices()[:1]))
    batch, packing = pack(rows, np.ones(len(rows)), PackSettings(128, 1024, experts=replay))
    return packing.collect(learner.score(params, batch)) - rows.logprobs


def main():
    print("seed  learner   experts   mean |difference|   largest   clipped %")
    for seed in range(3):
        params = init_params(MODEL, jax.random.key(seed))
        rows = sample(params, seed)
        for dtype in ("float32", "bfloat16"):
            for replay in (False, True):
                d = difference(params, rows, dtype, replay)
                ratio = np.exp(d)
                clipped = 100 * np.mean((ratio > 1.2) | (ratio < 0.8))
                name = "replayed" if replay else "its own"
                print(f"{seed:4}  {dtype:8}  {name:8} {np.abs(d).mean():12.4f} {np.abs(d).max():14.3f} {clipped:11.2f}",
                      flush=True)


if __name__ == "__main__":
    main()
