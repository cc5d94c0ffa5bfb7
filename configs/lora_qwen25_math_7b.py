"""LSPO on Qwen2.5-Math-7B by adapters of rank 32, on little: a card of 48 or 80 GB, or four v5e chips.

    python -m jaxrl.train --config=configs/lora_qwen25_math_7b.py:80

An eighth of the paper's step, 1,536 answers. Preflight, GiB: on a6000:1 (int8 base, 43.61 a card) layout 37.39,
decode 37.56, score 9.92, update 11.61, a step 1,375 s as assumed; on h100:1 (bfloat16 base, 72.68 a card) layout
43.46, decode 50.77, score 16.05, update 17.53, a step 240 s; on v5e:2x2 (int8 base, 15.75 a chip) layout below 10.73,
prefill 9.75, decode 10.09, score 3.85, update 5.40, a step 294 s by the compiler's estimate.
"""

from configs.pods.recipes import adapters, lspo, pod
from configs.pods.shapes import QWEN25_MATH_7B

CHIPS = {  # argument -> (topology, base, slots, chips that share the sampler's weights)
    "48": ("a6000:1", "int8", 64, 1),
    "80": ("h100:1", "bfloat16", 96, 1),
    "v5e": ("v5e:2x2", "int8", 64, 4),
}


def get_config(chips: str = "80"):
    """chips: 48 or 80 (GB of the one card), or v5e (2x2)."""
    if chips not in CHIPS:
        raise ValueError(f"configs/lora_qwen25_math_7b.py:{chips}: choose {', '.join(CHIPS)}")
    c = lspo(pod("lspo_gspo_7b", "Qwen2.5-Math-7B", QWEN25_MATH_7B, 2048, 2048), "gspo")
    c.topology, base, c.sampling.slots, c.sampling.tensor = CHIPS[chips]
    c.batch.prompts, c.batch.generation_prompts, c.batch.updates = 64, 192, 4
    return adapters(c, base)
