"""The configuration: one tree of defaults, one validation, one way to read it from the command line.

`base_config()` holds every key. A file in configs/ changes some of them in `get_config`; the command line
changes more (`--config.algorithm.loss=maspo`). `validate` runs once, before anything is compiled.
"""

from __future__ import annotations

import os

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxrl.algorithms.advantages import ADVANTAGES
from jaxrl.algorithms.aggregation import AGGREGATIONS
from jaxrl.algorithms.correction import CORRECTIONS
from jaxrl.algorithms.length import LENGTH_REWARDS
from jaxrl.algorithms.losses import LOSSES
from jaxrl.algorithms.selection import SELECTIONS
from jaxrl.errors import UserError
from jaxrl.tasks.data import DUPLICATES
from models.attention import IMPLEMENTATIONS
from models.decoder import REMAT_POLICIES


def base_config() -> ConfigDict:
    """Every key with its default; the comments are the reference for their meaning."""
    c = ConfigDict()
    c.run_dir = "runs/default"
    c.seed = 0
    c.steps = 100  # optimisation steps (rollout batches), not gradient updates
    c.resume = True  # continue from the newest checkpoint of run_dir, if there is one
    c.distributed = False  # call jax.distributed.initialize (several hosts)

    c.model = ConfigDict()
    c.model.path = ""  # Hugging Face directory or run directory; "" = random weights of `shape`
    c.model.shape = ConfigDict()  # DecoderConfig fields, when path is ""
    c.model.shape.update(_SHAPE)
    c.model.tokenizer = ""  # "" = the one beside the model; "dial" = the embedded vocabulary
    c.model.dtype = "float32"  # compute dtype of the learner
    c.model.param_dtype = "float32"  # bfloat16 halves the memory; updates are then rounded stochastically
    c.model.sampler_dtype = ""  # "" = dtype
    c.model.attention = "auto"  # auto, xla, cudnn, splash
    c.model.remat = "none"  # none, dots, full: what the backward pass recomputes per layer

    c.task = ConfigDict()
    c.task.name = "dial"  # dial (embedded), math, choice, user
    c.task.data = ""  # training file (jsonl, jsonl.gz, parquet) or data set name
    c.task.eval_data = ""  # held-out file or name
    c.task.data_dir = ""  # where data set names are looked up as files first
    c.task.problem_field = "problem"
    c.task.answer_field = "answer"
    c.task.id_field = "id"
    c.task.template = "boxed"  # plain, boxed, chat
    c.task.skip_bad_rows = False
    c.task.duplicates = "drop"  # drop, error, keep: rows whose id was used before (counted and printed)
    c.task.long_prompts = "error"  # error, drop
    c.task.reward = ""  # "module:function": reward(problem, completion_text, answer, **info) -> float | None
    c.task.grader_workers = 2
    c.task.grader_timeout = 5.0  # seconds of wall clock per answer
    c.task.max_failures = 0.5  # share of ungraded completions in a step that stops the run
    c.task.dial = ConfigDict(dict(n_min=2, n_max=8, train=20000, max_budget=22))

    c.batch = ConfigDict()
    c.batch.prompts = 16  # groups trained on per step
    c.batch.group_size = 16  # completions per prompt
    c.batch.generation_prompts = 0  # prompts per generation batch; 0 = prompts
    c.batch.max_generation_batches = 10  # per step; 0 = no limit
    c.batch.on_short = "smaller"  # smaller, error: what to do when the limit is reached
    c.batch.greso = False  # skip prompts predicted to give groups without spread (2506.02177)
    c.batch.keep_surplus = False  # keep selected groups beyond `prompts` for the next step
    c.batch.updates = 1  # mini-batches (optimizer updates) per epoch over the batch
    c.batch.epochs = 1
    c.batch.micro_tokens = 8192  # most per micro-batch, padding included; a quarter if a mini-batch fills under four
    c.batch.row_tokens = 0  # packed row length; 0 = the longest prompt plus response

    c.sampling = ConfigDict()
    c.sampling.temperature = 1.0
    c.sampling.top_k = 0
    c.sampling.top_p = 1.0
    c.sampling.min_p = 0.0
    c.sampling.max_prompt = 512
    c.sampling.max_tokens = 512
    c.sampling.slots = 64
    c.sampling.chunk = 64
    c.sampling.window = 64
    c.sampling.carry_over = 0  # > 0: a completion gets so many tokens a generation batch, then waits for the next one
    c.sampling.prefetch = False  # the next batch's prompts fill slots that idle while the last completions finish
    c.sampling.warmup = False  # compile every shape the sampler can need before step 1, not only those that occur
    c.sampling.weights = "same"  # same, int8: matrices of one byte an entry; set algorithm.correction with it
    c.sampling.cache = "same"  # same, int8: keys and values of one byte an entry; set algorithm.correction with it
    c.sampling.tensor = 1  # chips that share one copy of the sampler's weights; a host holds whole copies

    c.algorithm = ConfigDict()
    c.algorithm.loss = "grpo"
    c.algorithm.loss_hyper = _defaults(LOSSES)
    c.algorithm.aggregation = ""  # "" = the loss's own
    c.algorithm.norm_length = 0  # constant of seq-mean-token-sum-norm; 0 = sampling.max_tokens
    c.algorithm.advantage = "grpo"
    c.algorithm.advantage_hyper = _defaults(ADVANTAGES)
    c.algorithm.selection = "none"  # a chain: accuracy+lspo
    c.algorithm.selection_hyper = _defaults(SELECTIONS)
    c.algorithm.kl_coef = 0.0  # > 0 keeps a frozen reference model
    c.algorithm.kl_kind = "k3"  # k1, k2, k3, k1+, k3+
    c.algorithm.kl_in_reward = False  # subtract it from the reward instead of adding it to the loss
    c.algorithm.entropy_coef = 0.0
    c.algorithm.entropy_advantage = False
    c.algorithm.entropy_advantage_alpha = 0.4
    c.algorithm.entropy_advantage_kappa = 2.0
    c.algorithm.correction = "none"  # sampler/learner mismatch
    c.algorithm.correction_hyper = _defaults(CORRECTIONS)

    c.length = ConfigDict()
    c.length.reward = "none"
    c.length.hyper = _defaults(LENGTH_REWARDS)
    c.length.mode = "none"  # budget in the prompt: none, exact, max, both
    c.length.budgets = "uniform"  # uniform, log_uniform
    c.length.low = 100
    c.length.high = 4000
    c.length.count = "response"  # response, thinking: which tokens the length reward counts
    c.length.weight = 1.0  # of the length term: reward = task reward + weight * (length reward - correctness)
    c.length.warmup_steps = 0  # steps in which the weight rises from 0 (Kimi k1.5 warms its term up)

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 1e-6
    c.optimizer.warmup_steps = 0
    c.optimizer.schedule = "constant"  # constant, cosine, linear
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0
    c.optimizer.grad_clip = 1.0
    c.optimizer.state_dtype = "float32"
    c.optimizer.offload = False  # keep the optimizer's moments in host memory

    c.sft = ConfigDict()  # warm start on demonstrations, before step 0
    c.sft.steps = 0
    c.sft.full_steps = 0  # of these, on fully worked demonstrations (dial)
    c.sft.batch = 128
    c.sft.learning_rate = 3e-3
    c.sft.warmup_steps = 20
    c.sft.modes = ()  # budget modes that occur in demonstrations (dial)
    c.sft.data = ""  # jsonl with problem and solution fields, when the task is not dial

    c.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # -1 = whatever is left
    c.mesh.slices = 1  # slices of TPU, or hosts of GPUs, that only `data` shall cross; data is a multiple of it
    c.mesh.sequence_parallel = False  # between blocks, split tokens over the tensor axis
    c.topology = ""  # chips this is meant for, such as v5e:4x4 or h100:8: preflight's default
    c.eval = ConfigDict(dict(every=20, problems=512, samples=1, temperature=1.0, max_tokens=0))
    c.checkpoint = ConfigDict(dict(every=20, keep=2, keep_best=""))
    c.log = ConfigDict(dict(tensorboard=True, wandb=False, wandb_project="jaxrl", samples=2))
    c.watchdog = ConfigDict()
    c.watchdog.seconds = 3600.0  # without progress, before the run dumps its stacks and ends with 76; 0 = off
    c.watchdog.heartbeat = 100  # seconds of silence after which a process of several is given up, and the others end
    c.watchdog.grace = 300.0  # seconds from SIGTERM or Ctrl-C to the exit, saved or not
    c.nonfinite = ConfigDict(dict(max_in_a_row=3))  # skipped updates before going back to a checkpoint, once; 0 = off
    c.compilation_cache = True  # keep compiled programs in the user's cache directory
    return c


