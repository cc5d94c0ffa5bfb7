"""LSPO on Qwen3-4B-Base over DAPO.

    python -m jaxrl.train --config=configs/pods/lspo_qwen3_4b.py

Preflight on v5e:2x4, GiB of 15.75 a chip: layout 8.64, prefill 13.38, decode 13.65, score 6.86; the update was not
compiled in that run.
"""

from configs.pods.recipes import lspo, pod
from configs.pods.shapes import QWEN3_4B


def get_config():
    c = lspo(pod("lspo_qwen3_4b", "Qwen3-4B-Base", QWEN3_4B, 1024, 3072), "dapo")
    c.topology = "v5e:2x4"
    c.sampling.slots, c.sampling.tensor = 32, 4
    return c
