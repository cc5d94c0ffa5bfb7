"""L1 on a 1.5B reasoning model: L1-Exact, then L1-Max from its result.

    python -m jaxrl.train --config=configs/pods/l1_r1_distill_1_5b.py:exact
    python -m jaxrl.train --config=configs/pods/l1_r1_distill_1_5b.py:max --config.model.path=RUN_DIR_OF_EXACT

Smallest slice: v5e:2x2 (v5litepod-4). Preflight on v5e:2x2, GiB of 15.75 a chip: layout 9.28, prefill 13.88, decode
14.22, score 7.75, update 10.86. A step of 2,048 answers, 2,048 tokens on average, takes 362 s by the compiler's
estimate (rollout 131, score 82, update 149), 11,596 tokens/s, with pages for 845,830 tokens of cache on each host.
"""

from configs.pods.recipes import pod
from configs.pods.shapes import R1_DISTILL_QWEN_1_5B


def get_config(stage: str = "exact"):
    """stage: exact or max."""
    if stage not in ("exact", "max"):
        raise ValueError(f"configs/pods/l1_r1_distill_1_5b.py:{stage}: choose exact or max")
    exact = stage == "exact"
    checkpoint = "DeepScaleR-1.5B-Preview" if exact else "l1_exact"
    c = pod(f"l1_{stage}", checkpoint, R1_DISTILL_QWEN_1_5B, 1024, 4096 if exact else 4500)
    c.topology = "v5e:2x2"
    c.steps = 700 if exact else 120
    c.task.data, c.task.eval_data = "deepscaler", "aime25"
    c.batch.prompts, c.batch.group_size, c.batch.updates = 128, 16, 2
    c.sampling.temperature = 0.6
    c.sampling.slots, c.sampling.tensor = 384, 2
    c.algorithm.loss, c.algorithm.kl_coef = "grpo", 1e-3
    c.algorithm.aggregation = "token-mean"
    c.length.mode = "exact" if exact else "both"
    c.length.reward = "lcpo_exact" if exact else "lcpo_max"
    c.length.low, c.length.high = 100, 4000
    c.optimizer.learning_rate = 1e-6 if exact else 4e-6
    return c
