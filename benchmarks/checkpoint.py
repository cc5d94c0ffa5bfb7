"""What a checkpoint costs: python benchmarks/checkpoint.py [--millions=10] [--dir=DIR]

Parameters in float32 with Adam's two moments (12 bytes a parameter; random, so that they do not compress). Prints, as
medians of five saves: how long the training loop waits, how long until the checkpoint is committed (written, flushed,
digested, renamed), its size, and how long a restore takes with every digest compared.
"""

import argparse
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
import optax

from jaxrl.runtime.checkpoint import Checkpointer


def state(millions: float):
    layers = 8
    rows = max(1, int(millions * 1e6 / layers / 512))
    params = {f"layer{i}": jax.random.normal(jax.random.key(i), (rows, 512)) for i in range(layers)}
    opt = optax.adamw(1e-3).init(params)
    opt = jax.tree.map(lambda x: x + jax.random.normal(jax.random.key(9), x.shape) if x.ndim else x, opt)
    return jax.block_until_ready({"params": params, "opt": opt, "step": jnp.int32(0)})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--millions", type=float, default=10.0)
    parser.add_argument("--dir", default=None)
    args = parser.parse_args()
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
