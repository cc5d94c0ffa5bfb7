"""MASPO on Qwen3-4B, answers of up to 7168 tokens.

    python -m jaxrl.train --config=configs/pods/maspo_qwen3_4b.py

Preflight on v6e:2x2, GiB of 31.24 a chip: layout 15.41, score 13.78, update 21.39. That leaves room for 452,433
tokens of cache in pages on each host, by arithmetic. In a dense cache of 32 slots a step of 8192 answers of 3584
tokens takes 12,110 s by the compiler's estimate (rollout 10795, score 261, update 1054), 2,424 tokens/s;
docs/performance.md has what is expected of pages.
"""

from configs.pods.recipes import maspo, pod
from configs.pods.shapes import QWEN3_4B


def get_config():
    c = maspo(pod("maspo_qwen3_4b", "Qwen3-4B", QWEN3_4B, 1024, 7168), 0.3)
    c.topology = "v6e:2x2"
    c.sampling.slots, c.sampling.tensor = 128, 4
    return c
