"""Matrix products of a CPU in float32 and with factors rounded to bfloat16 (`model.products`), forward and gradients.

    python benchmarks/products.py [ROWS]
    python benchmarks/products.py few      # x @ w and models.cpu.transposed_product in float32, for few rows

Prints GFLOP/s of each, best of 8 calls in turn, for the matrices of SmolLM2-135M and of a 1.5B model; those of few rows
for the large model of benchmarks/sampler.py.
"""

import sys
import time

import jax
import jax.numpy as jnp

from models import cpu

SHAPES = {"135M, attention": (576, 576), "135M, MLP": (576, 1536), "1.5B, MLP": (1536, 8960)}
ROWS = (1, 8, 16, 32, 64, 128)
FORMS = {"float32": lambda x, w: x @ w, "bfloat16": cpu.narrow_product}


def seconds(programs: dict, *arrays) -> dict[str, float]:
    """Least seconds of a call of each program, the programs taking turns."""
    best = dict.fromkeys(programs, float("inf"))
    for turn in range(9):
        for name, program in programs.items():
            begin = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            if turn:
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def program(form, part: int | None):
    """The product of a form, or its gradient by factor `part`, compiled."""
    if part is None:
        return jax.jit(lambda x, w, g: form(x, w))
    return jax.jit(lambda x, w, g: jax.vjp(form, x, w)[1](g)[part])


def main(rows: int = 1024) -> None:
    """Measures and prints."""
    print(f"GFLOP/s, float32 -> bfloat16, {rows} rows: forward, gradient by the input, by the weights")
    for label, (d, f) in SHAPES.items():
        arrays = jnp.ones((rows, d)), jnp.ones((d, f)), jnp.ones((rows, f))
        cells = []
        for part in (None, 0, 1):
            best = seconds({name: program(form, part) for name, form in FORMS.items()}, *arrays)
            cells.append(" -> ".join(f"{2 * rows * d * f / best[name] / 1e9:5.0f}" for name in FORMS))
        print(f"{label:16} {'    '.join(cells)}")


def few() -> None:
    """Measures and prints the form that a CPU's sampler gives its large matrices."""
    print("GFLOP/s, x @ w -> transposed_product, float32; rows:", *ROWS)
    programs = {
        "plain": jax.jit(lambda x, w, _: x @ w + 1),
        "transposed": jax.jit(lambda x, _, w: cpu.transposed_product(x, w) + 1),
    }
    for d, f in ((512, 1024), (512, 6144), (3072, 512), (512, 32768)):
        cells = []
        for rows in ROWS:
            best = seconds(programs, jnp.ones((rows, d)), jnp.ones((d, f)), jnp.ones((f, d)))
            cells.append(" -> ".join(f"{2 * rows * d * f / best[name] / 1e9:5.0f}" for name in programs))
        print(f"{f'{d} x {f}':16} {'    '.join(cells)}")


if __name__ == "__main__":
    few() if sys.argv[1:2] == ["few"] else main(*map(int, sys.argv[1:2]))
