"""Six losses under three ways of choosing prompts, five seeds each, on the embedded task.

    python -m jaxrl.study --config=configs/studies/core.py

90 runs of about a minute and a half on two cores. All methods of a seed start from the same warm start.
Harder than configs/quickstart.py, which reaches 97 %: chains of up to 12 operands. Four mini-batch updates
per rollout, so that clips and gates act.
The result: docs/results.md.
"""

LOSSES = ("grpo", "dapo", "gspo", "maspo", "cispo", "sapo")
# prompts sampled at a time: LSPO needs several times the batch to take percentiles of
SELECTIONS = {
    "none": {"algorithm.selection": "none", "batch.generation_prompts": 16},
    "accuracy": {"algorithm.selection": "accuracy", "batch.generation_prompts": 16},
    "lspo": {"algorithm.selection": "lspo", "batch.generation_prompts": 48},
}


def get_study():
    methods = {
        f"{loss} {name}": {"algorithm.loss": loss, **keys, "start": "warm start"}
        for name, keys in SELECTIONS.items()
        for loss in LOSSES
    }
    return {
        "config": "configs/quickstart.py",
        "out": "runs/studies/core",
        "seeds": [0, 1, 2, 3, 4],
        "baseline": "grpo none",
        "common": {
            "steps": 60,
            "batch.updates": 4,
            "task.dial.n_max": 12,
            "sampling.max_tokens": 32,
            "eval.every": 10,
            "log.tensorboard": False,
        },
        "stages": {"warm start": {"entry": "sft"}},
        "methods": methods,
    }
