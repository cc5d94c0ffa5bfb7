"""LCPO on the embedded task: the policy learns to answer in the number of tokens the prompt asks for.

    python -m jaxrl.train --config=configs/quickstart_l1.py          # LCPO-Exact
    python -m jaxrl.train --config=configs/quickstart_l1.py:max      # LCPO-Max

Budgets are feasible: U[2n+1, 22] for a problem of n operands (full working takes 2n+1 tokens). Exact, seed 0: held-out
accuracy 0.31 -> 0.86, mean deviation from the budget 47 % -> 4 %, mean error -1 %.
"""

from configs.quickstart import get_config as quickstart


def get_config(mode: str = "exact"):
    """mode: "exact" or "max"."""
    c = quickstart()
    c.run_dir = f"runs/quickstart_l1_{mode}"
    c.steps = 100
    c.sft.modes, c.sft.steps, c.sft.full_steps = (mode,), 560, 480
    c.length.mode = mode
    c.length.reward = f"lcpo_{mode}"
    c.length.hyper.lcpo_exact.alpha = 0.06
    c.length.hyper.lcpo_max.alpha, c.length.hyper.lcpo_max.delta = 0.1, 0.5
    # The policy first learns to answer: the length term rises over 40 steps. Advantages are scaled by the spread of
    # the batch: scaled by that of each group, groups that differ only by a token in length would outweigh those that
    # differ in the answer.
    c.length.warmup_steps = 40
    c.algorithm.advantage = "dler"
    c.algorithm.selection = "none"
    c.algorithm.entropy_coef = 0.005
    c.batch.prompts, c.batch.generation_prompts = 32, 0
    return c
