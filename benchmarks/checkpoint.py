r"""What a checkpoint costs: python benchmarks/checkpoint.py [--millions=10] [--dir=DIR] | --run=RUN_DIR

Parameters in float32 with Adam's two moments (12 bytes a parameter; random, so that they do not compress). Prints, as
medians of five saves: how long the training loop waits, how long until the checkpoint is committed (written, flushed,
digested, sealed), its size, and how long a restore takes with every digest compared.

With --run it reads the metrics of a run that saved every second step and shows the costs inside that run: how long
the loop waited for a save, and how much longer the steps were that had a save going on behind them:

    python -m jaxrl.train --config=configs/quickstart.py --config.run_dir=RUN_DIR --config.sft.steps=0 \
        --config.sft.full_steps=0 --config.steps=24 --config.eval.every=100 --config.checkpoint.every=2
    python benchmarks/checkpoint.py --run=RUN_DIR
"""

import argparse
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import optax

from jaxrl.runtime.checkpoint import Checkpointer
from jaxrl.runtime.metrics import read_metrics


def state(millions: float):
    layers = 8
    rows = max(1, int(millions * 1e6 / layers / 512))
    params = {f"layer{i}": jax.random.normal(jax.random.key(i), (rows, 512)) for i in range(layers)}
    opt = optax.adamw(1e-3).init(params)
    opt = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(9), x.shape) if x.ndim else x, opt)
    return jax.block_until_ready({"params": params, "opt": opt, "step": jnp.int32(0)})


def costs_in_run(run: str, skip: int = 4):
    """Prints the costs of saving as shares of the step time; the first `skip` steps compile."""
    records = [r for r in read_metrics(f"{run}/metrics.jsonl") if skip < r["step"]]
    behind, without = ([r["time/step"] for r in records if r["step"] % 2 == odd] for odd in (1, 0))
    waited = statistics.median(r["perf/checkpoint_blocking_seconds"] for r in records)
    committed = statistics.median(r["perf/checkpoint_seconds"] for r in records)
    step, slower = statistics.median(without), statistics.median(behind) - statistics.median(without)
    print(f"{len(records)} steps of {step:.2f} s (median; {statistics.median(behind):.2f} s with a save of "
          f"{records[-1]['perf/checkpoint_bytes'] / 1e6:.1f} MB behind it): a save holds the loop for {waited:.3f} s "
          f"({waited / step:.1%} of a step), is committed after {committed:.2f} s and slows the next step by "
          f"{slower:.2f} s; together {(waited + slower) / (20 * step):.2%} of the time at one save in 20 steps")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, default=10.0)
    parser.add_argument("--dir", default=None)
    parser.add_argument("--run", default=None)
    args = parser.parse_args()
    if args.run:
        return costs_in_run(args.run)
    tree = state(args.millions)
    with tempfile.TemporaryDirectory(dir=args.dir) as directory, Checkpointer(directory, keep_last=1) as saver:
        timings = []
        for step in range(6):  # the first one warms up
            saver.save(step, tree, {})
            saver.wait()
            timings.append(saver.timings)
        waited, committed, size = (statistics.median(t[f"perf/checkpoint_{k}"] for t in timings[1:])
                                   for k in ("blocking_seconds", "seconds", "bytes"))
        start = time.perf_counter()
        jax.block_until_ready(saver.restore(tree).arrays)
        restored = time.perf_counter() - start
    print(f"{args.millions:g} M parameters, {size / 1e6:.1f} MB: the loop waits {waited:.3f} s, "
          f"committed after {committed:.2f} s, restored in {restored:.2f} s")


if __name__ == "__main__":
    main()
