"""LSPO on Qwen3-30B-A3B, a mixture of 128 experts of which a token takes 8, over GSPO.

    python -m jaxrl.train --config=configs/lspo_qwen3_30b_a3b.py:v5p

Preflight, GiB, of a step of 12,288 answers: on v5p:2x2x2 (95.73 a chip) layout 66.25, prefill 81.54, decode 81.43,
score 52.71, update 77.64, 1,106 s by the compiler's estimate (rollout 519, score 140, update 448); on h100:8 (72.68 a
card) layout 49.78, prefill 54.98, decode 54.88, score 37.45, update 63.29, 1,171 s as assumed (rollout 922, score 47,
update 202). With adapters on the attention and an eighth of the step, on v6e:2x4 (31.24 a chip) layout 28.62, prefill
27.99, decode 27.83, score 9.52, update 13.13, 261 s by the estimate.
"""

from configs.pods.recipes import adapters, lspo, pod
from configs.pods.shapes import QWEN3_30B_A3B

CHIPS = {  # argument -> (topology, slots, chips that share the sampler's weights)
    "v5p": ("v5p:2x2x2", 256, 4),
    "v6e": ("v6e:2x4", 128, 4),
    "80": ("h100:8", 256, 4),
}


def get_config(chips: str = "v5p"):
    """chips: v5p (eight), v6e (eight, adapters on the attention), or 80 (one machine of eight cards of 80 GB)."""
    if chips not in CHIPS:
        raise ValueError(f"configs/lspo_qwen3_30b_a3b.py:{chips}: choose {', '.join(CHIPS)}")
    c = lspo(pod("lspo_gspo_30b_a3b", "Qwen3-30B-A3B", QWEN3_30B_A3B, 1024, 3072), "gspo")
    c.topology, c.sampling.slots, c.sampling.tensor = CHIPS[chips]
    c.algorithm.balance_coef = 1e-3
    if chips == "80":
        c.optimizer.state_dtype = "bfloat16"
    if chips == "v6e":
        c.batch.prompts, c.batch.generation_prompts, c.batch.updates = 64, 192, 4
        c.algorithm.balance_coef = 0.0  # routers are frozen
        adapters(c, "int8")
    return c
