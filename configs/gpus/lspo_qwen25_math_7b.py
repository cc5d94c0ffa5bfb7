"""LSPO on Qwen2.5-Math-7B over GSPO, GRPO or DAPO on one machine of eight 80 GB cards.

    python -m jaxrl.train --config=configs/gpus/lspo_qwen25_math_7b.py:gspo

Preflight on h100:8, GiB of 72.68 a card: layout 26.60, score 13.04, update 19.66. With a dense cache a step of
12,288 answers of 1024 tokens takes 359 s as assumed (rollout 257, score 21, update 81), 35,054 tokens/s, with
lengths that differ 271 s; pages, the default since, are not compiled for it yet. a100-80:8 has the same memory.
"""

from configs.pods import lspo_qwen25_math_7b


def get_config(loss: str = "gspo"):
    """loss: gspo, grpo or dapo."""
    c = lspo_qwen25_math_7b.get_config(loss)
    c.topology = "h100:8"
    c.sampling.slots, c.sampling.tensor = 1152, 1
    return c
