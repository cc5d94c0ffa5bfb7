"""MASPO on R1-Distill-Qwen-14B, answers of up to 7168 tokens.

    python -m jaxrl.train --config=configs/pods/maspo_r1_distill_14b.py

Preflight on v5p:2x2x1, GiB of 95.73 a chip: layout 56.61, score 49.03, update 73.88. That leaves room for 897,918
tokens of cache in pages on each host, by arithmetic. In a dense cache of 64 slots a step of 8192 answers of 3584
tokens takes 18,850 s by the compiler's estimate (rollout 14519, score 883, update 3448), 1,558 tokens/s;
docs/performance.md has what is expected of pages.
"""

from configs.pods.recipes import maspo, pod
from configs.pods.shapes import R1_DISTILL_QWEN_14B


def get_config():
    c = maspo(pod("maspo_r1_distill_14b", "DeepSeek-R1-Distill-Qwen-14B", R1_DISTILL_QWEN_14B, 1024, 7168), 0.3)
    c.topology = "v5p:2x2x1"
    c.sampling.slots, c.sampling.tensor = 256, 4
    return c
