"""Draws evaluations over budgets: mean tokens against the budget, and accuracy against the tokens really spent.

    python -m jaxrl.evaluate --model=MODEL --data=DATA --budgets=32,64,96 --out=OUT      (for each model)
    python docs/sweeps.py docs/images/NAME "first label=OUT" "second label=OUT2" ...

Writes NAME_budgets_I.svg and NAME_accuracy_I.svg for each data set I.
"""

from __future__ import annotations

import json
import pathlib
import sys

from jaxrl.evaluation.seeds import average_sweeps
from jaxrl.reporting.comparison import draw


def main(argv: list[str]) -> None:
    """argv: the stem of the files, then label=directory of an evaluation, each."""
    if len(argv) < 3 or not all("=" in a for a in argv[2:]):
        sys.exit(__doc__)
    named = [a.partition("=")[::2] for a in argv[2:]]
    results = {label: json.loads((pathlib.Path(out) / "result.json").read_text()) for label, out in named}
    sweeps = {label: average_sweeps([found]) for label, found in results.items()}
    print("\n".join(map(str, draw({"rows": []}, [], sweeps, pathlib.Path(argv[1])))))


if __name__ == "__main__":
    main(sys.argv)
