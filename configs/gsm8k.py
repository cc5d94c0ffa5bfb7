"""GRPO on GSM8K from a Hugging Face checkpoint and local jsonl files, on CPU, GPU or TPU.

    python -m jaxrl.train --config=configs/gsm8k.py \\
        --config.model.path=MODEL_DIR --config.task.data=gsm8k_train.jsonl.gz --config.task.eval_data=gsm8k_test.jsonl

MODEL_DIR is a Llama, Qwen2 or Qwen3 directory (config.json, safetensors, tokenizer). Random weights of a given
shape with a real tokenizer: `--config=configs/gsm8k.py:random` and `--config.model.tokenizer=TOKENIZER_DIR`.
A model too small to solve anything gets reward 0 everywhere and the accuracy filter keeps nothing; to see updates
all the same: `--config.task.reward=configs.example_reward:numbers --config.algorithm.selection=none`.
"""

from jaxrl.runtime.config import base_config


def get_config(weights: str = "checkpoint"):
    """weights: "checkpoint" (config.model.path) or "random" (a Qwen3 of a few million parameters)."""
    c = base_config()
    c.run_dir = "runs/gsm8k"
    c.steps = 200
    if weights == "random":
        c.model.shape.update(
            dict(
                hidden_size=32,
                intermediate_size=96,
                num_layers=2,
                num_heads=4,
                num_kv_heads=2,
                head_dim=16,
                rope_theta=1e6,
                qk_norm=True,
                tie_embeddings=True,
                max_position_embeddings=2048,
                model_type="qwen3",
            )
        )
    c.task.name = "math"
    c.task.template = "boxed"
    c.task.long_prompts = "drop"
    c.batch.prompts, c.batch.group_size, c.batch.updates = 8, 8, 2
    c.sampling.max_prompt, c.sampling.max_tokens = 256, 256
    c.sampling.slots = 32
    c.algorithm.loss = "dapo"
    c.algorithm.selection = "accuracy"
    c.batch.max_generation_batches = 3
    c.length.reward = "overlong"
    c.optimizer.learning_rate, c.optimizer.warmup_steps = 1e-6, 10
    c.eval.every, c.eval.problems = 50, 64
    return c
