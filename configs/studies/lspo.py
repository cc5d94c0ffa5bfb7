"""LSPO's ablations: which prompts are worth training on, judged by length or by accuracy.

    python -m jaxrl.study --config=configs/studies/lspo.py

The paper (2510.01459): both ends beat the middle, percentiles beat absolute lengths, length beats accuracy.
Task and updates as in core.py. The baseline is the accuracy filter alone, on as many prompts per generation
batch.
"""

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
        "out": "runs/studies/lspo",
        "seeds": [0, 1, 2, 3, 4],
        "baseline": "accuracy",
        "common": {
            "steps": 60,
            "algorithm.loss": "dapo",
            "batch.updates": 4,
            "task.dial.n_max": 12,
            "sampling.max_tokens": 32,
            "batch.generation_prompts": 48,
            "eval.every": 10,
            "log.tensorboard": False,
        },
        "stages": {"warm start": {"entry": "sft"}},
        "methods": {rule: {"algorithm.selection": rule, "start": "warm start"} for rule in RULES},
    }
