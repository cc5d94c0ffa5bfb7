"""L1 on a 1.5B reasoning model on one 48 GB card: L1-Exact, then L1-Max from its result.

    python -m jaxrl.train --config=configs/gpus/l1_r1_distill_1_5b.py:exact
    python -m jaxrl.train --config=configs/gpus/l1_r1_distill_1_5b.py:max --config.model.path=RUN_DIR_OF_EXACT

Preflight on a6000:1, GiB of 43.61 a card: layout 26.48, prefill 36.52, decode 36.57, score 23.61, update 33.88. A step
of 2,048 answers, 2,048 tokens on average, takes 1,926 s as assumed (rollout 575, score 455, update 896), 2,178
tokens/s, with pages for 491,520 tokens of cache on each host.
"""

from configs.pods import l1_r1_distill_1_5b


def get_config(stage: str = "exact"):
    """stage: exact or max."""
    c = l1_r1_distill_1_5b.get_config(stage)
    c.topology = "a6000:1"
    c.sampling.slots, c.sampling.tensor = 96, 1
    c.optimizer.state_dtype = "bfloat16"  # parameters, reference, gradient and float32 moments would fill the card
    return c
