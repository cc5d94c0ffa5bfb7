"""A reasoning model that learns by RL on a laptop CPU, with no download.

    python -m jaxrl.train --config=configs/quickstart.py

A 104k-parameter decoder is warm-started on sloppy demonstrations of the dial task (jaxrl/tasks/dial.py) and
then trained with LSPO selection on top of the chosen loss. Other methods are one flag:

    --config.algorithm.loss=maspo   --config.algorithm.selection=accuracy   --config.seed=1
"""

from jaxrl.runtime.config import base_config


def get_config():
    c = base_config()
    c.run_dir = "runs/quickstart"
    c.steps = 60
    c.model.tokenizer = "dial"
    c.model.shape.update(
        dict(
            hidden_size=64,
            intermediate_size=160,
            num_layers=2,
            num_heads=4,
            num_kv_heads=4,
            head_dim=16,
            rope_theta=1000.0,
            qk_norm=True,
            tie_embeddings=True,
            max_position_embeddings=64,
            model_type="qwen3",
        )
    )
    c.task.name = "dial"
    c.sft.steps, c.sft.full_steps = 700, 560
    c.batch.prompts, c.batch.group_size, c.batch.generation_prompts = 16, 16, 48
    c.batch.max_generation_batches = 3
    c.batch.updates = 2
    c.batch.row_tokens = 48
    c.batch.micro_tokens = 1024
    c.sampling.max_prompt, c.sampling.max_tokens = 16, 24
    c.sampling.slots, c.sampling.chunk, c.sampling.window = 256, 24, 16
    c.algorithm.loss = "dapo"
    c.algorithm.selection = "lspo"
    c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.b2 = 5e-4, 5, 0.95
    return c
