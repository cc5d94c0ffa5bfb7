"""LSPO on Qwen3-4B-Base over DAPO.

    python -m jaxrl.train --config=configs/pods/lspo_qwen3_4b.py

Preflight on v5e:2x4, GiB of 15.75 a chip: layout 8.64, score 6.86, update 11.01. That leaves room for 374,960
tokens of cache in pages on each host, by arithmetic. In a dense cache of 64 slots a step of 12288 answers of 1536
tokens takes 5,041 s by the compiler's estimate (rollout 4604, score 93, update 343), 3,745 tokens/s;
docs/performance.md has what is expected of pages.
"""

from configs.pods.recipes import lspo, pod
from configs.pods.shapes import QWEN3_4B


def get_config():
    c = lspo(pod("lspo_qwen3_4b", "Qwen3-4B-Base", QWEN3_4B, 1024, 3072), "dapo")
    c.topology = "v5e:2x4"
    c.sampling.slots, c.sampling.tensor = 224, 4
    return c
