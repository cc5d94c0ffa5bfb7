"""Is the ranking of the losses one of learning rates? core.py's 3e-4 and 1e-4.

    python -m jaxrl.study --config=configs/studies/rates.py --in_process

No selection; the runs at core.py's own rate are not repeated.
"""

from configs.studies.core import LOSSES
from configs.studies.dial import COMMON, OUT, SEEDS, STAGES, method

RATES = {"": {}, ", lr 1e-4": {"optimizer.learning_rate": 1e-4}}


def get_study():
    methods = {f"{loss} none{suffix}": method(loss, "none") | r for suffix, r in RATES.items() for loss in LOSSES}
    return {
        "config": "configs/quickstart.py",
        "out": OUT,
        "seeds": SEEDS,
        "baseline": "grpo none",
        "common": COMMON,
        "stages": STAGES,
        "methods": methods,
        "pools": {f"all six{suffix}": [f"{loss} none{suffix}" for loss in LOSSES] for suffix in RATES},
    }
