"""What the pod configs share: where a pod run differs from a laptop run, and the published recipes."""

from jaxrl.runtime.config import base_config


def pod(name: str, checkpoint: str, shape: dict, prompt: int, response: int):
    """A base config for a slice: bf16 compute on fp32 parameters, remat, the checkpoint where setup.sh puts it.

    prompt, response: the longest of each, in tokens. All chips form one fsdp axis and a micro-batch is one row a
    chip, so a larger slice needs no other change than its name.
    """
    c = base_config()
    c.run_dir = f"runs/{name}"  # launch.sh sets a gs:// folder
    c.model.path = f"../data/{checkpoint}"
    c.model.shape.update(shape)
    c.model.dtype = "bfloat16"
    c.model.remat = "full"
    c.sampling.max_prompt, c.sampling.max_tokens = prompt, response
    c.sampling.window = 512
    c.batch.row_tokens = -(-(prompt + response) // 512) * 512  # whole blocks of the attention kernel
    c.batch.micro_tokens = c.batch.row_tokens
    c.mesh.data, c.mesh.fsdp = 1, -1
    c.task.name = "math"
    c.checkpoint.every = 10
    c.watchdog.seconds = 3600.0
    c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.weight_decay = 1e-6, 10, 0.1
    c.eval.samples, c.eval.every = 4, 20
    return c


def lspo(c, loss: str):
    """LSPO (2510.01459) as in the authors' script: 512 of 1536 prompts, 8 answers each, 16 updates, the shortest
    30 % and the 65th to 95th percentile of mean length, overlong buffer of 512, on "gspo", "grpo" or "dapo"."""
    if loss not in ("gspo", "grpo", "dapo"):
        raise ValueError(f"LSPO's recipe, loss {loss}: choose gspo, grpo or dapo")
    c.task.data, c.task.eval_data = "dapo-math-17k", "aime25"
    c.batch.prompts, c.batch.generation_prompts, c.batch.group_size = 512, 1536, 8
    c.batch.updates = 16
    c.algorithm.loss = loss
    if loss != "gspo":
        c.algorithm.loss_hyper[loss].update(dict(clip_low=0.2, clip_high=0.28, dual_clip=10.0))
        c.algorithm.aggregation = "token-mean"
    c.algorithm.selection = "lspo"
    c.length.reward = "overlong"
    c.length.hyper.overlong.cache = 512
    return c


def maspo(c, alpha: float):
    """MASPO (2602.17550): DAPO-Math-17K, 512 prompts a step in 16 updates, no KL, sigma 1, beta 0.03.

    alpha: 0.5 for 1.5B, 0.3 from 7B on. Group size and response length of the paper are not published: these
    are DAPO's 16 answers a prompt and the length that the config chooses.
    """
    c.task.data, c.task.eval_data = "dapo-math-17k", "aime24"
    c.batch.prompts, c.batch.group_size, c.batch.updates = 512, 16, 16
    c.algorithm.loss = "maspo"
    c.algorithm.loss_hyper.maspo.alpha = alpha
    c.algorithm.aggregation = "token-mean"
    return c


def adapters(c, base: str):
    """The same run with adapters on every matrix of the layers beside a frozen base (docs/adapters.md): rank 32,
    alpha 32 and ten times the learning rate of full training."""
    c.run_dir = f"{c.run_dir}_lora"
    c.model.lora.rank, c.model.lora.alpha, c.model.lora.base = 32, 32.0, base
    c.optimizer.learning_rate, c.optimizer.weight_decay = 1e-5, 0.0
    return c
