"""The smallest run in which every part of the state matters: what tests/test_chaos.py kills again and again."""

from configs.quickstart import get_config as quickstart


def get_config():
    c = quickstart()
    c.sft.steps = c.sft.full_steps = 0  # the tests start from a model that is warm-started already
    c.task.dial.n_max, c.task.dial.train = 2, 64
    c.model.shape.update(dict(num_layers=1, hidden_size=32, intermediate_size=64, num_heads=2, num_kv_heads=2))
    # Accuracy and LSPO on small groups: the number of generation batches varies, and groups are left over.
    c.batch.prompts, c.batch.group_size, c.batch.generation_prompts = 2, 4, 4
    c.batch.keep_surplus, c.batch.greso = True, True
    c.batch.row_tokens = c.batch.micro_tokens = 256  # all of a step in one row: one shape to trace at every start
    c.sampling.max_tokens, c.sampling.slots, c.sampling.chunk, c.sampling.window = 12, 16, 4, 8
    c.sampling.carry_over, c.sampling.prefetch = 4, True  # and completions are half done when a step ends
    c.algorithm.selection = "accuracy"
    c.algorithm.kl_coef = 0.01
    c.optimizer.warmup_steps = 10
    c.eval.every, c.eval.problems = 40, 4
    c.checkpoint.every, c.checkpoint.keep_best = 2, "eval/accuracy"
    c.log.tensorboard = False
    return c
