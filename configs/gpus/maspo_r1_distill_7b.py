"""MASPO on R1-Distill-Qwen-7B on one machine of eight 80 GB cards, answers of up to 7168 tokens.

    python -m jaxrl.train --config=configs/gpus/maspo_r1_distill_7b.py

Preflight on h100:8, GiB of 72.68 a card: layout 26.60, prefill 59.90, decode 60.31, score 13.42, update 21.34. A step
of 8,192 answers, 3,584 tokens on average, takes 1,046 s as assumed (rollout 472, score 117, update 457), 28,058
tokens/s, with pages for 5,242,880 tokens of cache on each host. a100-80:8 has the same memory.
"""

from configs.pods import maspo_r1_distill_7b


def get_config():
    c = maspo_r1_distill_7b.get_config()
    c.topology = "h100:8"
    c.sampling.slots, c.sampling.tensor = 640, 1
    return c
