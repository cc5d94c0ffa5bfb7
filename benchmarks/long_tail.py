"""What prefetch and carry-over do to slot utilisation and to the longest wait, on log-normal lengths.

    python benchmarks/long_tail.py --slots=64

Steps of 16 prompts x 8 samples, lengths log-normal (median 32, sigma 0.9) and cut at 256, a 5k-parameter model: it
measures how many decode steps the slots run, not how fast they are. The collector's own rules decide what runs when.

    plain       each step samples its prompts and waits for the longest answer
    prefetch    config.sampling.prefetch: the next step's prompts run in slots that idle meanwhile
    carry_over  config.sampling.carry_over=64: a generation batch ends after 64 tokens; unfinished answers go on later
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import numpy as np

from jaxrl.collect import Collector
from jaxrl.rollout.engine import Engine
from jaxrl.runtime import cli
from jaxrl.runtime.config import base_config
from jaxrl.tasks.task import Grade, Task
from jaxrl.types import Problem
from models.config import DecoderConfig
from models.decoder import init_params

LIMIT, PROMPT = 256, 16
MODES = {"plain": {}, "prefetch": {"sampling.prefetch": True},
         "carry_over": {"sampling.carry_over": 64, "batch.keep_surplus": True, "batch.max_generation_batches": 0},
         "both": {"sampling.carry_over": 64, "batch.keep_surplus": True, "batch.max_generation_batches": 0,
                  "sampling.prefetch": True}}  # fmt: skip


class Lengths(Engine):
    """A sampler whose completions end at given lengths, a function of problem and sample."""

    def generate(self, params, requests, **options):
        ends = [[length(r.key, r.first_sample + i) for i in range(r.samples)] for r in requests]
        most = [[min(n - r.done, int(m)) for n, m in zip(e, r.limits, strict=True)]
                for r, e in zip(requests, ends, strict=True)]  # fmt: skip
        given = [dataclasses.replace(r, max_tokens=m) for r, m in zip(requests, most, strict=True)]
        out = super().generate(params, given, **options)
        self.counts += np.array([self.stats.tokens, self.stats.steps, self.stats.slot_steps])
        done = lambda c, r, n: c.finish == "length" and r.done + c.length == n  # noqa: E731
        return [[dataclasses.replace(c, finish="eos") if done(c, r, n) else c for c, n in zip(group, e, strict=True)]
                for group, r, e in zip(out, requests, ends, strict=True)]  # fmt: skip


def length(key: int, sample: int) -> int:
    return int(np.exp(np.random.default_rng([key, sample]).normal(np.log(32), 0.9)).clip(1, LIMIT))


def main(argv: list[str]) -> None:
    flags = cli.parse_flags(["", *argv], dict(slots=64, steps=12, chunk=32), __doc__)
    model = DecoderConfig(32, 16, 32, 1, 2, 1, 8, tie_embeddings=True, model_type="qwen3")
    params = init_params(model, jax.random.key(0))
    problems = [Problem(str(i), "", "") for i in range(1000)]
    rng = np.random.default_rng(0)
    prompts = {p.id: rng.integers(1, 32, PROMPT).tolist() for p in problems}
    task = Task(problems, [], lambda p: prompts[p.id], lambda ps, ts: [Grade(1.0, 1.0, True, "correct") for _ in ts])
    tokenizer = type("Tokenizer", (), {"decode": lambda self, tokens: ""})()
    for name, changes in MODES.items():
        config = base_config()
        config.sampling.max_tokens, config.batch.prompts, config.batch.group_size = LIMIT, 16, 8
        config.update_from_flattened_dict(changes)
        sampler = Lengths(model, (-1,), max_prompt=PROMPT, max_tokens=LIMIT, slots=flags["slots"], chunk=flags["chunk"])
        sampler.counts = np.zeros(3)
        collector, rows, trained = Collector(config, task, tokenizer, sampler), [], []
        laid_out = sampler.layout(params)
        for step in range(flags["steps"]):
            if step == flags["steps"] // 3:  # the first steps fill the pipeline
                sampler.counts[:], rows, trained = 0, [], []
            got = collector.collect(laid_out, step)
            rows.append(got.metrics)
            trained += got.chosen.lengths.tolist()
        tokens, steps, slot_steps = sampler.counts / len(rows)
        stale = np.mean([r["selection/stale_tokens"] for r in rows])
        print(f"{name:10} utilisation {tokens / slot_steps:.3f}; a step: {steps:.0f} decode steps, {slot_steps:.0f} "
              f"slot-steps, {len(trained) / len(rows):.0f} answers of {np.mean(trained):.1f} tokens (at most "
              f"{max(trained)}) trained on, {stale:.0%} of the tokens stale", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
