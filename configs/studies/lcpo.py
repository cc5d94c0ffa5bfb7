"""LCPO on the embedded task, and s1's budget forcing on a model trained without any of it.

    python -m jaxrl.study --config=configs/studies/lcpo.py --in_process

Exact, and Max continued from Exact (L1's recipe; it has had twice the updates), beside RL with budgets in the
prompt but no reward for keeping them, and RL without budgets. Training budgets are feasible, U[2n+1, 22] for n
operands. Then each model is swept over budgets: on chains of up to 4, where every budget of the list can be kept
with full working, and on chains of up to 8, where the short budgets cannot, and cost accuracy.
"""

from configs.studies.dial import OUT, SEEDS


def get_study():
    exact = {"length.mode": "exact", "length.reward": "lcpo_exact", "start": "warm start, budgets"}
    # a budget of the other mode is a token the policy must have seen, so both occur in the demonstrations
    at_most = {"length.mode": "max", "length.reward": "lcpo_max", "start": "LCPO-Exact"}
    return {
        "config": "configs/quickstart_l1.py",
        "out": OUT,
        "seeds": SEEDS,
        "baseline": "no length reward",
        "common": {
            "steps": 80,
            "length.warmup_steps": 10,
            "optimizer.learning_rate": 3e-4,
            "batch.row_tokens": 128,
            "batch.micro_tokens": 128,
            "task.dial.train": 5000,
            "sft.modes": ("exact", "max"),
            "sft.batch": 64,
            "eval.every": 20,
            "checkpoint.every": 1000,
            "log.tensorboard": False,
            "log.samples": 0,
        },
        "stages": {"warm start, budgets": {"entry": "sft"}},
        "methods": {
            "no length reward": exact | {"length.reward": "none"},
            "no budgets": exact | {"length.reward": "none", "length.mode": "none"},
            "LCPO-Exact": exact,
            "LCPO-Max after Exact": at_most,
        },
        "metrics": ["eval/accuracy", "eval/mean_deviation", "eval/hard_violation"],
        "sweep": {
            "data": "dial:n_max=4,dial:n_max=8",
            "budgets": "9,12,15,18,21",
            "soft_tolerance": 2,
            "max_new_tokens": 32,
            "slots": 256,
        },
        "sweeps": {
            "Exact": {"run": "LCPO-Exact", "budget_mode": "exact"},
            "Max after Exact": {"run": "LCPO-Max after Exact", "budget_mode": "max"},
            "told only": {"run": "no length reward", "budget_mode": "exact"},
            "left alone": {"run": "no budgets", "budget_mode": "none"},
            "forced": {"run": "no budgets", "budget_mode": "forced"},
            "forced, prolonged": {"run": "no budgets", "budget_mode": "forced", "waits": 100},
        },
    }
