"""The same experiment as lspo_qwen25_math_7b.py on 256 chips of v5p: 64 hosts sample, 256 chips update.

    python -m jaxrl.train --config=configs/pods/lspo_qwen25_math_7b_256.py:gspo

Preflight on v5p:4x8x8, GiB of 95.73 a chip: layout 14.66, prefill 24.92, decode 25.55, score 0.61, update 1.73. A step
of 12,288 answers, 1,024 tokens on average, takes 28 s by the compiler's estimate (rollout 20, score 2, update 6),
455,217 tokens/s, with pages for 786,432 tokens of cache on each host.
"""

from configs.pods import lspo_qwen25_math_7b


def get_config(loss: str = "gspo"):
    """loss: gspo, grpo or dapo."""
    c = lspo_qwen25_math_7b.get_config(loss)
    c.topology = "v5p:4x8x8"
    c.mesh.fsdp, c.mesh.tensor = 64, 4  # 64 rows a micro-batch: a mini-batch of 256 answers does not fill 256 rows
    c.sampling.slots, c.sampling.tensor = 192, 1  # 12288 answers on 64 hosts: each starts all of its own at once
    return c
