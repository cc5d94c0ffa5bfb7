"""SmolLM2-135M-Instruct learns arithmetic in words, and to keep to a length: a real language model on two CPU cores.

    python -m jaxrl.sft   --config=configs/smollm2.py:warm --config.model.path=DIR       # warm start: 24 steps, once
    python -m jaxrl.train --config=configs/smollm2.py:grpo --config.model.path=runs/smollm2_warm/model
    python -m jaxrl.sft   --config=configs/smollm2.py:warm_l1 --config.model.path=runs/smollm2_warm/model  # and lengths
    python -m jaxrl.train --config=configs/smollm2.py:l1_exact --config.model.path=runs/smollm2_warm_l1/model
    python -m jaxrl.evaluate --model=runs/smollm2_grpo --data=words:split=test:count=512,words:split=test:kind=other \\
        --max_new_tokens=96 --products=bfloat16 --out=runs/smollm2_grpo/eval

DIR is a Hugging Face directory of SmolLM2-135M-Instruct, or of any Llama, Qwen2 or Qwen3 with a chat template. The
problems are made by `jaxrl/tasks/words.py`, so nothing else is needed. Recipes: warm, grpo, maspo, dapo (accuracy
filter), lspo, warm_l1, l1_exact, l1_max; L1-Max continues from L1-Exact (--config.model.path=runs/smollm2_l1_exact).
With ",gpu" behind the recipe, the sizes of one GPU: configs/smollm2.py:grpo,gpu. On Linux, large pages take a fifth off
an update's time: export GLIBC_TUNABLES=glibc.malloc.hugetlb=1.

On 320 held-out problems the warm start is right in 12.5 % and, after 16 steps of GRPO (a quarter of an hour of one
core), in 27.2, 26.2 and 25.0 % (seeds 0 to 2). Asked for 56 to 104 tokens, the model is 7 % off on average after
warm_l1 and after l1_exact, which adds 7 to 9 points of accuracy. docs/results.md, "A real model", has the intervals,
and what failed.
"""

from jaxrl.runtime.config import base_config

RECIPES = ("warm", "grpo", "maspo", "dapo", "lspo", "warm_l1", "l1_exact", "l1_max")


def get_config(recipe: str = "grpo"):
    """recipe: one of RECIPES, with ",gpu" for the sizes of a GPU."""
    recipe, _, size = recipe.partition(",")
    if recipe not in RECIPES or size not in ("", "gpu"):
        raise ValueError(f"configs/smollm2.py:{recipe}: choose one of {', '.join(RECIPES)}, perhaps with ,gpu")
    c = base_config()
    c.run_dir = f"runs/smollm2_{recipe}"
    warm, about_length = recipe.startswith("warm"), recipe.endswith(("l1", "exact", "max"))
    c.steps = 12 if about_length else 16
    c.task.name, c.task.template, c.task.long_prompts = "math", "chat", "drop"
    c.task.data, c.task.eval_data = "words", "words:split=test:count=512"
    # Few demonstrations on purpose: they teach the form of an answer, and leave the arithmetic to RL. Half of them are
    # asked for in about their length, so that a length reward has obedience to start from.
    c.sft.data = "words:split=demos:budgets=exact"
    c.sft.batch, c.sft.learning_rate, c.sft.warmup_steps = 16, 1e-4, 5
    c.sft.steps = c.sft.full_steps = (72 if about_length else 24) if warm else 0
    if about_length:  # demonstrations of every length, asked for in exactly that one
        c.sft.data += ":lengths=many"
        c.sft.budget_share, c.sft.budget_error, c.sft.learning_rate = 1.0, 0.0, 3e-4
    c.batch.prompts, c.batch.group_size = 8, 8
    c.batch.share_prompts = True  # prompts are as long as answers: the update computes half of the tokens
    c.batch.row_tokens, c.batch.micro_tokens = 256, 4096
    c.model.products = "bfloat16"  # on a CPU with AMX a product is three times as fast
    if not warm:
        c.model.lora.rank = 32  # 3/4 of the time of an update, and checkpoints of 112 MB instead of 1.6 GB
    c.sampling.max_prompt, c.sampling.max_tokens, c.sampling.slots, c.sampling.chunk = 128, 96, 64, 16
    c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.b2 = 3e-4, 3, 0.95
    c.eval.every, c.eval.problems, c.checkpoint.every = c.steps, 32, 4
    a = c.algorithm
    a.loss = {"grpo": "grpo", "lspo": "grpo", "maspo": "maspo"}.get(recipe, "dapo")
    if recipe == "maspo":
        c.batch.updates = 2  # with one update per batch its gate and limiter have nothing to do
    if not about_length:  # about half of the groups are all wrong: twice as many are drawn
        a.selection = "lspo" if recipe == "lspo" else "accuracy"
        c.batch.generation_prompts, c.batch.max_generation_batches = 16, 1
    if about_length:
        c.sampling.max_prompt, c.sampling.max_tokens = 104, 120
        c.batch.row_tokens, c.batch.micro_tokens = 288, 2304  # two sequences a row
        c.batch.prompts, c.batch.group_size = 16, 4  # a step shows as many budgets as it has prompts
        c.optimizer.learning_rate = 5e-4
        c.length.mode = "exact" if recipe == "l1_exact" else "both"
        c.length.reward = "lcpo_exact" if recipe == "l1_exact" else "lcpo_max"
        c.length.low, c.length.high = 40, 96
        c.length.hyper.lcpo_exact.alpha = c.length.hyper.lcpo_max.exact_alpha = 0.02
        c.length.hyper.lcpo_max.alpha = 0.02
        a.advantage = "dler"
    if size == "gpu":
        c.model.dtype, c.model.products, c.model.remat, c.model.lora.rank = "bfloat16", "", "dots", 0
        c.optimizer.learning_rate = 2e-5
        c.batch.prompts, c.batch.group_size, c.batch.micro_tokens = 64, 16, 32768
        c.batch.share_prompts = False  # the GPU's attention kernel has no form for it
        c.batch.generation_prompts *= 8
        c.sampling.slots, c.eval.problems = 512, 512
    return c
