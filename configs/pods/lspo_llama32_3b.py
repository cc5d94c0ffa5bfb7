"""LSPO on Llama-3.2-3B-Instruct over DAPO, trained on MATH, answers of up to 3072 tokens.

    python -m jaxrl.train --config=configs/pods/lspo_llama32_3b.py

Smallest slice: v5e:2x4 (v5litepod-8). Preflight on v5e:2x4, GiB of 15.75 a chip: layout 6.90, prefill 14.32, decode
14.42, score 5.52, update 8.85. A step of 12,288 answers, 1,536 tokens on average, takes 1,085 s by the compiler's
estimate (rollout 775, score 64, update 245), 17,403 tokens/s, with pages for 597,412 tokens of cache on each host.
--topology=v6e:2x4 is the next larger.
"""

from configs.pods.recipes import lspo, pod
from configs.pods.shapes import LLAMA_3_2_3B


def get_config():
    c = lspo(pod("lspo_llama32_3b", "Llama-3.2-3B-Instruct", LLAMA_3_2_3B, 1024, 3072), "dapo")
    c.task.data, c.task.template = "math", "chat"
    c.topology = "v5e:2x4"
    c.sampling.slots, c.sampling.tensor = 384, 4
    return c
