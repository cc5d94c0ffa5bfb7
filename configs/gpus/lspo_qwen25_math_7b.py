"""LSPO on Qwen2.5-Math-7B over GSPO, GRPO or DAPO on one machine of eight 80 GB cards.

    python -m jaxrl.train --config=configs/gpus/lspo_qwen25_math_7b.py:gspo

Preflight on h100:8, GiB of 72.68 a card: layout 26.60, prefill 56.42, decode 56.85, score 13.04, update 19.66. A step
of 12,288 answers, 1,024 tokens on average, takes 217 s as assumed (rollout 114, score 21, update 81), 58,097 tokens/s,
with pages for 4,718,592 tokens of cache on each host. a100-80:8 has the same memory.
"""

from configs.pods import lspo_qwen25_math_7b


def get_config(loss: str = "gspo"):
    """loss: gspo, grpo or dapo."""
    c = lspo_qwen25_math_7b.get_config(loss)
    c.topology = "h100:8"
    c.sampling.slots, c.sampling.tensor = 1152, 1
    return c
