"""MASPO on R1-Distill-Qwen-7B on one machine of eight 80 GB cards, answers of up to 7168 tokens.

    python -m jaxrl.train --config=configs/gpus/maspo_r1_distill_7b.py

Preflight on h100:8, GiB of 72.68 a card: layout 26.60, score 13.42, update 21.34. With a dense cache a step of 8192
answers of 3584 tokens takes 1,694 s as assumed (rollout 1120, score 117, update 457), 17,328 tokens/s, with lengths
that differ 1,506 s; pages, the default since, are not compiled for it yet. a100-80:8 has the same memory.
"""

from configs.pods import maspo_r1_distill_7b


def get_config():
    c = maspo_r1_distill_7b.get_config()
    c.topology = "h100:8"
    c.sampling.slots, c.sampling.tensor = 640, 1
    return c
