"""MASPO on R1-Distill-Qwen-7B, answers of up to 7168 tokens.

    python -m jaxrl.train --config=configs/pods/maspo_r1_distill_7b.py

Preflight on v5p:2x2x1, GiB of 95.73 a chip: layout 41.67, score 25.76, update 38.57. That leaves room for 3,829,844
tokens of cache in pages on each host, by arithmetic. In a dense cache of 256 slots a step of 8192 answers of 3584
tokens takes 7,250 s by the compiler's estimate (rollout 5104, score 448, update 1698), 4,050 tokens/s;
docs/performance.md has what is expected of pages.
"""

from configs.pods.recipes import maspo, pod
from configs.pods.shapes import R1_DISTILL_QWEN_7B


def get_config():
    c = maspo(pod("maspo_r1_distill_7b", "DeepSeek-R1-Distill-Qwen-7B", R1_DISTILL_QWEN_7B, 1024, 7168), 0.3)
    c.topology = "v5p:2x2x1"
    c.sampling.slots, c.sampling.tensor = 1024, 1
    return c
