"""LSPO on Qwen2.5-Math-7B over GSPO, GRPO or DAPO, as in the paper's main table.

    python -m jaxrl.train --config=configs/pods/lspo_qwen25_math_7b.py:gspo

Smallest slice of v6e: v6e:2x4 (v6e-8). Preflight on v6e:2x4, GiB of 31.24 a chip: layout 16.85, prefill 28.64, decode
28.87, score 13.00, update 19.48. A step of 12,288 answers, 1,024 tokens on average, takes 330 s by the compiler's
estimate (rollout 148, score 41, update 141), 38,125 tokens/s, with pages for 2,157,568 tokens of cache on each host.
"""

from configs.pods.recipes import lspo, pod
from configs.pods.shapes import QWEN25_MATH_7B


def get_config(loss: str = "gspo"):
    """loss: gspo, grpo or dapo."""
    c = lspo(pod(f"lspo_{loss}_7b", "Qwen2.5-Math-7B", QWEN25_MATH_7B, 2048, 2048), loss)
    c.topology = "v6e:2x4"
    c.sampling.slots, c.sampling.tensor = 1024, 4
    return c
