"""What the studies on the embedded task share: chains of up to 10 operands (configs/quickstart.py, up to 8,
reaches 97 %), a short warm start, and four mini-batch updates per rollout, so that clips and gates act.

A run takes 10 to 20 s of one core. All studies use the same labels and the same directory `out`, so that a run that
two studies share, and the warm start of a seed, is made only once.
"""

OUT = "runs/studies"
SEEDS = [0, 1, 2, 3, 4]
STAGES = {"warm start": {"entry": "sft"}}
COMMON = {
    "steps": 30,
    "batch.updates": 4,
    "optimizer.learning_rate": 1e-4,
    # one row a micro-batch: nearly all mini-batches have one shape, and compile once
    "batch.row_tokens": 128,
    "batch.micro_tokens": 128,
    "task.dial.n_max": 10,
    "task.dial.train": 5000,
    "sft.steps": 340,
    "sft.full_steps": 260,
    "sft.batch": 64,
    "eval.every": 6,
    "checkpoint.every": 1000,
    "log.tensorboard": False,
    "log.samples": 0,
}
# prompts sampled at a time: LSPO takes percentiles of the groups that are left of three batches
GENERATED = {"none": 16, "accuracy": 16}


def method(loss: str, selection: str) -> dict:
    return {
        "algorithm.loss": loss,
        "algorithm.selection": selection,
        "batch.generation_prompts": GENERATED.get(selection, 48),
        "start": "warm start",
    }
