"""MASPO on R1-Distill-Qwen-7B on one machine of eight 80 GB cards, answers of up to 7168 tokens.

    python -m jaxrl.train --config=configs/gpus/maspo_r1_distill_7b.py
"""

from configs.pods import maspo_r1_distill_7b


def get_config():
    c = maspo_r1_distill_7b.get_config()
    c.topology = "h100:8"
    c.sampling.slots, c.sampling.tensor = 640, 1
    return c
