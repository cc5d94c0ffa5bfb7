"""LSPO's ablations: which prompts are worth training on, judged by length or by accuracy.

    python -m jaxrl.study --config=configs/studies/lspo.py --in_process

The paper (2510.01459): both ends beat the middle, percentiles beat absolute lengths, length beats accuracy.
The baseline is the accuracy filter alone. Loss, task and updates as in core.py, whose runs are not repeated.
"""

from configs.studies.dial import COMMON, OUT, SEEDS, STAGES, method

RULES = (
    "accuracy",
    "lspo",
    "lspo_middle",
    "lspo_shortest",
    "lspo_longest",
    "lspo_accuracy",
    "lspo_value",
)


def get_study():
    return {
        "config": "configs/quickstart.py",
        "out": OUT,
        "seeds": SEEDS,
        "baseline": "dapo accuracy",
        "common": COMMON,
        "stages": STAGES,
        "curves": ["dapo accuracy", "dapo lspo", "dapo lspo_middle"],
        "methods": {f"dapo {rule}": method("dapo", rule) for rule in RULES},
    }
