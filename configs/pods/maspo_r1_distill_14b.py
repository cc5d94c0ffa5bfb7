"""MASPO on R1-Distill-Qwen-14B, answers of up to 7168 tokens.

    python -m jaxrl.train --config=configs/pods/maspo_r1_distill_14b.py

Preflight on v5p:2x2x1, GiB of 95.73 a chip: layout 56.61, prefill 89.41, decode 90.54, score 49.03, update 73.88. A
step of 8,192 answers, 3,584 tokens on average, takes 6,924 s by the compiler's estimate (rollout 2,592, score 883,
update 3,449), 4,241 tokens/s, with pages for 897,918 tokens of cache on each host.
"""

from configs.pods.recipes import maspo, pod
from configs.pods.shapes import R1_DISTILL_QWEN_14B


def get_config():
    c = maspo(pod("maspo_r1_distill_14b", "DeepSeek-R1-Distill-Qwen-14B", R1_DISTILL_QWEN_14B, 1024, 7168), 0.3)
    c.topology = "v5p:2x2x1"
    c.sampling.slots, c.sampling.tensor = 256, 4
    return c
