"""What int8 weights and an int8 cache do to a trained model's probabilities, and to a TPU's decode step.

    python benchmarks/int8.py --model=DIR [--samples=64] [--tokens=200]
    python benchmarks/int8.py --config=configs/pods/l1_r1_distill_1_5b.py

--model, a Hugging Face directory, on this machine in float32: each form samples from the model's first token on and
reports log-probs; they are compared with those that the exact model gives to the same tokens, as the learner does.
Greedy: the share of 512 prompts, beginnings of exact samples, whose likeliest next token is the exact model's.

--config, a pod: its decode step compiled for its slice, nothing runs. Bytes of main memory that a step reads and
writes on one chip, the least possible (weights and the whole cache once), the memory of the chip that is needed, and
the compiler's estimate of the time.
"""

from __future__ import annotations

import itertools

import jax
import numpy as np

from jaxrl import build, preflight
from jaxrl.errors import UserError
from jaxrl.rollout.engine import Engine, Request, SamplingParams
from jaxrl.runtime import cli, compilers
from jaxrl.runtime.config import parse_config
from models.config import from_hf
from models.weights import load_params

FORMS = list(itertools.product(("same", "int8"), repeat=2))  # weights, cache


def accuracy(directory: str, samples: int, tokens: int) -> None:
    config, prompt = from_hf(directory), np.array([1], np.int32)
    params = load_params(directory, config)
    longest = dict(max_prompt=tokens, max_tokens=tokens, slots=64)
    exact = Engine(config, (2,), **longest)
    laid_out = exact.layout(params)
    begun = exact.generate(laid_out, [Request(prompt, samples, tokens, 0)], seed=0)[0]
    rng = np.random.default_rng(0)
    texts = [np.concatenate([prompt, begun[i % samples].tokens]) for i in range(512)]
    questions = [Request(t[: rng.integers(1, len(t))], 1, 1, i) for i, t in enumerate(texts)]
    print(f"{'weights':>8}{'cache':>7}{'|log-prob|':>12}{'largest':>9}{'greedy':>8}")
    expected = None
    for weights, cache in FORMS:
        sampler = Engine(config, (2,), **longest, weights=weights, cache=cache)
        own = sampler.layout(params)
        drawn = sampler.generate(own, [Request(prompt, samples, tokens, 0)], seed=1)[0]
        scored = exact.prompt_logprobs(laid_out, [np.concatenate([prompt, c.tokens]) for c in drawn])
        gap = np.abs(np.concatenate([c.logprobs - s for c, s in zip(drawn, scored, strict=True)]))
        best = [g[0].tokens[0] for g in sampler.generate(own, questions, seed=0, sampling=SamplingParams(0.0))]
        expected = best if expected is None else expected
        agree = np.mean(np.array(best) == np.array(expected))
        print(f"{weights:>8}{cache:>7}{gap.mean():12.5f}{gap.max():9.3f}{agree:8.3f}   {len(gap)} tokens", flush=True)


def traffic(flag: str) -> None:
    print(f"{'weights':>8}{'cache':>7}{'GB a step':>11}{'least':>8}{'GiB':>8}{'ms':>8}")
    for weights, cache in FORMS:
        config = parse_config(["", f"--config={flag}"])
        config.model.path, config.sampling.weights, config.sampling.cache = "", weights, cache
        target = compilers.target(config.topology)
        decoder, mesh = build.decoder_config(config), build.mesh(config, target.devices)
        program = next(p for p in preflight.programs(config, decoder, mesh) if p.name == "decode")
        row = preflight.check(program, target.chip)
        embedding = 0 if decoder.tie_embeddings else 2 * decoder.vocab_size * decoder.hidden_size  # a few rows are read
        least = row.compiled.arguments - embedding / config.sampling.tensor
        figures = (row.compiled.counts.bytes / program.trips / 1e9, least / 1e9, row.needed / preflight.GIB)
        ms = f"{1e3 * row.seconds / program.trips:8.1f}" if row.seconds else "       -"
        print(f"{weights:>8}{cache:>7}{figures[0]:11.2f}{figures[1]:8.2f}{figures[2]:8.2f}{ms}", flush=True)


def main(argv: list[str]) -> None:
    flags = cli.parse_flags(argv, dict(model="", config="", samples=64, tokens=200), __doc__)
    if bool(flags["model"]) == bool(flags["config"]):
        raise UserError("give --model=DIR or --config=configs/pods/FILE.py")
    jax.config.update("jax_platforms", "cpu")
    if flags["model"]:
        accuracy(flags["model"], flags["samples"], flags["tokens"])
    else:
        traffic(flags["config"])


if __name__ == "__main__":
    cli.run(main)
