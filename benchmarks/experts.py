"""Grouped products of a mixture of experts, compiled for chips that are not here: lax.ragged_dot and what runs instead.

    python benchmarks/experts.py --topology=v6e:2x2       # v5e, v5p: pip install libtpu
    python benchmarks/experts.py --topology=h100:1        # with the GPU compiler (docs/performance.md, "GPUs")

One device: 65,536 rows of 2,048, as many for each of 16 experts with matrices of 2,048 x 768 (those of
Qwen3-30B-A3B), in bfloat16, forward and backward. Printed: memory with arguments and results, TFLOP, and seconds as
`jaxrl.preflight` counts them; beside it what the mathematics needs.
"""

from __future__ import annotations

import functools
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxrl.runtime import cli, compilers, hardware, roofline
from models import moe, moe_gpu

ROWS, D, F, EXPERTS = 65536, 2048, 768, 16


def ragged(x, w, sizes):
    return lax.ragged_dot(x, w, sizes)


def megablox(x, w, sizes):
    return moe._megablox(x, w, sizes, total=EXPERTS)


def blocks(x, w, sizes):
    """Rows that already lie in whole blocks."""
    arranged, _ = moe_gpu.arrange(sizes, ROWS - EXPERTS * moe_gpu.MOST, moe_gpu.MOST)
    return moe_gpu.grouped_product(x, w, arranged)


def main(argv: list[str]) -> None:
    flags = cli.parse_flags(argv, dict(topology="v6e:2x2"), __doc__)
    jax.config.update("jax_platforms", "cpu")
    target = compilers.target(flags["topology"])
    placed = NamedSharding(Mesh(np.array(target.devices[:1]), ("x",)), PartitionSpec())
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=placed)
    args = shape((ROWS, D), jnp.bfloat16), shape((EXPERTS, D, F), jnp.bfloat16), shape((EXPERTS,), jnp.int32)
    work = 3 * 2.0 * ROWS * D * F
    print(f"needed: {work / 1e12:.2f} TFLOP, {1e3 * work / target.chip.flops:.2f} ms at the peak of {target.chip.name}")
    for form in (ragged, blocks if not target.chip.clock else megablox):

        def loss(x, w, sizes, form=form):
            with jax.named_scope(f"experts_of_{EXPERTS}"):
                return jnp.sum(form(x, w, sizes).astype(jnp.float32) ** 2)

        compiled = compilers.compile_program(jax.jit(jax.grad(loss, (0, 1))).lower(*args), 1, ())
        counts = compiled.counts
        print(f"{form.__name__:<10}{compiled.needed / hardware.GIB:8.2f} GiB "
              f"{(counts.flops + counts.kernel_flops) / 1e12:8.2f} TFLOP "
              f"{1e3 * roofline.seconds(counts, target.chip):10.2f} ms", flush=True)


if __name__ == "__main__":
    cli.run(main)