_SHAPE = dict(
    vocab_size=0,
    hidden_size=0,
    intermediate_size=0,
    num_layers=0,
    num_heads=0,
    num_kv_heads=0,
    head_dim=0,
    rms_norm_eps=1e-6,
    rope_theta=10000.0,
    qkv_bias=False,
    qk_norm=False,
    tie_embeddings=False,
    max_position_embeddings=2048,
    model_type="llama",
    init_std=0.02,
)


_AT_LEAST = {
    1: "steps task.grader_workers task.dial.train batch.prompts batch.group_size batch.updates batch.epochs "
    "batch.micro_tokens sampling.max_prompt sampling.max_tokens sampling.slots sampling.chunk sampling.window "
    "sampling.tensor mesh.slices length.low sft.batch eval.every eval.samples "
    "checkpoint.every checkpoint.keep watchdog.heartbeat",
    0: "seed task.grader_timeout task.max_failures batch.generation_prompts batch.max_generation_batches "
    "batch.row_tokens sampling.top_k sampling.carry_over algorithm.kl_coef algorithm.norm_length length.warmup_steps "
    "optimizer.learning_rate optimizer.warmup_steps optimizer.weight_decay sft.steps sft.full_steps sft.warmup_steps "
    "eval.problems eval.temperature eval.max_tokens log.samples watchdog.seconds watchdog.grace nonfinite.max_in_a_row",
}


