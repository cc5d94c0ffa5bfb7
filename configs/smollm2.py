"""SmolLM2-135M-Instruct learns arithmetic in words, and to keep to a length: a real language model on two CPU cores.

    python -m jaxrl.sft   --config=configs/smollm2.py:warm --config.model.path=DIR          # warm start, once
    python -m jaxrl.train --config=configs/smollm2.py:grpo --config.model.path=runs/smollm2_warm/model
"""

from jaxrl.runtime.config import base_config

RECIPES = ("warm", "grpo", "maspo", "lspo", "dapo", "l1_exact", "l1_max")


def get_config(recipe: str = "grpo"):
    """recipe: one of RECIPES."""
    if recipe not in RECIPES:
        raise ValueError(f"configs/smollm2.py:{recipe}: choose one of {', '.join(RECIPES)}")
    c = base_config()
    c.run_dir = f"runs/smollm2_{recipe}"
    c.steps = 60
    c.task.name, c.task.template, c.task.long_prompts = "math", "chat", "drop"
    c.task.data, c.task.eval_data = "words", "words:split=test:count=512"
    c.task.grader_workers = 1
    c.sft.data = "words:split=demos:budgets=exact"
    c.sft.batch, c.sft.learning_rate, c.sft.warmup_steps = 16, 1e-4, 5
    c.sft.steps = c.sft.full_steps = 40 if recipe == "warm" else 0
    c.batch.prompts, c.batch.group_size, c.batch.updates = 8, 8, 2
    c.batch.micro_tokens = 4096
    c.sampling.max_prompt, c.sampling.max_tokens, c.sampling.slots = 128, 96, 64
    c.sampling.chunk = 16
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 1e-5, 3
    c.optimizer.b2 = 0.95
    c.eval.every, c.eval.problems = 20, 256
    c.log.samples = 2
    a = c.algorithm
    a.loss = recipe if recipe in ("grpo", "maspo") else "dapo"
    return c
