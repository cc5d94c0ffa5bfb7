"""A real model: GRPO, MASPO and LSPO's selection on SmolLM2-135M-Instruct, three seeds each, from one warm start.

    python -m jaxrl.sft   --config=configs/smollm2.py:warm --config.model.path=DIR     # once, leaves runs/smollm2_warm
    python -m jaxrl.study --config=configs/studies/smollm2.py [--seeds=0]

A run takes ten minutes of one core, and evaluates 320 held-out problems before and after. The result: docs/results.md.
"""

EVALUATION = {"eval.problems": 320, "eval.every": 16, "log.tensorboard": False}


def get_study():
    return {
        "config": "configs/smollm2.py:grpo",
        "out": "runs/smollm2_study",
        "seeds": [0, 1, 2],
        "baseline": "GRPO",
        "common": {"model.path": "runs/smollm2_warm/model", **EVALUATION},
        "methods": {
            "GRPO": {},
            "MASPO": {"algorithm.loss": "maspo", "batch.updates": 2},  # with one update its gate has nothing to do
            "LSPO": {"algorithm.selection": "lspo"},
        },
        "metrics": ["eval/accuracy", "eval/mean_tokens"],
        "curves": ["GRPO", "MASPO", "LSPO"],
    }
