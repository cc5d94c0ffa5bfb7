"""LSPO on Llama-3.2-3B-Instruct over DAPO, trained on MATH, answers of up to 3072 tokens.

    python -m jaxrl.train --config=configs/pods/lspo_llama32_3b.py
"""

from configs.pods.recipes import lspo, pod
from configs.pods.shapes import LLAMA_3_2_3B


def get_config():
    c = lspo(pod("lspo_llama32_3b", "Llama-3.2-3B-Instruct", LLAMA_3_2_3B, 1024, 3072), "dapo")
    c.task.data, c.task.template = "math", "chat"
    c.topology = "v5e:2x4"
    c.sampling.slots, c.sampling.tensor = 48, 4
    return c