def _defaults(table) -> ConfigDict:
    """The constants of every method of a table, so that each is a key and a flag."""
    return ConfigDict({name: dict(entry.defaults) for name, entry in table.items()})


def parse_config(argv: list[str]) -> ConfigDict:
    """The configuration of a command line: `--config=FILE[:ARG]` and `--config.key=value` overrides.

    Raises UserError, in one line, for a missing file, an unknown key or a value of the wrong type.
    """
    named = [a for a in argv[1:] if a.startswith(("--config=", "-config="))]
    if not named:
        raise UserError("--config is missing; for example --config=configs/quickstart.py")
    path = named[-1].partition("=")[2].partition(":")[0]
    if not os.path.isfile(path):
        raise UserError(f"--config: no such file: {path}")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=argv)
    try:
        rest = values(argv)
        config = values["config"].value
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
        raise UserError(f"--config: {_first_line(e)}") from e
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; settings are --config.key=value")
    return config


def _first_line(error: Exception) -> str:
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    return " ".join(text.split())


def _one_of(config: ConfigDict, key: str, valid) -> None:
    value = get(config, key)
    if value not in valid:
        raise UserError(f"config.{key}={value!r}: choose one of {', '.join(map(str, valid))}")


def get(config: ConfigDict, key: str):
    """The value at a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def _known_keys(config: ConfigDict, base: ConfigDict, path: str = "config") -> None:
    for key, value in config.items():
        if key not in base:
            raise UserError(f"{path}.{key} is not a setting; {path} has {', '.join(sorted(base))}")
        if isinstance(value, ConfigDict) and isinstance(base[key], ConfigDict):
            _known_keys(value, base[key], f"{path}.{key}")


def mismatch_warning(config: ConfigDict) -> str:
    """One line where the sampler rounds and nothing corrects for it; "" where all is well."""
    s = config.sampling
    rounded = " and ".join(f"sampling.{key}=int8" for key in ("weights", "cache") if s[key] == "int8")
    if not rounded or config.algorithm.correction != "none":
        return ""
    return (
        f"warning: with config.{rounded} answers are drawn from a rounded policy, but trained on as if the exact one "
        "had drawn them; config.algorithm.correction=token_tis corrects that"
    )


def validate(config: ConfigDict) -> None:
    """Refuse a configuration that cannot run, before anything is compiled.

    Raises:
      UserError: one line naming the key and what would be valid.
    """
    _known_keys(config, base_config())
    a, b, s = config.algorithm, config.batch, config.sampling
    _one_of(config, "algorithm.loss", sorted(LOSSES))
    _one_of(config, "algorithm.advantage", sorted(ADVANTAGES))
    _one_of(config, "algorithm.correction", sorted(CORRECTIONS))
    _one_of(config, "algorithm.aggregation", ("", *AGGREGATIONS))
    _one_of(config, "algorithm.kl_kind", ("k1", "k2", "k3", "k1+", "k3+"))
    _one_of(config, "length.reward", sorted(LENGTH_REWARDS))
    _one_of(config, "length.mode", ("none", "exact", "max", "both"))
    _one_of(config, "length.budgets", ("uniform", "log_uniform"))
    _one_of(config, "length.count", ("response", "thinking"))
    _one_of(config, "model.remat", sorted(REMAT_POLICIES))
    _one_of(config, "model.attention", ("auto", *IMPLEMENTATIONS))
    _one_of(config, "optimizer.schedule", ("constant", "cosine", "linear"))
    _one_of(config, "task.name", ("dial", "math", "choice", "user"))
    _one_of(config, "task.template", ("plain", "boxed", "chat"))
    _one_of(config, "task.long_prompts", ("error", "drop"))
    _one_of(config, "task.duplicates", DUPLICATES)
    _one_of(config, "batch.on_short", ("smaller", "error"))
    for key in ("sampling.weights", "sampling.cache"):
        _one_of(config, key, ("same", "int8"))
    for key in ("model.dtype", "model.param_dtype", "optimizer.state_dtype"):
        _one_of(config, key, ("float32", "bfloat16"))
    _one_of(config, "model.sampler_dtype", ("", "float32", "bfloat16"))
    for name in a.selection.split("+"):
        if name not in SELECTIONS:
            raise UserError(
                f"config.algorithm.selection={a.selection!r}: {name!r} is none of "
                f"{', '.join(sorted(SELECTIONS))}; join several with +"
            )
    for low, keys in _AT_LEAST.items():
        for key in keys.split():
            if get(config, key) < low:
                raise UserError(f"config.{key}={get(config, key)} must be at least {low}")
    if config.seed >= 2**32:
        raise UserError(f"config.seed={config.seed} must be below 2**32")
    if s.carry_over and not b.keep_surplus:
        raise UserError(
            f"config.sampling.carry_over={s.carry_over} needs batch.keep_surplus=True, or groups that finish beyond "
            "the batch, the short ones, would be lost"
        )
    if 0 < b.row_tokens < s.max_prompt + s.max_tokens:
        raise UserError(
            f"config.batch.row_tokens={b.row_tokens} is below sampling.max_prompt + sampling.max_tokens = "
            f"{s.max_prompt + s.max_tokens}"
        )
    if b.group_size == 1:
        raise UserError(
            f"config.batch.group_size=1: the {a.advantage!r} advantage compares completions of one "
            "prompt and would be zero everywhere; use group_size >= 2"
        )
    if 0 < config.sft.steps <= config.sft.warmup_steps:
        raise UserError(f"config.sft.warmup_steps={config.sft.warmup_steps} must be below sft.steps={config.sft.steps}")
    if 0 < config.sft.steps < config.sft.full_steps:
        raise UserError(f"config.sft.full_steps={config.sft.full_steps} must not be above sft.steps={config.sft.steps}")
    if b.updates > b.prompts * b.group_size:
        raise UserError(
            f"config.batch.updates={b.updates} is more than the {b.prompts * b.group_size} completions"
        )
    if config.task.name != "dial" and not config.task.data:
        raise UserError("config.task.data is empty: name a jsonl, jsonl.gz or parquet file, or a data set")
    if config.task.name == "user" and not config.task.reward:
        raise UserError("config.task.reward is empty: task.name=user needs module:function")
    if config.model.path == "" and config.model.shape.hidden_size < 1:
        raise UserError(
            "config.model.path is empty and config.model.shape.hidden_size is 0: give a directory or a shape"
        )
    if config.model.path and not os.path.isdir(config.model.path):
        raise UserError(f"config.model.path={config.model.path!r} is not a directory")
    if config.length.reward.startswith("lcpo") and config.length.mode == "none":
        raise UserError(
            f"config.length.mode='none': the {config.length.reward} reward needs a budget in the prompt; "
            "use exact, max or both"
        )
    if config.length.mode != "none" and config.task.name != "dial" and config.length.low > config.length.high:
        raise UserError(f"config.length.low={config.length.low} is above length.high={config.length.high}")
    if config.sampling.temperature <= 0:
        raise UserError(f"config.sampling.temperature={s.temperature} must be positive for training")
    if not 0 < s.top_p <= 1 or not 0 <= s.min_p < 1:
        raise UserError(f"config.sampling: top_p={s.top_p} must be in (0, 1], min_p={s.min_p} in [0, 1)")
