"""Every length-aware method on the embedded task: accuracy and length at equal updates and at equal generated tokens.

    python -m jaxrl.study --config=configs/studies/length.py --in_process

docs/length.md says what each method is for. Constants in tokens are scaled to the task (a full working takes 2n+1
tokens for n operands, the limit is 24), all others are the tables' defaults. The methods that read a budget in the
prompt start from a warm start that has seen budgets. Their baseline is RL on the same prompts without a length reward.
"""

from configs.studies.dial import COMMON, OUT, SEEDS, STAGES, method

PLAIN = method("dapo", "none")
START = "warm start, budgets, up to 10"

REWARDS = {
    "arora": {},
    "kimi": {"length.weight": 0.2},
    "alp": {},
    "shorter_better": {"beta": 0.05},
    "laser": {"target": 12},
    "laser_d": {"candidates": 24},
    "overlong": {"factor": 0.5},
    "dler": {"limit": 18},
    "gr3": {},
    "linear": {},
    "efficiency": {},
    "quantile_slack": {},
    "leash": {"target": 10},
    "a_dlp": {"start": 5e-3, "rate": 1e-2, "reference": 0.4},
}


def rewarded(name: str, constants: dict, **more) -> dict:
    """RL with the length reward `name`; keys without a dot are its constants."""
    keys = {k if "." in k else f"length.hyper.{name}.{k}": v for k, v in constants.items()}
    return PLAIN | {"length.reward": name} | keys | more


def held(target: str, value: float, rate: float) -> dict:
    """Settings that adapt the weight of the length term so as to hold `target` at `value`."""
    keys = {"target": target, "value": value, "rate": rate}
    return {f"length.control.{k}": v for k, v in keys.items()}


def budgeted(mode: str, reward: str) -> dict:
    """RL on prompts with a budget."""
    constants = {"length.hyper.lcpo_exact.alpha": 0.06, "length.hyper.lcpo_max.alpha": 0.1}
    return PLAIN | {"length.mode": mode, "length.reward": reward, "start": START} | constants


def get_study():
    methods = {"dapo none": PLAIN} | {name: rewarded(name, c) for name, c in REWARDS.items()}
    methods |= {
        "gr3, all correct protected": rewarded("gr3", {"calibration": "correct"}),
        "gr3, uncalibrated": rewarded("gr3", {"calibration": "none"}),
        "linear, gated": rewarded("linear", {"gated": True}),
        "linear, accuracy held": rewarded("linear", {}, **held("accuracy", 0.02, 2.0)),
        "linear, length held": rewarded("linear", {}, **held("length", 9.0, 0.2)),
        "linear, GDPO": rewarded("linear", {}, **{"algorithm.advantage": "gdpo"}),
        "dler, batch advantage": rewarded("dler", {"limit": 18}, **{"algorithm.advantage": "dler"}),
        "dapo lspo": method("dapo", "lspo"),
        "dapo gfpo": method("dapo", "gfpo") | {"batch.generation_prompts": 16},
        "budgets, no length term": budgeted("exact", "none"),
        "budgets, LCPO-Exact": budgeted("exact", "lcpo_exact"),
        "budgets, LCPO-Max": budgeted("max", "lcpo_max"),
    }
    budgets = {"entry": "sft", "length.mode": "exact", "sft.modes": ("exact", "max")}
    return {
        "config": "configs/quickstart.py",
        "out": OUT,
        "seeds": SEEDS,
        "baseline": "dapo none",
        "common": COMMON,
        "stages": STAGES | {START: budgets},
        "curves": ["dapo none", "linear", "gr3", "leash", "linear, accuracy held"],
        "methods": methods,
        "metrics": ["eval/accuracy", "eval/mean_tokens"],
    }
