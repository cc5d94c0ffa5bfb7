"""MASPO on R1-Distill-Qwen-14B by adapters of rank 32 on eight v5e chips, answers of up to 7168 tokens.

    python -m jaxrl.train --config=configs/lora_r1_distill_14b.py

To train all of its parameters takes v5p chips (configs/pods/maspo_r1_distill_14b.py). The base is int8, and a step
has an eighth of that config's prompts. Preflight on v5e:2x4, GiB of 15.75 a chip: layout below 10.58, prefill 13.81,
decode 14.18, score 4.46, update 9.48, a step of 1,024 answers, 3,584 tokens on average, 1,194 s by the compiler's
estimate.
"""

from configs.pods.recipes import adapters, maspo, pod
from configs.pods.shapes import R1_DISTILL_QWEN_14B


def get_config():
    c = maspo(pod("maspo_r1_distill_14b", "DeepSeek-R1-Distill-Qwen-14B", R1_DISTILL_QWEN_14B, 1024, 7168), 0.3)
    c.topology = "v5e:2x4"
    c.sampling.slots, c.sampling.tensor = 96, 8
    c.batch.prompts, c.batch.updates = 64, 4
    return adapters(c, "int8")
