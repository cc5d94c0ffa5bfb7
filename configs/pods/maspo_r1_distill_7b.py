"""MASPO on R1-Distill-Qwen-7B, answers of up to 7168 tokens.

    python -m jaxrl.train --config=configs/pods/maspo_r1_distill_7b.py

Preflight on v5p:2x2x1, GiB of 95.73 a chip: layout 41.67, prefill 86.50, decode 87.50, score 25.76, update 38.57. A
step of 8,192 answers, 3,584 tokens on average, takes 3,047 s by the compiler's estimate (rollout 901, score 448,
update 1,698), 9,634 tokens/s, with pages for 3,829,844 tokens of cache on each host.
"""

from configs.pods.recipes import maspo, pod
from configs.pods.shapes import R1_DISTILL_QWEN_7B


def get_config():
    c = maspo(pod("maspo_r1_distill_7b", "DeepSeek-R1-Distill-Qwen-7B", R1_DISTILL_QWEN_7B, 1024, 7168), 0.3)
    c.topology = "v5p:2x2x1"
    c.sampling.slots, c.sampling.tensor = 1024, 1
    return c
