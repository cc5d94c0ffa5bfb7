"""A model of the rollout that needs no chip: real lengths through the engine's own scheduler, times what a step reads.

    python benchmarks/rollout_model.py --config=configs/pods/lspo_qwen25_math_7b.py --hosts=1
    python benchmarks/rollout_model.py --config=configs/quickstart.py --lengths=RUN_DIR
    python benchmarks/rollout_model.py --config=configs/smollm2.py:grpo --measured=RUN_DIR

Prints for answers log-normal around a quarter of the limit (and cut there), around half of it, all of the limit, and
for those that a run recorded: decode steps, the share of slots that draw a token, and the columns of cache that
decoding reads, divided by the sum of the contexts. For times, see preflight: it multiplies the same calls by the
compiled programs' times.

--measured compares the model with a run: what a decode step costs is taken from the first half of the run's steps, and
the rollout seconds of the second half are predicted from their lengths alone.
"""

from __future__ import annotations

import json
import math
import pathlib

import numpy as np

from jaxrl.errors import UserError
from jaxrl.rollout.replay import log_normal, replay
from jaxrl.runtime import cli
from jaxrl.runtime.config import parse_config


def recorded(path: str, shape: tuple[int, int], limit: int) -> np.ndarray:
    """int [problems, samples] drawn from the lengths that a run's samples name. Raises UserError if there are none."""
    files = sorted(pathlib.Path(path).glob("samples/*.jsonl"))
    lengths = [json.loads(line)["length"] for file in files for line in file.read_text().splitlines()]
    if not lengths:
        raise UserError(f"{path}: no samples/*.jsonl")
    return np.minimum(np.random.default_rng(0).choice(lengths, shape), limit)


def validate(run: str, shape: tuple[int, int], sizes: dict, prompt: int) -> None:
    """Prints measured and predicted rollout seconds of the second half of a run's steps."""
    records = [json.loads(line) for line in (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()]
    records = [r for r in records if "time/rollout" in r and "hist/length" in r][1:]  # the first one compiles
    if len(records) < 6:
        raise UserError(f"--measured={run}: needs at least seven steps")
    rng, steps, seconds = np.random.default_rng(0), [], np.array([r["time/rollout"] for r in records])
    for record in records:
        edge, count = np.array(record["hist/length"]).T  # upper edges
        middle = np.maximum(edge - np.diff(edge).min(initial=sizes["max_tokens"]) // 2, 1)
        lengths = rng.permutation(np.repeat(middle, count))[: math.prod(shape)].reshape(shape)
        steps.append(replay(lengths, [prompt] * shape[0], **sizes).stats.steps)
    steps, half = np.array(steps, float), len(records) // 2
    cost = seconds[:half].sum() / steps[:half].sum()
    for record, measured, predicted in zip(records[half:], seconds[half:], cost * steps[half:], strict=True):
        print(f"step {record['step']:4}  measured {measured:7.1f} s  predicted {predicted:7.1f} s")
    error = cost * steps[half:] / seconds[half:] - 1
    print(f"{1e3 * cost:.0f} ms a decode step, prefill included; a step's error {np.abs(error).mean():.1%} on average, "
          f"{cost * steps[half:].sum() / seconds[half:].sum() - 1:+.1%} of all")


def main(argv: list[str]) -> None:
    flags = cli.parse_flags(argv, dict(config=str, lengths="", measured="", hosts=1, replicas=1, slots=0), __doc__)
    config = parse_config(["", f"--config={flags['config']}"])
    b, s = config.batch, config.sampling
    shape = (math.ceil((b.generation_prompts or b.prompts) / flags["hosts"]), b.group_size)
    kinds = {"log-normal, median a quarter": log_normal(shape, s.max_tokens, 0.25, 0.9),
             "log-normal, mean half": log_normal(shape, s.max_tokens, 0.43, 0.75),
             "all the limit": np.full(shape, s.max_tokens)}  # fmt: skip
    if flags["lengths"]:
        kinds["recorded"] = recorded(flags["lengths"], shape, s.max_tokens)
    sizes = dict(slots=flags["slots"] or s.slots, chunk=s.chunk, window=s.window, max_prompt=s.max_prompt)
    sizes |= dict(max_tokens=s.max_tokens, multiple=flags["replicas"])
    if flags["measured"]:
        return validate(flags["measured"], shape, sizes, s.max_prompt // 2)
    print(f"{shape[0] * shape[1]:,} answers on {sizes['slots']} slots of a host")
    print(f"{'lengths':<30}{'mean':>7}{'steps':>9}{'slots drawing':>15}{'read/contexts':>15}{'resizes':>9}")
    for name, lengths in kinds.items():
        found = replay(lengths, [s.max_prompt // 4] * shape[0], **sizes)
        print(f"{name:<30}{lengths.mean():7.0f}{found.stats.steps:9,}{found.stats.utilisation:15.2f}"
              f"{found.read / found.contexts:15.2f}{len(found.of('resize')) // 2:9,}", flush=True)  # fmt: skip


if __name__ == "__main__":
    cli.run(main)
