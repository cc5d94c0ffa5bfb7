"""LSPO on Llama-3.2-3B-Instruct over DAPO on one 80 GB card, answers of up to 3072 tokens.

    python -m jaxrl.train --config=configs/gpus/lspo_llama32_3b.py
"""

from configs.pods import lspo_llama32_3b


def get_config():
    c = lspo_llama32_3b.get_config()
    c.topology = "h100:1"
    c.sampling.slots, c.sampling.tensor = 64, 1
    c.optimizer.state_dtype = "bfloat16"
    return c
