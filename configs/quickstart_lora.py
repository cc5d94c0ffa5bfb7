"""The quickstart with adapters: the warm-started model is frozen, low-rank matrices beside it are trained.

    python -m jaxrl.train --config=configs/quickstart_lora.py [--config.model.lora.base=int8]

LoRA of rank 8 on every matrix of the layers trains a third of what full training does at this size (at 7B and rank 32
it is one percent), and the optimizer holds moments for the adapters alone. They take a larger learning rate.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    c = quickstart()
    c.run_dir = "runs/quickstart_lora"
    c.model.lora.rank, c.model.lora.alpha = 8, 16.0
    c.model.lora.base = "float32"
    c.optimizer.learning_rate = 2e-3
    return c
