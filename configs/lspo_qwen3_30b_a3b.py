"""LSPO on Qwen3-30B-A3B, a mixture of 128 experts of which a token takes 8, over GSPO.

    python -m jaxrl.train --config=configs/lspo_qwen3_30b_a3b.py:gspo

Eight chips of v5p. Compiled by preflight so far, GiB of 95.73 a chip: layout 66.25, prefill 81.27, decode 81.41, score
51.96. The update was not: run `python -m jaxrl.preflight` on it before you trust it.
"""

from configs.pods.recipes import lspo, pod
from configs.pods.shapes import QWEN3_30B_A3B


def get_config(loss: str = "gspo"):
    """loss: gspo, grpo or dapo."""
    c = lspo(pod(f"lspo_{loss}_30b_a3b", "Qwen3-30B-A3B", QWEN3_30B_A3B, 1024, 3072), loss)
    c.topology = "v5p:2x2x2"
    c.sampling.slots, c.sampling.tensor = 256, 4
    c.algorithm.balance_coef = 1e-3
    return c
