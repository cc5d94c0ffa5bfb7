"""MASPO on Qwen3-4B, answers of up to 7168 tokens.

    python -m jaxrl.train --config=configs/pods/maspo_qwen3_4b.py
"""

from configs.pods.recipes import maspo, pod
from configs.pods.shapes import QWEN3_4B


def get_config():
    c = maspo(pod("maspo_qwen3_4b", "Qwen3-4B", QWEN3_4B, 1024, 7168), 0.3)
    c.topology = "v6e:2x2"
    c.sampling.slots, c.sampling.tensor = 32, 4
    return c
