"""MASPO on Qwen3-4B on one 80 GB card, answers of up to 7168 tokens.

    python -m jaxrl.train --config=configs/gpus/maspo_qwen3_4b.py
"""

from configs.pods import maspo_qwen3_4b


def get_config():
    c = maspo_qwen3_4b.get_config()
    c.topology = "h100:1"
    c.sampling.slots, c.sampling.tensor = 20, 1
    c.optimizer.state_dtype = "bfloat16"
    return c
