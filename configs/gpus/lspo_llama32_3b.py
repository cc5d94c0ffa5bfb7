"""LSPO on Llama-3.2-3B-Instruct over DAPO on one 80 GB card, answers of up to 3072 tokens.

    python -m jaxrl.train --config=configs/gpus/lspo_llama32_3b.py

Preflight on h100:1, GiB of 72.68 a card: layout 35.91, prefill 59.16, decode 58.83, score 30.18, update 49.19. A step
of 12,288 answers, 1,536 tokens on average, takes 2,373 s as assumed (rollout 1,818, score 110, update 445), 7,952
tokens/s, with pages for 262,144 tokens of cache on each host. a100-80 has the same memory.
"""

from configs.pods import lspo_llama32_3b


def get_config():
    c = lspo_llama32_3b.get_config()
    c.topology = "h100:1"
    c.sampling.slots, c.sampling.tensor = 64, 1
    c.optimizer.state_dtype = "bfloat16"
    return c
