"""L1 on a 1.5B reasoning model on one 48 GB card: L1-Exact, then L1-Max from its result.

    python -m jaxrl.train --config=configs/gpus/l1_r1_distill_1_5b.py:exact
"""

from configs.pods import l1_r1_distill_1_5b


def get_config(stage: str = "exact"):
    """stage: exact or max."""
    c = l1_r1_distill_1_5b.get_config(stage)
    c.topology = "a6000:1"
    c.sampling.slots, c.sampling.tensor = 96, 1
    c.optimizer.state_dtype = "bfloat16"  # parameters, reference, gradient and float32 moments would fill the card
    return c
