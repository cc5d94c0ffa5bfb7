"""LCPO on the embedded task: the policy learns to answer in the number of tokens the prompt asks for.

    python -m jaxrl.train --config=configs/quickstart_l1.py          # LCPO-Exact
    python -m jaxrl.train --config=configs/quickstart_l1.py:max      # LCPO-Max

Budgets are feasible: U[2n+1, 22] for a problem of n operands (full working takes 2n+1 tokens).
"""

from configs.quickstart import get_config as quickstart


def get_config(mode: str = "exact"):
    """mode: "exact" or "max"."""
    c = quickstart()
    c.run_dir = f"runs/quickstart_l1_{mode}"
    c.steps = 80
    c.sft.modes = (mode,)
    c.length.mode = mode
    c.length.reward = f"lcpo_{mode}"
    c.length.hyper.lcpo_exact.alpha = 0.03
    c.length.hyper.lcpo_max.alpha, c.length.hyper.lcpo_max.delta = 0.1, 0.5
    c.algorithm.selection = "none"
    c.batch.generation_prompts = 0
    c.algorithm.entropy_coef = 0.005
    return c
