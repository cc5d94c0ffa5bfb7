"""What sampling replay changes in truncated runs: the quickstart at temperature 0.7 and top-p 0.9, with and without.

    python benchmarks/sampling_replay.py [--out=runs/sampling_replay] [--seeds=5]

Pairs of runs with the same warm start and seed, 30 steps of four updates. "bias": the mean of ratio less 1 over the
tokens of a run's updates, which is 0 if the ratio is to the distribution that the tokens were drawn from. Means over
the runs' steps and seeds with 95 % t intervals; the last line of each is the paired difference. A finished run is not
run again.
"""

import argparse
import json
import pathlib

import numpy as np

from configs.quickstart import get_config
from configs.studies.dial import COMMON
from jaxrl.evaluation.seeds import mean_and_half
from jaxrl.train import train

TRUNCATED = {"sampling.temperature": 0.7, "sampling.top_p": 0.9}
TRUNCATED |= {"algorithm.loss": "grpo", "batch.generation_prompts": 16}
MEANS = {"bias of the ratio": "ratio/mean", "largest ratio": "ratio/max", "clipped above": "clip_fraction/high"}
ENDS = {"entropy at the end": "entropy", "held-out accuracy": "eval/accuracy", "tokens a response": "eval/mean_tokens"}


def measure(where: pathlib.Path, seed: int, replay: bool) -> dict[str, float]:
    """The figures of one run in `where`, which is made unless it is finished."""
    config = get_config()
    changes = {"sampling.replay": replay, "seed": seed, "run_dir": str(where)}
    config.update_from_flattened_dict(COMMON | TRUNCATED | changes)
    metrics = where / "metrics.jsonl"
    if not metrics.exists() or f'"step": {config.steps},' not in metrics.read_text():
        train(config)
    rows = [row for row in map(json.loads, metrics.read_text().splitlines()) if row["step"] > 0]
    found = {title: float(np.mean([row[key] for row in rows])) for title, key in MEANS.items()}
    found["bias of the ratio"] -= 1
    return found | {title: rows[-1][key] for title, key in ENDS.items()}


def main():
    options = argparse.ArgumentParser()
    options.add_argument("--out", default="runs/sampling_replay")
    options.add_argument("--seeds", type=int, default=5)
    args = options.parse_args()
    names = {"whole": False, "replayed": True}
    found = {
        name: [measure(pathlib.Path(args.out, name, f"seed{seed}"), seed, replay) for seed in range(args.seeds)]
        for name, replay in names.items()
    }
    for title in (*MEANS, *ENDS):
        columns = {name: np.array([run[title] for run in runs]) for name, runs in found.items()}
        columns["difference"] = columns["replayed"] - columns["whole"]
        print(f"{title:26}" + "".join("  {} {:9.5f} ± {:.5f}".format(n, *mean_and_half(v)) for n, v in columns.items()))


if __name__ == "__main__":
    main()
