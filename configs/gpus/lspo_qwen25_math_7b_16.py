"""The same experiment as lspo_qwen25_math_7b.py on two machines of eight 80 GB cards.

    python -m jaxrl.train --config=configs/gpus/lspo_qwen25_math_7b_16.py:gspo
"""

from configs.gpus import lspo_qwen25_math_7b


def get_config(loss: str = "gspo"):
    """loss: gspo, grpo or dapo."""
    c = lspo_qwen25_math_7b.get_config(loss)
    c.topology = "2xh100:8"
    c.mesh.slices, c.mesh.data, c.mesh.fsdp = 2, 2, 8  # a copy a machine: only gradients cross the network
    return c
