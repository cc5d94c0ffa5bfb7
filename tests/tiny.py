"""The smallest configuration that trains: the quickstart with a 13k-parameter model and short chains.

A test changes what it is about: `tiny(tmp_path, {"batch.updates": 2})`; a subprocess names this file as --config.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    c = quickstart()
    c.steps = 3
    shape = dict(num_layers=1, hidden_size=32, intermediate_size=64, num_heads=2, num_kv_heads=2)
    c.model.shape.update(shape)
    c.task.dial.n_max, c.task.dial.train = 2, 200
    c.sft.steps, c.sft.full_steps, c.sft.batch, c.sft.learning_rate = 150, 100, 32, 1e-2
    c.batch.prompts, c.batch.group_size, c.batch.generation_prompts = 4, 4, 0
    c.batch.updates = 1
    c.batch.row_tokens, c.batch.micro_tokens = 128, 128  # a small variety of shapes: few compilations
    c.sampling.max_prompt, c.sampling.max_tokens = 8, 12
    c.sampling.slots, c.sampling.chunk, c.sampling.window = 16, 12, 32
    c.algorithm.selection = "none"
    c.eval.every, c.eval.problems = 2, 16
    c.checkpoint.every = 2
    c.log.tensorboard = False
    return c


def tiny(run_dir, changes=(), model=None):
    """The configuration with {dotted key: value} changed, writing to run_dir.

    model: a Hugging Face directory to start from instead of a warm start.
    """
    c = get_config()
    c.run_dir = str(run_dir)
    if model is not None:
        c.model.path, c.model.tokenizer, c.sft.steps = str(model), "", 0
    c.update_from_flattened_dict(dict(changes))
    return c
