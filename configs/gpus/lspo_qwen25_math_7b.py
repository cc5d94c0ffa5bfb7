"""LSPO on Qwen2.5-Math-7B over GSPO, GRPO or DAPO on one machine of eight 80 GB cards.

    python -m jaxrl.train --config=configs/gpus/lspo_qwen25_math_7b.py:gspo
"""

from configs.pods import lspo_qwen25_math_7b


def get_config(loss: str = "gspo"):
    """loss: gspo, grpo or dapo."""
    c = lspo_qwen25_math_7b.get_config(loss)
    c.topology = "h100:8"
    c.sampling.slots, c.sampling.tensor = 1152, 1
    return c
