"""The configuration: one table of all settings, one validation, one way to read it from the command line.

`SETTINGS` holds every key with its default, what it may be, and what it means; `base_config()` and docs/config.md are
made from it. A file in configs/ changes some keys in `get_config`; the command line changes more
(`--config.algorithm.loss=maspo`). `validate` runs once, before anything is compiled.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxrl.algorithms.advantages import ADVANTAGES
from jaxrl.algorithms.aggregation import AGGREGATIONS
from jaxrl.algorithms.control import HELD
from jaxrl.algorithms.correction import CORRECTIONS
from jaxrl.algorithms.greso import GRESO
from jaxrl.algorithms.hyper import Choice, Flag, Integer, Names, Number, Text, Words
from jaxrl.algorithms.kl import KL_KINDS
from jaxrl.algorithms.length import LENGTH_REWARDS
from jaxrl.algorithms.losses import LOSSES
from jaxrl.algorithms.selection import SELECTIONS
from jaxrl.errors import UserError, located
from jaxrl.runtime import storage
from jaxrl.runtime.combinations import impossible
from jaxrl.tasks.answers import UNFINISHED
from jaxrl.tasks.budgets import BUDGET_SAMPLERS
from jaxrl.tasks.data import DUPLICATES
from jaxrl.tasks.dial import MAX_BUDGET, MAX_OPERANDS
from jaxrl.tasks.templates import THINKING
from models.attention import IMPLEMENTATIONS
from models.config import FAMILIES
from models.decoder import REMAT_POLICIES
from models.lora import BASES, TARGETS


def _methods(table: Mapping, default: str) -> Choice:
    return Choice(default, Names(table))


def _optional(meaning: str) -> Text:
    return Text("", f"{meaning}, or empty")


_DTYPES = ("float32", "bfloat16")
_ROUNDED = ("same", "int8")
_MODES = ("exact", "max")
_POSITIVE = dict(low=0, above=True)
_WEIGHT = r"[A-Za-z_]\w*=-?(\d+\.?\d*|\.\d+)(e-?\d+)?"

# the metrics a checkpoint can be kept for: those of evaluation, and what a run without held-out problems has
_BEST = r"|accuracy|reward/mean|eval/((accuracy|(pass|maj)@\d+)(_low|_high)?|(mean|median)_tokens)"

# These may be gs://bucket/... or s3://bucket/...
PATHS = ("run_dir", "model.path", "model.tokenizer", "model.lora.path", "task.data", "task.eval_data", "sft.data")

# key -> (default and what the setting may be, what it means). The constants of methods are in `METHODS`.
SETTINGS: dict[str, tuple[Any, str]] = {
    "run_dir": (Text("runs/default", "a directory, gs://bucket/... or s3://bucket/...", r"(?s).*\S.*"),
        "where the run is kept"),
    "seed": (Integer(0, 0, 2**32 - 1), "seed of all random choices"),
    "steps": (Integer(100, 1),
        "training steps, one rollout batch each; a step has batch.updates x batch.epochs gradient updates"),
    "resume": (Flag(True), "continue from the newest checkpoint of run_dir, if there is one"),
    "distributed": (Flag(False), "join the processes that the launcher started (docs/clusters.md)"),
    "hosts": (Integer(0),
        "processes that must take part; 0: as the launcher says; 1: run alone, whatever the launcher says"),

    "model.path": (_optional("a directory"),
        "Hugging Face directory or run directory; empty: random weights of `model.shape`"),
    "model.shape.vocab_size": (Integer(0), "size of the vocabulary; 0: the tokenizer's"),
    "model.shape.hidden_size": (Integer(0), "width of the model; model.shape is used only while model.path is empty"),
    "model.shape.intermediate_size": (Integer(0), "width of the MLP"),
    "model.shape.num_layers": (Integer(0), "decoder blocks"),
    "model.shape.num_heads": (Integer(0), "query heads"),
    "model.shape.num_kv_heads": (Integer(0), "key and value heads; divides num_heads"),
    "model.shape.head_dim": (Integer(0), "dimension of a head; must be even"),
    "model.shape.rms_norm_eps": (Number(1e-6, **_POSITIVE), "epsilon of RMSNorm, added to the mean square"),
    "model.shape.rope_theta": (Number(10000.0, **_POSITIVE), "base of the rotary position embedding"),
    "model.shape.qkv_bias": (Flag(False), "biases on query, key and value projections, as in Qwen2"),
    "model.shape.qk_norm": (Flag(False), "RMSNorm on queries and keys, as in Qwen3"),
    "model.shape.num_experts": (Integer(0),
        "experts per layer of a mixture of experts (model_type qwen3_moe); 0: one dense MLP"),
    "model.shape.experts_per_token": (Integer(0), "experts that a token is routed to"),
    "model.shape.expert_size": (Integer(0), "width of an expert's MLP"),
    "model.shape.normalise_experts": (Flag(False), "scale the routing weights of a token's experts to a sum of 1"),
    "model.shape.tie_embeddings": (Flag(False), "use the embedding as the output matrix"),
    "model.shape.max_position_embeddings": (Integer(2048, 1), "context length in tokens"),
    "model.shape.model_type": (_methods(FAMILIES, "llama"), "model family that the weights are exported as"),
    "model.shape.init_std": (Number(0.02, **_POSITIVE), "standard deviation of randomly initialised matrices"),
    "model.tokenizer": (_optional("a directory, or dial"),
        "empty: the tokenizer in model.path; dial: the built-in vocabulary of the dial task"),
    "model.dtype": (Choice("float32", _DTYPES), "compute dtype of the learner"),
    "model.products": (Choice("", ("", "bfloat16")),
        "dtype that the inputs of matrix products are rounded to, except in attention and experts; empty: model.dtype"),
    "model.param_dtype": (Choice("float32", _DTYPES),
        "dtype of the parameters; bfloat16 halves their memory, and updates are then rounded stochastically"),
    "model.sampler_dtype": (Choice("", ("", *_DTYPES)), "compute dtype of the sampler; empty: model.dtype"),
    "model.attention": (Choice("auto", ("auto", *IMPLEMENTATIONS)),
        "attention of training; auto: xla on CPU, cudnn on GPU, splash on TPU; triton (GPU): less memory in long rows"),
    "model.remat": (_methods(REMAT_POLICIES, "none"), "what the backward pass recomputes in each layer"),

    "model.lora.rank": (Integer(0),
        "rank of the adapters, which are trained while the model is frozen; 0: train the whole model"),
    "model.lora.alpha": (Number(32.0, **_POSITIVE), "the output of the adapters is scaled by alpha / rank"),
    "model.lora.rslora": (Flag(False), "scale by alpha / sqrt(rank) instead (2312.03732)"),
    "model.lora.targets": (Words(("all",), TARGETS), "matrices of the layers that get an adapter"),
    "model.lora.base": (Choice("bfloat16", BASES),
        "storage dtype of the frozen model; int8: of the matrices of its layers, the rest is bfloat16"),
    "model.lora.path": (_optional("a PEFT directory"),
        "adapters to start from; their own rank, alpha and targets are used"),

    "task.name": (Choice("dial", ("dial", "math", "choice", "user")), "dial is built in; user needs task.reward"),
    "task.data": (_optional("a file (jsonl, jsonl.gz, parquet) or data set name"), "training problems"),
    "task.eval_data": (_optional("a file (jsonl, jsonl.gz, parquet) or data set name"), "held-out problems"),
    "task.data_dir": (_optional("a directory"),
        "folder that is searched for a file of a data set's name before the hub"),
    "task.problem_field": (Text("problem", "a field's name", r"(?s).+"), "field of a data row that holds the question"),
    "task.answer_field": (Text("answer", "a field's name", r"(?s).+"),
        "field of a data row that holds the reference answer"),
    "task.id_field": (Text("id", "a field's name", r"(?s).+"), "field of a data row that holds its id"),
    "task.template": (Choice("boxed", ("plain", "boxed", "chat")), "how a problem becomes a prompt"),
    "task.system_prompt": (Text(""), "system message before the conversation, for template chat"),
    "task.enable_thinking": (Choice("default", tuple(THINKING)),
        "thinking switch of a chat template that has one (Qwen3); default: the switch is not passed"),
    "task.skip_bad_rows": (Flag(False), "leave out rows that cannot be read, instead of stopping"),
    "task.duplicates": (Choice("drop", tuple(DUPLICATES)),
        "what to do with rows whose id occurred before; drop keeps the first and prints how many it dropped"),
    "task.long_prompts": (Choice("error", ("error", "drop")),
        "what to do with prompts longer than sampling.max_prompt; drop: leave them out"),
    "task.reward": (
        Text("", "module:function, or empty", r"|[\w.]+:\w+"),
        "reward(problem, completion_text, answer, **info) -> float, or dict name -> float",
    ),
    "task.unfinished_thinking": (Choice("wrong", UNFINISHED),
        "a response that ends inside <think> counts as without an answer, or is graded with the text of its thinking"),
    "task.need_marker": (Flag(False),
        "answers count only in boxes, <answer>, #### or after 'answer is'; a bare last number does not"),
    "task.grader_workers": (Integer(2, 1), "grader processes"),
    "task.grader_timeout": (Number(5.0, **_POSITIVE), "seconds of wall clock per answer"),
    "task.max_failures": (Number(0.5, 0, 1), "stop the run if a larger share of a step's completions cannot be graded"),
    "task.dial.n_min": (Integer(2, 2, MAX_OPERANDS), "fewest operands"),
    "task.dial.n_max": (Integer(8, 2, MAX_OPERANDS), "most operands"),
    "task.dial.train": (Integer(20000, 1), "training problems"),
    "task.dial.max_budget": (Integer(22, 4, MAX_BUDGET), "largest length budget"),

    "batch.prompts": (Integer(16, 1), "groups trained on per step"),
    "batch.group_size": (Integer(16, 2), "completions per prompt; the advantage compares them with each other"),
    "batch.generation_prompts": (Integer(0), "prompts per generation batch; 0: batch.prompts"),
    "batch.max_generation_batches": (Integer(10), "most generation batches per step; 0: no limit"),
    "batch.on_short": (Choice("smaller", ("smaller", "error")),
        "when that limit is reached: train on fewer groups, or stop with an error"),
    "batch.greso": (Flag(False),
        "skip prompts whose groups will probably be all correct or all wrong (GRESO, 2506.02177)"),
    "batch.greso_hyper.start": (GRESO["start"], "initial probability of sampling a prompt again after one such group"),
    "batch.greso_hyper.step": (GRESO["step"], "change of the probabilities after each generation batch"),
    "batch.greso_hyper.low": (GRESO["low"], "lowest probability"),
    "batch.greso_hyper.high": (GRESO["high"], "highest probability"),
    "batch.greso_hyper.floor": (GRESO["floor"], "lowest probability after many such groups in a row"),
    "batch.greso_hyper.target_easy": (GRESO["target_easy"], "target share of groups that are all correct"),
    "batch.greso_hyper.target_hard": (GRESO["target_hard"], "target share of groups that are all wrong"),
    "batch.keep_surplus": (Flag(False), "keep selected groups beyond batch.prompts for the next step"),
    "batch.updates": (Integer(1, 1), "mini-batches (optimizer updates) per epoch over the batch"),
    "batch.epochs": (Integer(1, 1), "passes over the batch in a step"),
    "batch.micro_tokens": (Integer(8192, 1),
        "most tokens per micro-batch, padding included; a quarter if a mini-batch fills fewer than four"),
    "batch.row_tokens": (Integer(0),
        "tokens of a packed row; 0: sampling.max_prompt + max_tokens, rounded up to a multiple of 128"),
    "batch.share_prompts": (Flag(False),
        "pack the responses to one prompt behind a single copy of it; pays where prompts are long"),

    "sampling.temperature": (Number(1.0, **_POSITIVE), "temperature in training; evaluation has its own"),
    "sampling.top_k": (Integer(0), "sample from the k most likely tokens; 0: off"),
    "sampling.top_p": (Number(1.0, 0, 1, above=True),
        "sample from the most likely tokens that reach this total probability; 1: off"),
    "sampling.min_p": (Number(0.0, 0, 1, below=True), "drop tokens below min_p times the largest probability; 0: off"),
    "sampling.replay": (Flag(False), "compute old and new log-probs over the tokens that top_k, top_p and min_p kept"),
    "sampling.router_replay": (Flag(False),
        "the learner uses the experts that the sampler chose for each token of a response"),
    "sampling.max_prompt": (Integer(512, 1), "longest prompt in tokens"),
    "sampling.max_tokens": (Integer(512, 1), "longest response in tokens"),
    "sampling.slots": (Integer(64, 1), "completions decoded at once, on all chips of a host together"),
    "sampling.chunk": (Integer(64, 1), "decode steps per call"),
    "sampling.prefill_chunk": (Integer(2048),
        "prefill a prompt this many tokens at a time, with decoding in between; 0: all at once"),
    "sampling.window": (Integer(64, 1), "the cache length that decoding reads grows in multiples of this many tokens"),
    "sampling.pages": (Integer(-1, -1),
        "tokens per page of a paged KV cache; 0: dense cache; -1: 64 where the chip has a kernel for pages, else 0"),
    "sampling.cache_tokens": (Integer(0),
        "tokens that all pages hold, on all chips of a host together; 0: what its memory has room for, at most "
        "what all slots at full length need"),
    "sampling.carry_over": (Integer(0),
        "above 0: a completion gets at most this many tokens per generation batch and continues in the next"),
    "sampling.prefetch": (Flag(False),
        "slots that idle while the last completions finish start prompts of the next generation batch"),
    "sampling.warmup": (Flag(False),
        "compile what slots or more answers can need before step 1, instead of each shape when it first occurs"),
    "sampling.weights": (Choice("same", _ROUNDED),
        "int8: matrices with one byte per entry; set algorithm.correction with it"),
    "sampling.cache": (Choice("same", _ROUNDED),
        "int8: keys and values with one byte per entry; set algorithm.correction with it"),
    "sampling.tensor": (Integer(1, 1),
        "chips that share one copy of the sampler's weights; each host holds whole copies"),

    "algorithm.loss": (_methods(LOSSES, "grpo"), "policy loss (docs/algorithms.md)"),
    "algorithm.aggregation": (Choice("", ("", *AGGREGATIONS)),
        "how token losses become one number; empty: the loss's own"),
    "algorithm.norm_length": (Integer(0),
        "length in tokens that seq-mean-token-sum-norm divides by; 0: sampling.max_tokens"),
    "algorithm.advantage": (_methods(ADVANTAGES, "grpo"), "how the rewards of a group become advantages"),
    "algorithm.selection": (Text("none", "rules joined by +, as in accuracy+lspo"),
        "which responses are trained on; the rules run from left to right"),
    "algorithm.kl_coef": (Number(0.0), "weight of the KL divergence to a frozen reference model; 0: off"),
    "algorithm.kl_kind": (Choice("k3", KL_KINDS), "estimator of the KL divergence"),
    "algorithm.kl_value_clamp": (Number(10.0), "upper bound of a token's k3, as in verl; 0: off, as in TRL"),
    "algorithm.kl_unbiased": (Flag(False), "weight the KL loss by pi / pi_old (TRL's use_bias_correction_kl)"),
    "algorithm.kl_in_reward": (Flag(False), "subtract the KL term from the reward instead of adding it to the loss"),
    "algorithm.balance_coef": (Number(0.0, 0.0),
        "weight of the load-balancing loss of a mixture of experts (2101.03961)"),
    "algorithm.entropy_coef": (Number(0.0, -math.inf),
        "weight of the entropy bonus; a negative weight lowers the entropy"),
    "algorithm.entropy_advantage": (Flag(False), "add an entropy term to the advantages (Entropy-Adv, 2506.14758)"),
    "algorithm.entropy_advantage_alpha": (Number(0.4), "weight of the entropy in that term"),
    "algorithm.entropy_advantage_kappa": (Number(2.0, 1, above=True), "that term is at most abs(advantage) / kappa"),
    "algorithm.correction": (_methods(CORRECTIONS, "none"), "correction of the mismatch between sampler and learner"),

    "rewards.weights": (Text("", "text such as correct=1,length=0.5, or empty", rf"|{_WEIGHT}(,{_WEIGHT})*"),
        "weights in the sum of the named rewards: correct, length, format, those of task.reward; 1 for those not "
        "given here, but format counts only if given"),

    "length.reward": (_methods(LENGTH_REWARDS, "none"), "how correctness and length become a reward"),
    "length.mode": (Choice("none", ("none", *_MODES, "both")),
        "how the prompt states a budget: not at all, exactly so many tokens, at most so many, or one of the two at "
        "random"),
    "length.budgets": (Choice("uniform", BUDGET_SAMPLERS), "how budgets are drawn"),
    "length.low": (Integer(100, 1), "smallest budget in tokens (dial has its own)"),
    "length.high": (Integer(4000, 1), "largest budget in tokens"),
    "length.count": (Choice("response", ("response", "thinking")), "which tokens the length reward counts"),
    "length.weight": (Number(1.0), "of the length term: reward = task reward + weight * (length reward - correctness)"),
    "length.warmup_steps": (Integer(0), "steps over which the weight rises from 0 (as Kimi k1.5 does)"),
    "length.control.target": (Choice("none", ("none", *HELD)),
        "quantity held at a value by a factor that is adapted after every step; works with any length reward"),
    "length.control.steers": (Choice("weight", ("weight", "budget")), "what the factor multiplies"),
    "length.control.value": (Number(0.0),
        "the value; length: mean tokens; violations: share above the budget; accuracy: how far below the baseline "
        "it may fall"),
    "length.control.baseline": (Number(0.0, 0, 1), "accuracy to compare with; 0: that of the first step measured"),
    "length.control.rate": (Number(0.5, **_POSITIVE), "change of the factor's logarithm per step for an error of 1"),
    "length.control.low": (Number(0.01, 0, 1, above=True), "smallest factor"),
    "length.control.high": (Number(10.0, 1), "largest factor"),

    "optimizer.learning_rate": (Number(1e-6), "peak learning rate, after the warm-up"),
    "optimizer.warmup_steps": (Integer(0), "updates until the peak learning rate is reached"),
    "optimizer.schedule": (Choice("constant", ("constant", "cosine", "linear")),
        "cosine and linear fall to 0 at the last update"),
    "optimizer.b1": (Number(0.9, 0, 1, below=True), "decay of AdamW's first moment"),
    "optimizer.b2": (Number(0.999, 0, 1, below=True), "decay of AdamW's second moment"),
    "optimizer.eps": (Number(1e-8, 1e-30), "epsilon of AdamW; must not vanish in float32"),
    "optimizer.weight_decay": (Number(0.0), "weight decay of matrices; norms and biases have none"),
    "optimizer.grad_clip": (Number(1.0), "largest global gradient norm; 0: no clipping"),
    "optimizer.state_dtype": (Choice("float32", _DTYPES), "dtype of AdamW's moments"),
    "optimizer.offload": (Flag(False), "keep AdamW's moments in host memory"),

    "sft.steps": (Integer(0), "steps of a supervised warm start on demonstrations, before step 0"),
    "sft.full_steps": (Integer(0), "how many of these use fully worked demonstrations (dial)"),
    "sft.batch": (Integer(128, 1), "demonstrations per step"),
    "sft.learning_rate": (Number(3e-3), "peak learning rate, with cosine decay"),
    "sft.warmup_steps": (Integer(20), "updates until the peak learning rate is reached; must be below sft.steps"),
    "sft.modes": (Words((), _MODES), "budget modes that occur in demonstrations (dial)"),
    "sft.data": (_optional("a file"), "rows with problem and solution fields, when the task is not dial"),
    "sft.budget_share": (Number(0.5, 0, 1),
        "share of the rows with a budget mode whose prompt asks for about the length of their solution"),
    "sft.budget_error": (Number(0.33, 0), "how far such a budget may be off, as a fraction of the length"),

    "mesh.data": (Integer(-1, 1, off=-1), "replicas of the model; -1: all remaining chips"),
    "mesh.fsdp": (Integer(1, 1, off=-1), "chips that parameters and batch rows are split over"),
    "mesh.expert": (Integer(1, 1, off=-1),
        "chips that the experts of a mixture are split over; 1: experts are split over fsdp"),
    "mesh.tensor": (Integer(1, 1, off=-1), "chips that heads, MLP and vocabulary are split over"),
    "mesh.slices": (Integer(1, 1),
        "TPU slices or GPU hosts; only the data axis crosses them, so mesh.data must be a multiple"),
    "mesh.sequence_parallel": (Flag(False), "between blocks, split tokens over the tensor axis"),
    "topology": (_optional("chips such as v5e:4x4 or h100:8"), "chips that preflight compiles for by default"),
    "eval.every": (Integer(20, 1), "steps between evaluations"),
    "eval.problems": (Integer(512), "held-out problems per evaluation"),
    "eval.samples": (Integer(1, 1), "completions per problem"),
    "eval.temperature": (Number(1.0), "sampling temperature; 0: greedy"),
    "eval.max_tokens": (Integer(0), "longest response in tokens; 0: sampling.max_tokens"),
    "checkpoint.every": (Integer(20, 1), "steps between checkpoints"),
    "checkpoint.keep": (Integer(2, 1), "how many of the newest checkpoints are kept"),
    "checkpoint.keep_best": (
        Text("", "a metric such as eval/accuracy, eval/pass@8, accuracy or reward/mean, or empty", _BEST),
        "the checkpoint where this metric is highest is kept, too"),
    "log.tensorboard": (Flag(True), "write TensorBoard event files"),
    "log.wandb": (Flag(False), "log to Weights & Biases; needs the package wandb"),
    "log.wandb_project": (Text("jaxrl", "a name", r"(?s).+"), "project of Weights & Biases"),
    "log.samples": (Integer(2),
        "groups per step written to samples/ for the report: this many kept ones and as many dropped ones"),
    "watchdog.seconds": (Number(3600.0, 0, 1e8),
        "seconds without progress after which the run dumps its stacks and exits with 76; 0: off"),
    "watchdog.heartbeat": (Integer(100, 1),
        "seconds of silence after which one of several processes counts as lost, and the others exit"),
    "watchdog.grace": (Number(300.0), "most seconds from SIGTERM or Ctrl-C to the exit, saved or not"),
    "nonfinite.max_in_a_row": (Integer(3),
        "after this many skipped updates in a row, go back to a checkpoint, once; 0: never"),
    "compilation_cache": (Flag(True),
        "keep compiled programs: in the user's cache folder, or beside the run if it is in a bucket"),
}

# The constants of every method, chosen or not: config.algorithm.loss_hyper.dapo.clip_high.
METHODS = {
    "algorithm.loss_hyper": LOSSES,
    "algorithm.advantage_hyper": ADVANTAGES,
    "algorithm.selection_hyper": SELECTIONS,
    "algorithm.correction_hyper": CORRECTIONS,
    "length.hyper": LENGTH_REWARDS,
}

# Settings that have another name now, old -> new; an entry stays for one release.
MOVED: dict[str, str] = {}


def settings() -> dict[str, Any]:
    """What every key may be: those of SETTINGS and the constants of all methods."""
    found = {key: setting for key, (setting, _) in SETTINGS.items()}
    for section, table in METHODS.items():
        for name, entry in table.items():
            found |= {f"{section}.{name}.{constant}": kind for constant, kind in entry.constants.items()}
    return found


def base_config() -> ConfigDict:
    """Every key with its default."""
    values = {key: setting.default for key, (setting, _) in SETTINGS.items()}
    for section, table in METHODS.items():
        values |= {f"{section}.{name}": entry.defaults for name, entry in table.items()}
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return ConfigDict(tree)


def parse_config(argv: list[str]) -> ConfigDict:
    """The configuration of a command line: `--config=FILE[:ARG]` and `--config.key=value` overrides.

    Raises UserError, in one line, for a missing file, an unknown key or a value of the wrong type.
    """
    named = [a for a in argv[1:] if a.startswith(("--config=", "-config="))]
    if not named:
        raise UserError("--config is missing; write --config=FILE, for example --config=configs/quickstart.py")
    path = named[-1].partition("=")[2].partition(":")[0]
    if not os.path.isfile(path):
        raise UserError(f"--config: no such file: {path}")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True, sys_argv=argv)
    try:
        rest = values(argv)
        config = values["config"].value
    except Exception as e:  # the config file is code
        base = base_config()  # after the file was run, which may add methods
        for arg in argv[1:]:
            if override := re.match(r"--?(?:no)?config\.([^=]+)", arg):
                _known_key(override[1], base)
        raise UserError(f"--config: {located(e, path)}") from e
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config: get_config() of {path} must return a configuration, not {config!r}")
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}; settings are --config.key=value")
    return config


def get(config: ConfigDict, key: str):
    """The value at a dotted key."""
    for part in key.split("."):
        config = config[part]
    return config


def _known_key(key: str, base: ConfigDict) -> None:
    """UserError for a dotted key that is not in `base`: its new name, or what its section has."""
    if key in MOVED:
        raise UserError(f"config.{key} is called config.{MOVED[key]} now")
    inner, path = base, "config"
    for part in key.split("."):
        if not isinstance(inner, ConfigDict) or part not in inner:
            has = ", ".join(sorted(inner)) if isinstance(inner, ConfigDict) else ""
            raise UserError(f"config.{key} is not a setting; {path} has {has or 'no keys'}")
        inner, path = inner[part], f"{path}.{part}"


def _flat(tree: dict, path: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything below."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value


def mismatch_warning(config: ConfigDict) -> str:
    """A line of warning if the sampler is quantised and nothing corrects for that; else ""."""
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
    known, values = settings(), dict(_flat(config.to_dict()))
    for key in values:
        if key not in known:
            _known_key(key, base_config())
    for key, setting in known.items():
        if key not in values:
            raise UserError(f"config.{key} is missing; start from jaxrl.runtime.config.base_config()")
        if not setting.accepts(values[key]):
            raise UserError(f"config.{key}={values[key]!r} must be {setting}")
    for section, table in METHODS.items():
        for name, entry in table.items():
            if entry.ordered and (problem := entry.problem(get(config, section)[name])):
                raise UserError(f"config.{section}.{name}.{problem}")
    for key in PATHS:
        storage.as_path(get(config, key), f"config.{key}")
    for problem in impossible(config):
        raise UserError(f"config.{problem}")
