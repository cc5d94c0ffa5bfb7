"""MASPO on Qwen3-4B on one 80 GB card, answers of up to 7168 tokens.

    python -m jaxrl.train --config=configs/gpus/maspo_qwen3_4b.py

Preflight on h100:1, GiB of 72.68 a card: layout 44.95, score 38.06, update 62.58. With a dense cache a step of 8192
answers of 3584 tokens takes 26,747 s as assumed (rollout 21878, score 783, update 4086), 1,098 tokens/s, with
lengths that differ 21,848 s; pages, the default since, are not compiled for it yet. a100-80 has the same memory.
"""

from configs.pods import maspo_qwen3_4b


def get_config():
    c = maspo_qwen3_4b.get_config()
    c.topology = "h100:1"
    c.sampling.slots, c.sampling.tensor = 20, 1
    c.optimizer.state_dtype = "bfloat16"
    return c
