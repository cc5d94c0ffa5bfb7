"""The published recipes on competition mathematics, one argument each, at the size of a single large GPU.

    python -m jaxrl.train --config=configs/math.py:maspo \\
        --config.model.path=MODEL_DIR --config.task.data=dapo_math_17k.jsonl.gz --config.task.eval_data=aime24.jsonl

Arguments: grpo, dr_grpo, dapo, gspo, maspo, lspo, l1_exact, l1_max. Constants are those of the papers or of the
released scripts (docs/algorithms.md names the source of each); configs/pods/ has the same recipes laid out for
TPU slices. L1-Max continues from L1-Exact: --config.model.path=runs/l1_exact.
"""

from jaxrl.runtime.config import base_config

RECIPES = ("grpo", "dr_grpo", "dapo", "gspo", "maspo", "lspo", "l1_exact", "l1_max")


def get_config(recipe: str = "maspo"):
    """recipe: one of RECIPES."""
    if recipe not in RECIPES:
        raise ValueError(f"configs/math.py:{recipe}: choose one of {', '.join(RECIPES)}")
    c = base_config()
    c.run_dir = f"runs/{recipe}"
    c.steps = 400
    c.model.dtype, c.model.remat = "bfloat16", "full"
    c.task.name, c.task.template, c.task.long_prompts = "math", "chat", "drop"
    c.batch.prompts, c.batch.group_size, c.batch.updates = 128, 8, 16
    c.batch.micro_tokens = 16384
    c.sampling.max_prompt, c.sampling.max_tokens, c.sampling.slots = 1024, 8192, 256
    c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.weight_decay = 1e-6, 10, 0.1
    a = c.algorithm
    a.loss = recipe if recipe in ("grpo", "dr_grpo", "gspo", "maspo") else "dapo"
    a.advantage = "dr_grpo" if recipe == "dr_grpo" else "grpo"
    if recipe in ("dapo", "lspo"):
        a.selection = "accuracy" if recipe == "dapo" else "lspo"
        a.loss_hyper.dapo.dual_clip = 10.0
        c.batch.generation_prompts = 3 * c.batch.prompts
        c.length.reward = "overlong"
        c.length.hyper.overlong.factor = 0.5  # DAPO's reward is +-1, ours 0/1
    if recipe == "gspo":
        c.batch.updates = 4
    if recipe == "lspo":
        c.sampling.max_prompt, c.sampling.max_tokens = 2048, 2048
        c.length.hyper.overlong.cache, c.length.hyper.overlong.factor = 512, 1.0
    if recipe.startswith("l1"):
        c.steps = 700 if recipe == "l1_exact" else 120
        a.loss, a.kl_coef = "grpo", 1e-3
        c.batch.group_size, c.batch.updates = 16, 2
        c.task.template = "boxed"
        c.sampling.temperature, c.sampling.max_tokens = 0.6, 4096
        c.length.low, c.length.high = 100, 4000
        c.length.mode = "exact" if recipe == "l1_exact" else "both"
        c.length.reward = "lcpo_exact" if recipe == "l1_exact" else "lcpo_max"
        c.optimizer.learning_rate = 1e-6 if recipe == "l1_exact" else 4e-6
    return c
