"""LSPO on Qwen3-4B-Base over DAPO.

    python -m jaxrl.train --config=configs/pods/lspo_qwen3_4b.py

Preflight on v5e:2x4, GiB of 15.75 a chip: layout 8.64, prefill 14.28, decode 14.52, score 6.86, update 11.01. A step
of 12,288 answers, 1,536 tokens on average, takes 1,543 s by the compiler's estimate (rollout 1,110, score 93, update
340), 12,234 tokens/s, with pages for 374,960 tokens of cache on each host.
"""

from configs.pods.recipes import lspo, pod
from configs.pods.shapes import QWEN3_4B


def get_config():
    c = lspo(pod("lspo_qwen3_4b", "Qwen3-4B-Base", QWEN3_4B, 1024, 3072), "dapo")
    c.topology = "v5e:2x4"
    c.sampling.slots, c.sampling.tensor = 224, 4
    return c
