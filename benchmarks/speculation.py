"""Could n-gram speculation make the sampler faster? Measured without building it.

    python benchmarks/speculation.py --model=runs/quickstart --config=configs/quickstart.py
    python benchmarks/speculation.py --model=DIR_OF_STORIES260K --max_tokens=256
    python benchmarks/speculation.py                          # only what a longer decode call costs

1. Completions are sampled at temperature 1, in groups of 8, and read back: at each point the drafter looks up the last
   2 to 4 tokens in the text so far and in siblings, and proposes the K tokens that followed. What it would have got
   right is counted exactly, since accepting the drawn token when it equals the proposed one leaves the distribution as
   it is: tokens per verifying call = 1 + accepted. Siblings: "none"; "finished", those that have ended by then if all
   began together, as they do when the slots hold the group; "all", as if the others had been sampled before.
2. A verifying call decodes T = K + 1 tokens a row. Speculation pays if the tokens per call exceed the ratio of its time
   to that of T = 1, at batch 8 and 32. Rows would also leave the shared clock, which is not charged here.

CPU seconds of one core, so other load does not matter much; --rounds=0 leaves step 2 out.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

DEFAULTS = dict(model="", config="", max_tokens=0, groups=32, seed=0, rounds=7)
DRAFTS, BATCHES, GROUP, WINDOW, SIBLINGS = (1, 3, 7), (8, 32), 8, 320, ("none", "finished", "all")


def completions(flags):
    """[(prompt, [tokens of each sample])] at temperature 1."""
    import numpy as np

    from jaxrl.rollout.engine import Engine, Request
    from jaxrl.runtime.config import parse_config
    from jaxrl.runtime.model_source import load_model
    from jaxrl.tasks.load import open_task

    config, params, tokenizer = load_model(flags["model"])
    limit, prompts = flags["max_tokens"], [np.array([tokenizer.bos_id or 1], np.int32)] * flags["groups"]
    if flags["config"]:
        run = parse_config(["", f"--config={flags['config']}"])
        limit = limit or run.sampling.max_tokens
        with open_task(run, tokenizer) as task:
            prompts = [np.array(task.encode(task.train[i]), np.int32) for i in range(flags["groups"])]
    sampler = Engine(config, tokenizer.eos_ids, max_prompt=max(map(len, prompts)), max_tokens=limit, slots=32)
    requests = [Request(p, GROUP, limit, i) for i, p in enumerate(prompts)]
    out = sampler.generate(sampler.layout(params), requests, seed=flags["seed"])
    return [(p.tolist(), [c.tokens.tolist() for c in group]) for p, group in zip(prompts, out, strict=True)]


def calls_needed(prompt, completion, siblings, draft: int, which: str) -> int:
    """Verifying calls that draw `completion`, each with up to `draft` proposed tokens."""
    places: dict[tuple, tuple] = {}  # n-gram -> (text, position after it), the latest one

    def learn(text, end):
        for n in (2, 3, 4):
            if end >= n:
                places[tuple(text[end - n : end])] = (text, end)

    waiting = sorted(siblings, key=len, reverse=True) if which != "none" else []
    own, calls = prompt + completion, 0
    for end in range(1, len(prompt)):
        learn(own, end)
    at = len(prompt)
    while at < len(own):
        while waiting and (which == "all" or len(waiting[-1]) <= at):
            text = waiting.pop()
            for end in range(1, len(text)):
                learn(text, end)
        found = next((places[k] for n in (4, 3, 2) if (k := tuple(own[max(at - n, 0) : at])) in places), None)
        right = 0
        if found:
            text, place = found
            proposed = text[place : min(place + draft, at if text is own else len(text))]
            right = next((i for i, t in enumerate(proposed) if own[at + i : at + i + 1] != [t]), len(proposed))
        for end in range(at, at + right + 1):
            learn(own, end)
        at, calls = at + right + 1, calls + 1
    return calls


def tokens_per_call(groups, draft: int, which: str) -> float:
    tokens = calls = 0
    for prompt, samples in groups:
        for i, completion in enumerate(samples):
            siblings = [prompt + s for j, s in enumerate(samples) if j != i]
            calls += calls_needed(prompt, completion, siblings, draft, which)
            tokens += len(completion)
    return tokens / calls


def call_costs(shape: str, batch: int, rounds: int) -> dict[int, float]:
    """Median over rounds of CPU seconds of a decode call with T tokens a row, sampling included: {T: seconds}."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from benchmarks.sampler import SHAPES
    from jaxrl.rollout.sampling import draw
    from models.config import DecoderConfig
    from models.decoder import Decoder, empty_cache, init_params, logits
    from models.layout import sampling_layout

    config = DecoderConfig(**SHAPES[shape], head_dim=64, qk_norm=True, tie_embeddings=True, model_type="qwen3")
    params = sampling_layout(init_params(config, jax.random.key(0)), config, jnp.float32, untie=True)
    model = Decoder(config, scan_layers=False)
    cache = empty_cache(config, batch, WINDOW, jnp.float32, key_blocks=True)

    def step(params, cache, tokens, u):
        T = tokens.shape[1]
        positions = jnp.broadcast_to(jnp.arange(T) + WINDOW // 2, (batch, T))
        hidden, cache = model.apply({"params": params}, tokens, positions, None, cache)
        z = logits(params, hidden.reshape(batch * T, -1))
        return draw(z, u, jnp.ones(batch * T))[0], cache.replace(end=jnp.int32(WINDOW // 2))

    programs = {}
    for T in (1, *(k + 1 for k in DRAFTS)):
        tokens, u = np.zeros((batch, T), np.int32), np.full((batch * T, 2), 0.5, np.float32)
        call = jax.jit(step, donate_argnums=1)
        _, cache = call(params, cache.replace(end=jnp.int32(WINDOW // 2)), tokens, u)
        programs[T] = call, tokens, u
    seconds: dict[int, list[float]] = {T: [] for T in programs}
    for _ in range(rounds):
        for T, (call, tokens, u) in programs.items():
            begin = time.process_time()
            for _ in range(4):
                out, cache = call(params, cache, tokens, u)
            jax.block_until_ready((out, cache))
            seconds[T].append((time.process_time() - begin) / 4)
    return {T: statistics.median(s) for T, s in seconds.items()}


def main(argv: list[str]) -> None:
    from jaxrl.runtime import cli

    flags = cli.parse_flags(["", *argv], DEFAULTS, __doc__)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    if flags["model"]:
        groups = completions(flags)
        lengths = [len(s) for _, samples in groups for s in samples]
        print(f"{len(lengths)} completions of {statistics.mean(lengths):.1f} tokens; tokens per call by T:")
        gains = {w: {k + 1: round(tokens_per_call(groups, k, w), 2) for k in DRAFTS} for w in SIBLINGS}
        print("\n".join(f"  siblings {w}: {gain}" for w, gain in gains.items()))
    for shape in ("small", "large") if flags["rounds"] else ():
        for batch in BATCHES:
            costs = call_costs(shape, batch, flags["rounds"])
            ratios = {T: round(s / costs[1], 2) for T, s in costs.items() if T > 1}
            line = f"{shape} batch {batch}: T=1 takes {1e3 * costs[1]:.1f} ms; a call costs by T: {ratios} x"
            if flags["model"]:
                for w, gain in gains.items():
                    line += f"\n  speed-up, siblings {w}: {({T: round(gain[T] / r, 2) for T, r in ratios.items()})}"
            print(line, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    main(sys.argv[1:])
