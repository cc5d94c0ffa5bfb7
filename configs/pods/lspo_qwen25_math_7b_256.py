"""The same experiment as lspo_qwen25_math_7b.py on 256 chips of v5p: 64 hosts sample, 256 chips update.

    python -m jaxrl.train --config=configs/pods/lspo_qwen25_math_7b_256.py:gspo

Preflight on v5p:4x8x8, GiB of 95.73 a chip: layout 14.66, score 0.61, update 1.73. That leaves room for all its
slots in pages on each host, by arithmetic. In a dense cache of 192 slots a step of 12288 answers of 1024 tokens
takes 33 s by the compiler's estimate (rollout 25, score 2, update 6), 386,007 tokens/s; docs/performance.md has
what is expected of pages.
"""

from configs.pods import lspo_qwen25_math_7b


def get_config(loss: str = "gspo"):
    """loss: gspo, grpo or dapo."""
    c = lspo_qwen25_math_7b.get_config(loss)
    c.topology = "v5p:4x8x8"
    c.mesh.fsdp, c.mesh.tensor = 64, 4  # 64 rows a micro-batch: a mini-batch of 256 answers does not fill 256
    c.sampling.slots, c.sampling.tensor = 192, 1  # 12288 answers on 64 hosts: each starts all of its own at once
    return c
