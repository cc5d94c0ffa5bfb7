"""LCPO on the embedded task: Exact, Max, Max continued from Exact, and no length reward at all.

    python -m jaxrl.study --config=configs/studies/lcpo.py

Every prompt carries a feasible budget. The table has accuracy and the mean relative distance from the budget
on held-out problems (for Max, where shorter is fine, see hard_violation). "Max after Exact" is L1's recipe:
it starts where Exact ended, so it has had twice the updates.
"""


def get_study():
    exact = {"length.mode": "exact", "length.reward": "lcpo_exact"}
    # a budget of the other mode is a token the policy must have seen, so both occur in the demonstrations
    at_most = {"length.mode": "max", "length.reward": "lcpo_max"}
    return {
        "config": "configs/quickstart_l1.py",
        "out": "runs/studies/lcpo",
        "seeds": [0, 1, 2, 3, 4],
        "baseline": "no length reward",
        "common": {"sft.modes": ("exact", "max"), "steps": 80, "eval.every": 10, "log.tensorboard": False},
        "stages": {"warm start": {"entry": "sft"}},
        "methods": {
            "no length reward": {"length.mode": "exact", "length.reward": "none", "start": "warm start"},
            "LCPO-Exact": {**exact, "start": "warm start"},
            "LCPO-Max": {**at_most, "start": "warm start"},
            "LCPO-Max after Exact": {**at_most, "start": "LCPO-Exact"},
        },
        "metrics": ["eval/accuracy", "eval/mean_deviation", "eval/hard_violation"],
    }
