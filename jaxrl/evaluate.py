"""Accuracy of a model on data sets, with intervals, and how well its lengths follow a budget.

    python -m jaxrl.evaluate --model=DIR --data=gsm8k_test.jsonl,aime24,dial --samples=8 --out=DIR

--model is a Hugging Face directory or a run directory (--step, --all_checkpoints choose its checkpoints).
--data lists files (jsonl, jsonl.gz, parquet), names of benchmarks, or the embedded task with its settings
("dial:n_max=12:seed=7"). --budgets=512,1024 sweeps over length budgets, which are asked for in the prompt
(--budget_mode=exact or max), enforced by s1's budget forcing (forced), or only compared with (none).
--template=chat|boxed|plain, --system_prompt=TEXT and --enable_thinking=on|off (for chat templates that have the switch)
default to what a run was trained with; so do --unfinished_thinking=wrong|graded and --need_marker, which say what
counts as an answer. --reward=module:function grades with your own function. --distributed joins the processes of
several hosts.
--pages is the number of tokens per page of the KV cache, 0 for a dense cache. By default it is as the run was trained,
else 64 where the chip has a kernel for pages. --dtype=bfloat16 computes in bfloat16; --products=bfloat16 computes in
float32 and rounds the inputs of matrix products (model.products in training).
--server=http://localhost:8000/v1 evaluates the model that an OpenAI-compatible server knows by the name --model, with
--slots requests at a time. A killed evaluation continues when the same command is given again. If the weights, the
tokenizer or template, the grader or the reward function's file have changed by then, it stops and says so.

Written to --out: result.json, table.md, and every completion under completions/.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl import build, memory
from jaxrl.algorithms.hyper import Choice, Flag, Integer, Number
from jaxrl.errors import UserError
from jaxrl.evaluation.benchmarks import EvalSet, load_sets
from jaxrl.evaluation.identity import model_identity
from jaxrl.evaluation.lengths import (
    MODES,
    forced_generate,
    generation_cap,
    length_metrics,
    length_profile,
    sweep_metrics,
)
from jaxrl.evaluation.scoring import Records, evaluate_problems, summarize
from jaxrl.evaluation.server import Server, ask
from jaxrl.evaluation.tables import accuracy_table, length_table, profile_table, sweep_table
from jaxrl.rollout.engine import Engine, SamplingParams
from jaxrl.rollout.placement import place
from jaxrl.rollout.requests import decodable
from jaxrl.runtime import cli, distributed, storage
from jaxrl.runtime import mesh as meshes
from jaxrl.runtime.metrics import null_for_nan
from jaxrl.runtime.model_source import checkpoint_steps, load_model, run_settings
from jaxrl.runtime.storage import atomic_write
from jaxrl.tasks.answers import UNFINISHED
from jaxrl.tasks.budgets import with_budget
from jaxrl.tasks.grader import GRADER_VERSION, Grader
from jaxrl.tasks.rewards import UserReward
from jaxrl.tasks.task import Task
from jaxrl.tasks.templates import THINKING
from jaxrl.types import Problem

FLAGS = dict(
    model=str, data=str, out=str, server="", **cli.SAMPLING_FLAGS, samples=Integer(1, 1), limit=Integer(0),
    max_new_tokens=Integer(0), seed=Integer(0), template=Choice("", ("", "plain", "boxed", "chat")), **cli.CHAT_FLAGS,
    data_dir="",
    split="", problem_field="", answer_field="", id_field="", skip_bad_rows=Flag(False), reward="", budgets="",
    budget_mode=Choice("exact", MODES), soft_tolerance=Integer(500), step=Integer(-1, -1), all_checkpoints=Flag(False),
    waits=Integer(0), answer_tokens=Integer(0), end_thinking="</think>", distributed=Flag(False), batch=Integer(0),
    slots=Integer(64, 1), tensor=Integer(1, 1), grader_workers=Integer(2, 1),
    grader_timeout=Number(5.0, 0, above=True),
    unfinished_thinking=Choice("", ("", *UNFINISHED)), need_marker=Flag(False),
)  # fmt: skip


def evaluate_task(config, sampler: Engine, params: Any, tokenizer, task: Task) -> dict[str, float]:
    """Metrics "eval/..." of the held-out problems of a training run, as config.eval says.

    params: in the sampler's layout. With config.length.mode, problems without a budget of their own get one,
    the same at every call, and the metrics say how well responses keep to it.
    """
    e = config.eval
    problems = [with_budget(p, config, i) for i, p in enumerate(task.held_out[: e.problems])]
    records = evaluate_problems(
        sampler,
        params,
        tokenizer,
        problems,
        [task.encode(p) for p in problems],
        grade=task.grade,
        samples=e.samples,
        sampling=SamplingParams(e.temperature),
        seed=config.seed,
        max_tokens=e.max_tokens or config.sampling.max_tokens,
    )
    found = summarize(records) | length_metrics(records)
    return {f"eval/{k}": v for k, v in found.items() if k not in ("problems", "samples")}


def main(argv: list[str]) -> None:
    """The command line above; returns nothing, writes --out. Raises UserError for flags that cannot be used."""
    flags = cli.parse_flags(argv, FLAGS, __doc__)
    _check(flags)
    kept = storage.output(flags["out"], "--out", "completions")
    (kept.local / "completions").mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        limits = (flags["grader_workers"], flags["grader_timeout"])
        trained = {} if flags["server"] else run_settings(flags["model"]).get("task", {})
        unfinished = flags["unfinished_thinking"] or trained.get("unfinished_thinking", "wrong")
        need_marker = flags["need_marker"] or trained.get("need_marker", False)
        grader = stack.enter_context(Grader(*limits, need_marker=need_marker, unfinished=unfinished))
        reward = stack.enter_context(UserReward(flags["reward"], *limits)) if flags["reward"] else None
        evaluate = evaluate_served if flags["server"] else evaluate_checkpoints
        results, info = evaluate(flags, kept, grader, reward)
    if distributed.is_main():
        print(write_results(kept.local, results, info, flags))
        with storage.user_errors("--out"):
            kept.close()
        print(f"written to {flags['out']}")


def evaluate_checkpoints(flags: dict, out: storage.Mirror, grader: Grader, reward: UserReward | None):
    """(one summary per job, description of the model) of --model, a Hugging Face or run directory."""
    cli.use_compilation_cache()
    if flags["distributed"]:
        distributed.initialize()
    steps: list[int | None] = checkpoint_steps(flags["model"])[-1:] or [None]
    if flags["step"] >= 0:
        steps = [flags["step"]]
    if flags["all_checkpoints"]:
        steps = list(checkpoint_steps(flags["model"]))
        if not steps:
            raise UserError(f"--all_checkpoints: {flags['model']} is not a run directory with checkpoints")
    # weights in shards over all devices; each host then fetches its replicas
    mesh = meshes.make_mesh(1, -1, 1) if jax.device_count() > 1 else None
    shardings = (lambda config: build.param_shardings(config, mesh)[1]) if mesh else None
    results, info = [], {}
    for step in steps:
        config, params, tokenizer = load_model(flags["model"], jnp.dtype(flags["dtype"]), shardings, step)
        sets = load_sets(flags["data"], tokenizer, flags, grader, reward)
        jobs = plan(sets, flags, config.max_position_embeddings, step, lambda data, p: data.encode(p))
        identity = model_identity(flags["model"], step)
        info = {"config": dataclasses.asdict(config), "tokenizer": tokenizer.name, **identity}
        placement = place(config, mesh, flags["tensor"]) if mesh else None
        answer = sampled(config, params, tokenizer, jobs, flags, placement=placement)
        results += [run(job, answer, identity, flags, out) for job in jobs]
    return results, info


def evaluate_served(flags: dict, out: storage.Mirror, grader: Grader, reward: UserReward | None):
    """(one summary per job, description of the model) of the model that --server calls --model."""
    sets = load_sets(flags["data"], None, flags | {"template": flags["template"] or "chat"}, grader, reward)
    jobs = plan(sets, flags, sys.maxsize, None, lambda data, p: data.text(p))
    identity = {"server": flags["server"], "served": flags["model"]}
    key = os.environ.get("OPENAI_API_KEY", "")
    with Server(flags["server"], flags["model"], key=key, concurrency=flags["slots"]) as server:
        settings = {k: flags[k] for k, off in (("temperature", None), ("top_p", 1.0), ("top_k", 0), ("min_p", 0.0))
                    if flags[k] != off}  # fmt: skip
        if flags["enable_thinking"] in ("on", "off"):  # as vLLM and SGLang take it
            settings["chat_template_kwargs"] = {"enable_thinking": THINKING[flags["enable_thinking"]]}
            identity["enable_thinking"] = flags["enable_thinking"]

        def answer(job: Job, part: Sequence[int]) -> Records:
            asked = ([job.problems[i] for i in part], [job.prompts[i] for i in part])
            options = dict(samples=flags["samples"], seed=flags["seed"], max_tokens=job.limit)
            return ask(server, *asked, job.data.grade, settings=settings, vote=job.data.vote, **options)

        return [run(job, answer, identity, flags, out) for job in jobs], identity


def _check(flags: dict) -> None:
    if flags["positional"]:
        raise UserError(f"unexpected argument {flags['positional'][0]!r}; settings are --name=value")
    if flags["server"]:
        unfit = {"step": -1, "all_checkpoints": False, "distributed": False}
        if changed := [name for name, default in unfit.items() if flags[name] != default]:
            raise UserError(f"--{changed[0]} is about checkpoints and cannot be used with --server")
        if flags["budgets"] and flags["budget_mode"] == "forced":
            raise UserError("--budget_mode=forced: a server's answers cannot be cut and continued; choose exact or max")
    if flags["budgets"] and flags["budget_mode"] == "forced" and not flags["end_thinking"]:
        raise UserError("--end_thinking='': --budget_mode=forced needs the text that closes thinking, as in </think>")
    _budgets(flags)


def _sampling(flags: dict) -> SamplingParams:
    return SamplingParams(*(flags[name] for name in ("temperature", "top_k", "top_p", "min_p")))


def _budgets(flags: dict) -> list[int]:
    try:
        budgets = [int(b) for b in flags["budgets"].split(",") if b]
        if any(b < 1 for b in budgets) or len(set(budgets)) < len(budgets):
            raise ValueError
    except ValueError:
        raise UserError(
            f"--budgets={flags['budgets']!r}: need distinct positive token counts, as in 512,1024"
        ) from None
    return budgets


@dataclasses.dataclass(frozen=True)
class Job:
    """One data set at one budget. prompts: what `answer` takes for each problem: token ids, text or messages. limit:
    most response tokens. budget: in tokens, or None. mode: of the budget. step: that of the checkpoint, or None."""

    data: EvalSet
    problems: list[Problem]
    prompts: list[Any]
    limit: int
    budget: int | None
    mode: str
    step: int | None

    @property
    def name(self) -> str:
        """Its name in the tables."""
        at = f" @ {self.budget}" if self.budget else ""
        return self.data.name + at + ("" if self.step is None else f" step {self.step}")

    @property
    def file(self) -> str:
        """File name of its completions. Budgets of mode "none" do not change completions, so they share one file."""
        name = dataclasses.replace(self, budget=None).name if self.mode == "none" else self.name
        return "".join(c if c.isalnum() or c in "._-" else "_" for c in name) + ".jsonl"


def plan(sets: Sequence[EvalSet], flags: dict, context: int, step: int | None, prompt: Callable) -> list[Job]:
    """A job for every set at every budget, or without one. prompt(set, problem): what is sent. context: in tokens."""
    mode, jobs = flags["budget_mode"], []
    asked = mode if mode in ("exact", "max") else "none"
    for data in sets:
        for budget in _budgets(flags) or [None]:
            problems = data.problems
            if budget is not None:
                problems = [dataclasses.replace(p, budget=budget, mode=asked) for p in problems]
            limit = flags["max_new_tokens"] or data.max_tokens
            if budget is not None and mode != "none":
                limit = generation_cap(budget, mode, flags["max_new_tokens"])
            prompts = [prompt(data, p) for p in problems]
            jobs.append(Job(data, problems, prompts, min(limit, context), budget, mode, step))
    return jobs


def sampled(config, params, tokenizer, jobs: Sequence[Job], flags: dict, *, placement=None) -> Callable:
    """The function answer(job, indices of its problems) -> records; its sampler is large enough for all jobs.

    params: as load_model returns them.
    """
    longest = max((len(p) for job in jobs for p in job.prompts if len(p) < config.max_position_embeddings), default=1)
    replicas = placement.row_multiple if placement else 1
    sizes = dict(max_prompt=max(longest, 1), max_tokens=max(job.limit for job in jobs))
    sizes |= dict(slots=-(-flags["slots"] // replicas) * replicas)
    dtype, pages = jnp.dtype(flags["dtype"]), memory.pages_of(flags, run_settings(flags["model"]))
    sizes |= memory.cache_sizes(config, dtype, placement, jax.local_devices()[0], **sizes, pages=pages,
                                lives=lambda: memory.bytes_of(params))
    sampler = Engine(
        dataclasses.replace(config, narrow=flags["products"] == "bfloat16"),
        tokenizer.eos_ids,
        **sizes,
        dtype=dtype,
        placement=placement,
        allowed=decodable(tokenizer, config.vocab_size),
    )
    layout = sampler.layout(params)

    def answer(job: Job, part: Sequence[int]) -> Records:
        force = None
        if job.budget and job.mode == "forced":
            length = flags["answer_tokens"] or job.data.answer_tokens
            force = forced_generate(sampler, job.budget, job.data.delimiters(), length, flags["waits"])
        return evaluate_problems(
            sampler,
            layout,
            tokenizer,
            [job.problems[i] for i in part],
            [job.prompts[i] for i in part],
            grade=job.data.grade,
            samples=flags["samples"],
            sampling=_sampling(flags),
            seed=flags["seed"] % 2**32,
            max_tokens=job.limit,
            vote=job.data.vote,
            generate=force,
            room=job.limit if force else 1,
        )

    return answer


def run(job: Job, answer: Callable, identity: dict, flags: dict, out: storage.Mirror) -> dict:
    """Samples and grades the problems that the job's file does not hold yet, some at a time; returns the job's summary.
    On an object store, each part is uploaded as soon as it is graded.

    answer(job, indices) -> records. identity: digests of model and grader, see evaluation.identity.
    """
    store = Store(out.local / "completions" / job.file, _settings(job, identity, flags))
    unreadable = sum(not prompt for prompt in job.prompts)
    if unreadable and distributed.is_main():
        note = "hold text that the model has no tokens for; they count as answered wrongly"
        print(f"{job.name}: {unreadable} of {len(job.prompts)} prompts {note}", file=sys.stderr)
    texts = [job.data.shown(prompt) for prompt in job.prompts]
    done = {key: (r["prompt"], r["answer"]) for key, r in store.records.items()}  # other text: asked again
    todo = [i for i, p in enumerate(job.problems) if done.get(p.id) != (texts[i], p.answer)]
    todo.sort(key=lambda i: len(job.prompts[i]))  # prompts of one prefill bucket together
    size = flags["batch"] or max(1, math.ceil(4 * flags["slots"] / flags["samples"]))
    begin, tokens = time.perf_counter(), 0
    for first in range(0, len(todo), size):
        part = todo[first : first + size]
        records = answer(job, part)
        for i, record in zip(part, records, strict=True):
            record["prompt"] = texts[i]
        store.append(records)
        tokens += sum(s["tokens"] for r in records for s in r["samples"])
        if distributed.is_main():
            with storage.user_errors("--out"):
                out.push()
            rate = tokens / (time.perf_counter() - begin)
            graded = [s["correct"] for r in store.records.values() for s in r["samples"] if s["valid"]]
            count = len(job.problems) - len(todo) + first + len(part)
            right = 100 * sum(graded) / max(len(graded), 1)
            said = f"{count}/{len(job.problems)} problems, accuracy {right:.1f} %, {rate:,.0f} tokens/s"
            print(f"{job.name}: {said}", file=sys.stderr)
    records = [store.records[p.id] | {"budget": p.budget} for p in job.problems]
    row = {"name": job.name, "data": job.data.name, "step": job.step, "budget": job.budget, "max_tokens": job.limit}
    row |= {"template": job.data.template, "grader": job.data.grader_version}
    row |= {"mode": job.mode if job.budget else job.problems[0].mode, **summarize(records)}
    return row | length_metrics(records, flags["soft_tolerance"]) | length_profile(records)


class Store:
    """The records of one job as jsonl, appended batch by batch, so that a restart samples only what is missing.

    The first line holds the settings; opening the file with other settings raises UserError. A last line that was only
    partly written is cut off. Only the first of several hosts reads and writes the file. records: {problem id: record}.
    """

    def __init__(self, path: pathlib.Path, settings: dict):
        self.path = path
        mine = None
        if distributed.is_main():
            try:
                mine = self._open(settings)
            except UserError as e:
                mine = str(e)
        opened = distributed.broadcast(mine)
        if isinstance(opened, str):  # raised on every host, or the others would wait for this one
            raise UserError(opened)
        self.records: dict[str, dict[str, Any]] = {record["id"]: record for record in opened}

    def _open(self, settings: dict) -> Records:
        data = self.path.read_bytes() if self.path.exists() else b""
        head, *lines = data[: data.rfind(b"\n") + 1].split(b"\n")[:-1] or [None]
        if head is None:
            atomic_write(self.path, json.dumps({"settings": settings}) + "\n")
            return []
        os.truncate(self.path, data.rfind(b"\n") + 1)
        try:
            before, records = json.loads(head)["settings"], [json.loads(line) for line in lines]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{self.path}: damaged; delete it, or choose another --out") from None
        changed = next((k for k in settings if before.get(k) != settings[k]), None)
        if changed:
            was, now = before.get(changed), settings[changed]
            raise UserError(f"{self.path}: made with {changed}={was!r}, now {now!r}; choose another --out")
        return records

    def append(self, records: Records) -> None:
        self.records |= {record["id"]: record for record in records}
        if distributed.is_main():
            with open(self.path, "a", encoding="utf-8") as f:
                f.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
                f.flush()
                os.fsync(f.fileno())


def _settings(job: Job, identity: dict, flags: dict) -> dict:
    """Everything that a completion or its grade depends on, beside the problem's own text and answer."""
    keys = ("waits", "answer_tokens", "end_thinking") if job.mode == "forced" and job.budget else ()
    keys += ("samples", "temperature", "top_p", "top_k", "min_p", "seed", "dtype", "products")
    data = job.data
    own = dict(data=data.spec, template=data.template, grader=data.grader_version, limit=job.limit)
    return {**identity, **own, "mode": job.mode if job.budget else None, **{k: flags[k] for k in keys}}


def write_results(out: pathlib.Path, results: list[dict], info: dict, flags: dict) -> str:
    """result.json and table.md; returns the table. Sweeps over budgets also get their summary figures."""
    swept = {}
    for row in results:
        if row["budget"]:
            key = row["data"] + ("" if row["step"] is None else f" step {row['step']}")
            swept.setdefault(key, []).append(row)
    sweeps = {name: sweep_metrics(rows) for name, rows in swept.items()}
    report = accuracy_table(results)
    if profiled := [r for r in results if "by_length" in r]:
        report += "\n" + profile_table(profiled)
    if budgeted := [r for r in results if "mean_error" in r]:
        report += "\n" + length_table(budgeted)
    if sweeps:
        report += "\n" + sweep_table(sweeps)
    content = {
        "flags": flags,
        "model": info,
        "grader_version": GRADER_VERSION,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "results": results,
        "sweeps": sweeps,
    }
    atomic_write(out / "result.json", json.dumps(null_for_nan(content), indent=1, allow_nan=False) + "\n")
    atomic_write(out / "table.md", report)
    return report


if __name__ == "__main__":
    cli.run(main)
