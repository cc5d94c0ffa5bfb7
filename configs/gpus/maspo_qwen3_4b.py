"""MASPO on Qwen3-4B on one 80 GB card, answers of up to 7168 tokens.

    python -m jaxrl.train --config=configs/gpus/maspo_qwen3_4b.py

Preflight on h100:1, GiB of 72.68 a card: layout 44.95, prefill 60.66, decode 60.55, score 38.06, update 62.58. A step
of 8,192 answers, 3,584 tokens on average, takes 13,510 s as assumed (rollout 8,643, score 783, update 4,084), 2,173
tokens/s, with pages for 163,840 tokens of cache on each host. a100-80 has the same memory.
"""

from configs.pods import maspo_qwen3_4b


def get_config():
    c = maspo_qwen3_4b.get_config()
    c.topology = "h100:1"
    c.sampling.slots, c.sampling.tensor = 20, 1
    c.optimizer.state_dtype = "bfloat16"
    return c
