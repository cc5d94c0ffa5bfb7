"""Throughput of the grader: python benchmarks/grader.py [--workers=2] [--timeout=5]

Prints gradings a second for plain numeric answers (no algebra needed), for formulas (math-verify), and the wall
time of a batch of hostile answers, of which each may cost at most the time limit.
"""

import argparse
import time

from jaxrl.tasks.grader import Grader

HOSTILE = [
    r"\boxed{\sum_{n=1}^{10^{9}} n^n}",
    r"\boxed{\binom{10^8}{5 \cdot 10^7}}",
    r"\boxed{\int_0^1 x^{x^x} \sin(x^{-x}) dx}",
    r"\boxed{\prod_{k=1}^{99999999} k}",
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{1000000000!}",
    r"\boxed{" * 3000 + "5" + "}" * 3000,
    r"\boxed{" + "1 " * 20000,
    "(" * 1_000_000,
    "$" * 1_000_000,
    r"\boxed{" + "x^{" * 900 + "2" + "}" * 900 + "}",
    r"\boxed{\frac{" + "9" * 1500 + "}{7}x}",
]


def timed(grader: Grader, pairs: list[tuple[str, str]]) -> float:
    start = time.perf_counter()
    grader.grade(pairs)
    return time.perf_counter() - start


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--timeout", type=float, default=5.0)
    args = options.parse_args()
    working = "Let me compute step by step. " * 40
    numeric = [(f"{working}So the answer is \\boxed{{{i}}}.", str(i + i % 2)) for i in range(20000)]
    formulas = [(f"{working}\\boxed{{(x+{i})^2 - {i}x}}", f"x^2+{i}x+{i * i}") for i in range(400)]
    with Grader(args.workers, args.timeout) as grader:
        start = timed(grader, [("$x+1$", "$1+x$")])
        print(f"start of the first worker   {start:8.2f} s")
        print(f"plain numbers               {len(numeric) / timed(grader, numeric):8.0f} gradings/s")
        print(f"formulas                    {len(formulas) / timed(grader, formulas):8.0f} gradings/s")
        hostile = [(text, "5") for text in HOSTILE]
        print(f"{len(hostile)} hostile answers          {timed(grader, hostile):8.2f} s", end="")
        print(f"   (bound: {-(-len(hostile) // args.workers) * args.timeout:.0f} s)")


if __name__ == "__main__":
    main()
