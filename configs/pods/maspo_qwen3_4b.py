"""MASPO on Qwen3-4B, answers of up to 7168 tokens.

    python -m jaxrl.train --config=configs/pods/maspo_qwen3_4b.py

Preflight on v6e:2x2, GiB of 31.24 a chip: layout 15.41, prefill 29.07, decode 29.22, score 13.78, update 21.43. A step
of 8,192 answers, 3,584 tokens on average, takes 3,839 s by the compiler's estimate (rollout 2,523, score 261, update
1,054), 7,649 tokens/s, with pages for 452,433 tokens of cache on each host.
"""

from configs.pods.recipes import maspo, pod
from configs.pods.shapes import QWEN3_4B


def get_config():
    c = maspo(pod("maspo_qwen3_4b", "Qwen3-4B", QWEN3_4B, 1024, 7168), 0.3)
    c.topology = "v6e:2x2"
    c.sampling.slots, c.sampling.tensor = 128, 4
    return c
