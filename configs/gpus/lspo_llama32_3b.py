"""LSPO on Llama-3.2-3B-Instruct over DAPO on one 80 GB card, answers of up to 3072 tokens.

    python -m jaxrl.train --config=configs/gpus/lspo_llama32_3b.py

Preflight on h100:1, GiB of 72.68 a card: layout 35.91, score 30.18, update 49.19. With a dense cache a step of
12,288 answers of 1536 tokens takes 5,511 s as assumed (rollout 4954, score 110, update 446), 3,425 tokens/s, with
lengths that differ 4,208 s; pages, the default since, are not compiled for it yet. a100-80 has the same memory.
"""

from configs.pods import lspo_llama32_3b


def get_config():
    c = lspo_llama32_3b.get_config()
    c.topology = "h100:1"
    c.sampling.slots, c.sampling.tensor = 64, 1
    c.optimizer.state_dtype = "bfloat16"
    return c
