"""Settings that are each valid, but impossible together."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from ml_collections import ConfigDict

from jaxrl.algorithms.losses import LOSSES
from jaxrl.algorithms.selection import SELECTIONS
from jaxrl.runtime import storage


def impossible(config: ConfigDict) -> Iterator[str]:
    """One line for each setting that would raise later or be ignored: the key, its value, and what would be valid."""
    yield from _batches(config)
    yield from _tasks(config)
    yield from impossible_methods(config)


def _batches(config: ConfigDict) -> Iterator[str]:
    """What does not fit together in batch, sampling, model, mesh, optimizer and warm start."""
    b, s, o, sft = config.batch, config.sampling, config.optimizer, config.sft
    longest, updates = s.max_prompt + s.max_tokens, config.steps * b.updates * b.epochs
    if s.cache_tokens and s.pages == 0:
        yield f"sampling.cache_tokens={s.cache_tokens} is the room of pages, but sampling.pages is 0"
    if s.carry_over and not b.keep_surplus:
        yield (
            f"sampling.carry_over={s.carry_over} needs batch.keep_surplus=True, or groups that finish beyond "
            "the batch, the short ones, would be lost"
        )
    if 0 < b.row_tokens < longest:
        yield f"batch.row_tokens={b.row_tokens} is below sampling.max_prompt + sampling.max_tokens = {longest}"
    if b.updates > b.prompts * b.group_size:
        yield f"batch.updates={b.updates} is more than the {b.prompts * b.group_size} completions"
    if o.schedule != "constant" and updates <= o.warmup_steps:
        yield (
            f"optimizer.schedule={o.schedule!r} decays to zero at update {updates}, which must be after "
            f"optimizer.warmup_steps={o.warmup_steps}"
        )
    if 0 < sft.steps <= sft.warmup_steps:
        yield f"sft.warmup_steps={sft.warmup_steps} must be below sft.steps={sft.steps}"
    if 0 < sft.steps < sft.full_steps:
        yield f"sft.full_steps={sft.full_steps} must not be above sft.steps={sft.steps}"
    if config.model.path == "" and config.model.shape.hidden_size < 1:
        yield "model.path is empty and config.model.shape.hidden_size is 0: give a directory or a shape"
    if config.model.path and not _directory(config.model.path):
        yield f"model.path={config.model.path!r} is not a directory"
    lora = config.model.lora
    if lora.path and lora.rank:
        yield f"model.lora.rank={lora.rank}: the adapters in model.lora.path have a rank of their own; leave it at 0"
    if not lora.targets:
        yield "model.lora.targets is empty: name matrices, attention, mlp or all"
    if lora.path and not _directory(lora.path):
        yield f"model.lora.path={lora.path!r} is not a directory"
    if [config.mesh[axis] for axis in ("data", "fsdp", "expert", "tensor")].count(-1) > 1:
        yield "mesh: at most one of data, fsdp, expert and tensor may be -1 (the rest)"


def _directory(path: str) -> bool:
    """Whether this is a directory. True for any path of an object store, which is asked only once, later."""
    return storage.is_remote(path) or os.path.isdir(path)


def _tasks(config: ConfigDict) -> Iterator[str]:
    """What does not fit together in task, length budgets, warm start and evaluation."""
    t, sft, length = config.task, config.sft, config.length
    if (k := re.search(r"^eval/.*@(\d+)", config.checkpoint.keep_best)) and int(k[1]) > config.eval.samples:
        yield f"checkpoint.keep_best={config.checkpoint.keep_best!r} needs eval.samples={k[1]} or more"
    for key, off in (("system_prompt", ""), ("enable_thinking", "default")):
        if t[key] != off and (t.template != "chat" or t.name == "dial"):
            yield f"task.{key}={t[key]!r} needs task.template=chat and a task other than dial"
    if t.name == "dial":
        d, working = t.dial, 2 * t.dial.n_max + 1
        if d.n_min > d.n_max:
            yield f"task.dial.n_min={d.n_min} is above task.dial.n_max={d.n_max}"
        if length.mode == "both":
            yield "length.mode='both': the dial task takes exact or max"
        if length.mode != "none" and d.max_budget < working:
            yield f"task.dial.max_budget={d.max_budget} is below the {working} tokens that {d.n_max} operands need"
        if sft.steps and not sft.data and config.sampling.max_tokens < working:
            yield (
                f"sampling.max_tokens={config.sampling.max_tokens} is below the {working} tokens of a demonstration "
                f"with {d.n_max} operands"
            )
        return
    if not t.data:
        yield "task.data is empty: name a jsonl, jsonl.gz or parquet file, or a data set"
    if t.name == "user" and not t.reward:
        yield "task.reward is empty: task.name=user needs module:function"
    if sft.steps and not sft.data:
        yield f"sft.data is empty: sft.steps={sft.steps} needs a file of demonstrations"
    if length.low > length.high:
        yield f"length.low={length.low} is above length.high={length.high}"
    if config.checkpoint.keep_best.startswith("eval/") and not t.eval_data:
        yield f"checkpoint.keep_best={config.checkpoint.keep_best!r} needs held-out problems, task.eval_data"


def impossible_methods(config: ConfigDict) -> Iterator[str]:
    """What does not fit together in selection, length reward and KL term."""
    a, length = config.algorithm, config.length
    for name in a.selection.split("+"):
        if name not in SELECTIONS:
            yield (
                f"algorithm.selection={a.selection!r}: {name!r} is none of {', '.join(sorted(SELECTIONS))}; "
                "join several with +"
            )
    if length.reward.startswith("lcpo") and length.mode == "none":
        yield f"length.mode='none': the {length.reward} reward needs a budget in the prompt; use exact, max or both"
    if length.reward == "lcpo_exact" and length.mode in ("max", "both"):
        yield f"length.mode={length.mode!r}: the lcpo_exact reward scores mode exact only; lcpo_max scores both"
    overlong = length.hyper.overlong
    if length.reward == "overlong" and overlong.cache > (overlong.max_length or config.sampling.max_tokens):
        yield (
            f"length.hyper.overlong.cache={overlong.cache} is above the limit of "
            f"{overlong.max_length or config.sampling.max_tokens} tokens"
        )
    s = config.sampling
    if s.replay and not (s.top_k or s.top_p < 1 or s.min_p):
        yield "sampling.replay=True needs sampling.top_k, top_p or min_p: without one nothing is cut off"
    if s.replay and (a.kl_coef or (a.loss in LOSSES and "ref_logp" in LOSSES[a.loss].needs)):
        yield (
            f"sampling.replay=True: algorithm.kl_coef={a.kl_coef} or loss {a.loss} compares with a reference model, "
            "whose kept sets nobody knows; set algorithm.kl_coef=0 and a loss without one"
        )
    greso = config.batch.greso_hyper
    if not greso.low <= greso.start <= greso.high:
        yield f"batch.greso_hyper.start={greso.start} must be between low={greso.low} and high={greso.high}"
    if a.kl_unbiased and (a.kl_in_reward or not a.kl_coef):
        yield "algorithm.kl_unbiased=True is about a KL loss: algorithm.kl_coef above 0, algorithm.kl_in_reward=False"
    if a.kl_in_reward and not a.kl_coef:
        yield "algorithm.kl_in_reward=True needs algorithm.kl_coef above 0"
    if a.kl_in_reward and a.advantage == "gdpo":
        yield "algorithm.kl_in_reward=True: advantage gdpo reads the named rewards, which do not hold the KL"
    yield from _rewards(config)
    yield from _control(config)


def _control(config: ConfigDict) -> Iterator[str]:
    """What does not fit together in the control of the length weight or the budgets."""
    length, control = config.length, config.length.control
    if control.target == "none":
        return
    if control.steers == "weight" and length.reward == "none":
        yield "length.control.steers='weight' needs a length reward: config.length.reward is none"
    if control.steers == "budget" and (length.mode == "none" or config.task.name == "dial"):
        yield "length.control.steers='budget' needs budgets drawn in length.low to high: length.mode, not task dial"
    if control.target in ("accuracy", "violations") and control.value > 1:
        yield f"length.control.value={control.value} must be a share, at most 1, for target {control.target}"
    if control.target == "length" and control.value <= 0:
        yield "length.control.value=0 must be a mean length in tokens for length.control.target=length"


def _rewards(config: ConfigDict) -> Iterator[str]:
    """What does not fit together in the weights of rewards."""
    text = config.rewards.weights
    names = [part.partition("=")[0] for part in text.split(",") if part]
    for name in names:
        if names.count(name) > 1:
            yield f"rewards.weights={text!r} names {name!r} more than once"
        if name == "length" and config.length.reward == "none":
            yield f"rewards.weights={text!r} names 'length', and config.length.reward is none"
        if not config.task.reward and name not in ("correct", "length", "format"):
            yield f"rewards.weights={text!r}: {name!r} is none of correct, length, format; others need task.reward"
