"""Six losses under three ways of choosing prompts, five seeds each, on the embedded task.

    python -m jaxrl.study --config=configs/studies/core.py --in_process

All methods of a seed start from the same warm start. The result: docs/results.md.
"""

from configs.studies.dial import COMMON, OUT, SEEDS, STAGES, method

LOSSES = ("grpo", "dapo", "gspo", "maspo", "cispo", "sapo")
SELECTIONS = ("none", "accuracy", "lspo")


def get_study():
    return {
        "config": "configs/quickstart.py",
        "out": OUT,
        "seeds": SEEDS,
        "baseline": "grpo none",
        "common": COMMON,
        "stages": STAGES,
        "curves": ["dapo none", "dapo accuracy", "dapo lspo", "maspo none", "gspo none"],
        "methods": {f"{loss} {s}": method(loss, s) for s in SELECTIONS for loss in LOSSES},
        "pools": {f"all six, {s}": [f"{loss} {s}" for loss in LOSSES] for s in SELECTIONS},
    }
