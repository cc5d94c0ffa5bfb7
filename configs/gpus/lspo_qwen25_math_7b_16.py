"""The same experiment as lspo_qwen25_math_7b.py on two machines of eight 80 GB cards.

    python -m jaxrl.train --config=configs/gpus/lspo_qwen25_math_7b_16.py:gspo

Preflight on 2xh100:8, GiB of 72.68 a card: layout 26.60, prefill 56.42, decode 56.85, score 13.04, update 19.63. A
step of 12,288 answers, 1,024 tokens on average, takes 114 s as assumed (rollout 61, score 11, update 43), 109,918
tokens/s, with pages for 4,718,592 tokens of cache on each host. An update sends 10.1 GB a card to the other machine,
behind its matrix products.
"""

from configs.gpus import lspo_qwen25_math_7b


def get_config(loss: str = "gspo"):
    """loss: gspo, grpo or dapo."""
    c = lspo_qwen25_math_7b.get_config(loss)
    c.topology = "2xh100:8"
    c.mesh.slices, c.mesh.data, c.mesh.fsdp = 2, 2, 8  # one copy per machine: only gradients cross the network
    return c
