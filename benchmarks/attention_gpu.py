"""Attention of packed rows in training, compiled for a GPU that is not here: the default (cuDNN) and `triton`.

    python benchmarks/attention_gpu.py [--topology=h100:1]        # with the GPU compiler (docs/performance.md, "GPUs")

Printed: memory of the gradient with respect to queries, keys and values, arguments and results included, in bfloat16.
cuDNN takes segment ids as a bias of one number per pair of tokens; Triton's kernel compares ids itself, but needs as
many key-value heads as query heads. Neither runs, so nothing is said about speed: the compiler does not count the
operations of a Triton kernel, which skips blocks above the diagonal.
"""

from __future__ import annotations

import functools
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.runtime import cli, compilers
from models.attention import attend_packed

SHAPES = {
    "7B, 4 rows of 4,096": (4, 4096, 28, 4, 128),
    "1.5B, 2 rows of 8,192": (2, 8192, 12, 2, 128),
    "7B, 1 row of 32,768": (1, 32768, 28, 4, 128),
}


def main(argv: list[str]) -> None:
    flags = cli.parse_flags(argv, dict(topology="h100:1"), __doc__)
    jax.config.update("jax_platforms", "cpu")
    mesh = Mesh(np.array(compilers.target(flags["topology"]).devices[:1]), ("x",))
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
    for name, (B, T, N, K, H) in SHAPES.items():
        wide, narrow = (shape((B, T, heads, H), jnp.bfloat16) for heads in (N, K))
        for form in ("cudnn", "triton"):
            attend = functools.partial(attend_packed, implementation=form)
            loss = lambda q, k, v, ids, f=attend: jnp.sum(f(q, k, v, ids).astype(jnp.float32) ** 2)  # noqa: E731
            lowered = jax.jit(jax.grad(loss, (0, 1, 2))).lower(wide, narrow, narrow, shape((B, T), jnp.int32))
            needed = compilers.compile_program(lowered, 1, ()).needed
            print(f"{name:24}{form:12}{needed / 2**20:6.0f} MiB", flush=True)


if __name__ == "__main__":
    cli.run(main)
