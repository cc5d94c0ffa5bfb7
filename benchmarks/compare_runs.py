"""Compares the metrics of two runs bit for bit, except those that depend on the clock or the machine.

    python benchmarks/compare_runs.py OLD/metrics.jsonl NEW/metrics.jsonl [ignored_key_prefix ...]

Compares all steps that both runs have, in every key of either run, and lists the first difference of each key. Exit
code 0: equal.
"""

from __future__ import annotations

import json
import sys

CLOCK = ("time/", "perf/", "tokens_per_second")


def read(path: str, ignored: tuple[str, ...]) -> dict[int, dict]:
    with open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return {r["step"]: {k: v for k, v in r.items() if not k.startswith(ignored)} for r in rows}


def differences(old: dict[int, dict], new: dict[int, dict]) -> dict[str, tuple]:
    """key -> (first step where it differs, old value, new value); a missing value is None."""
    found: dict[str, tuple] = {}
    for step in sorted(old.keys() & new.keys()):
        a, b = old[step], new[step]
        for key in [*a, *(k for k in b if k not in a)]:
            if json.dumps(a.get(key)) != json.dumps(b.get(key)):  # as text: NaN equals NaN, 1 is not 1.0
                found.setdefault(key, (step, a.get(key), b.get(key)))
    return found


def main(argv: list[str]) -> int:
    ignored = (*CLOCK, *argv[2:])
    old, new = (read(path, ignored) for path in argv[:2])
    steps = old.keys() & new.keys()
    found = differences(old, new)
    for key, (step, a, b) in found.items():
        print(f"{key}: first differs at step {step}: {a} -> {b}")
    print(f"{len(steps)} common steps of {len(old)} and {len(new)}: {'DIFFERENT' if found else 'equal'}")
    return int(bool(found) or not steps)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
