"""MASPO on R1-Distill-Qwen-14B, answers of up to 7168 tokens.

    python -m jaxrl.train --config=configs/pods/maspo_r1_distill_14b.py
"""

from configs.pods.recipes import maspo, pod
from configs.pods.shapes import R1_DISTILL_QWEN_14B


def get_config():
    c = maspo(pod("maspo_r1_distill_14b", "DeepSeek-R1-Distill-Qwen-14B", R1_DISTILL_QWEN_14B, 1024, 7168), 0.3)
    c.topology = "v5p:2x2x1"
    c.sampling.slots, c.sampling.tensor = 64, 4
    return c
