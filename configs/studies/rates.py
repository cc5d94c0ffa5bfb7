"""The grid of core.py and lspo.py at three times the learning rate: further from the policy that sampled.

    python -m jaxrl.study --config=configs/studies/rates.py --in_process

The pools compare all methods at the two rates; the runs at core.py's own rate are not repeated.
"""

from configs.studies.core import LOSSES, SELECTIONS
from configs.studies.dial import COMMON, OUT, STAGES, method

FAST = {"optimizer.learning_rate": 3e-4}


def get_study():
    grid = {f"{loss} {s}": method(loss, s) for s in SELECTIONS for loss in LOSSES}
    fast = {f"{label}, lr 3e-4": keys | FAST for label, keys in grid.items()}
    return {
        "config": "configs/quickstart.py",
        "out": OUT,
        "seeds": [0, 1, 2],
        "baseline": "grpo none, lr 3e-4",
        "common": COMMON,
        "stages": STAGES,
        "methods": grid | fast,
        "pools": {
            f"all six, {s}{suffix}": [f"{loss} {s}{suffix}" for loss in LOSSES]
            for suffix in ("", ", lr 3e-4")
            for s in SELECTIONS
        },
    }
