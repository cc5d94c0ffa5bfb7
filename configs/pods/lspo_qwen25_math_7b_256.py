"""The same experiment as lspo_qwen25_math_7b.py on 256 chips of v5p: 64 hosts sample, 256 chips update.

    python -m jaxrl.train --config=configs/pods/lspo_qwen25_math_7b_256.py:gspo

Preflight on v5p:4x8x8, GiB of 95.73 a chip: layout 3.95, prefill 14.38, decode 14.72, score 0.61, update 1.73. A step
of 12,288 answers, 1,024 tokens on average, takes 14 s by the compiler's estimate (rollout 7, score 2, update 6),
887,791 tokens/s, with pages for 786,432 tokens of cache on each host.
"""

from configs.pods import lspo_qwen25_math_7b


def get_config(loss: str = "gspo"):
    """loss: gspo, grpo or dapo."""
    c = lspo_qwen25_math_7b.get_config(loss)
    c.topology = "v5p:4x8x8"
    c.mesh.fsdp, c.mesh.tensor = 64, 4  # 64 rows a micro-batch: a mini-batch of 256 answers does not fill 256
    # 12288 answers on 64 hosts: each starts all of its own at once, so that the longest one decides, and a step of few
    # rows is as fast as the weights are read: four chips read a quarter each (28 s a step with tensor 1).
    c.sampling.slots, c.sampling.tensor = 192, 4
    return c
