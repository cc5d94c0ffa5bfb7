"""Accuracy of a model on data sets, with intervals, and how well its lengths follow a budget.

    python -m jaxrl.evaluate --model=DIR --data=gsm8k_test.jsonl,aime24,dial --samples=8 --out=DIR

--model is a Hugging Face directory or a run directory (--step, --all_checkpoints choose its checkpoints).
--data lists files (jsonl, jsonl.gz, parquet), names of benchmarks, or the embedded task with its settings
("dial:n_max=12:seed=7"). --budgets=512,1024 sweeps over lengths: asked for in the prompt (--budget_mode=exact
or max), enforced from outside by s1's budget forcing (forced), or only compared with (none).
--reward=module:function grades with a function of yours. --distributed joins the processes of several hosts.
A killed evaluation continues when the same command is given again.

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
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrl import build
from jaxrl.collect import with_budget
from jaxrl.errors import UserError
from jaxrl.evaluation.benchmarks import EvalSet, load_sets
from jaxrl.evaluation.lengths import MODES, forced_generate, generation_cap, length_metrics, sweep_metrics
from jaxrl.evaluation.scoring import Records, evaluate_problems, summarize
from jaxrl.evaluation.tables import accuracy_table, length_table, sweep_table
from jaxrl.rollout.engine import Engine, SamplingParams
from jaxrl.rollout.placement import place
from jaxrl.rollout.requests import decodable
from jaxrl.runtime import cli, distributed
from jaxrl.runtime import mesh as meshes
from jaxrl.runtime.metrics import null_for_nan
from jaxrl.runtime.model_source import checkpoint_steps, load_model
from jaxrl.runtime.rundir import atomic_write
from jaxrl.tasks.grader import GRADER_VERSION, Grader
from jaxrl.tasks.rewards import UserReward
from jaxrl.tasks.task import Task

FLAGS = dict(
    model=str, data=str, out=str, samples=1, limit=0, max_new_tokens=0, temperature=1.0, top_p=1.0, top_k=0,
    min_p=0.0, seed=0, template="", data_dir="", split="", problem_field="", answer_field="", id_field="",
    skip_bad_rows=False, reward="", budgets="", budget_mode="exact", soft_tolerance=500, step=-1, all_checkpoints=False,
    waits=0, answer_tokens=0, end_thinking="</think>",
    distributed=False, batch=0, slots=64, tensor=1, dtype="float32", grader_workers=2, grader_timeout=5.0,
)  # fmt: skip


def evaluate_task(config, sampler: Engine, params: Any, tokenizer, task: Task) -> dict[str, float]:
    """Metrics "eval/..." of the held-out problems of a training run, as config.eval says.

    params: in the sampler's layout. With config.length.mode, problems without a budget of their own get one,
    the same at every call, and the metrics tell how well it was obeyed.
    """
    e = config.eval
    problems = [with_budget(p, config, i) for i, p in enumerate(task.held_out[: e.problems])]
    records = evaluate_problems(
        sampler,
        params,
        tokenizer,
        problems,
        [task.encode(p) for p in problems],
        task.grade,
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
    cli.use_compilation_cache()
    if flags["distributed"]:
        distributed.initialize()
    out = pathlib.Path(flags["out"])
    (out / "completions").mkdir(parents=True, exist_ok=True)
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
    with contextlib.ExitStack() as stack:
        limits = (flags["grader_workers"], flags["grader_timeout"])
        grader = stack.enter_context(Grader(*limits))
        reward = stack.enter_context(UserReward(flags["reward"], *limits)) if flags["reward"] else None
        for step in steps:
            config, params, tokenizer = load_model(flags["model"], jnp.dtype(flags["dtype"]), shardings, step)
            sets = load_sets(flags["data"], tokenizer, flags, grader, reward)
            info = {"config": dataclasses.asdict(config), "tokenizer": tokenizer.name}
            placement = place(config, mesh, flags["tensor"]) if mesh else None
            results += evaluate_sets(config, params, tokenizer, sets, step, flags, out, placement)
    if distributed.is_main():
        print(write_results(out, results, info, flags))
        print(f"written to {out}")


def _check(flags: dict) -> None:
    if flags["positional"]:
        raise UserError(f"unexpected argument {flags['positional'][0]!r}; settings are --name=value")
    if flags["budget_mode"] not in MODES:
        raise UserError(f"--budget_mode={flags['budget_mode']!r}: choose one of {', '.join(MODES)}")
    if flags["dtype"] not in ("float32", "bfloat16"):
        raise UserError(f"--dtype={flags['dtype']!r}: choose float32 or bfloat16")
    lows = dict.fromkeys(("limit", "max_new_tokens", "batch", "waits", "answer_tokens", "seed"), 0)
    lows |= dict.fromkeys(("samples", "slots", "tensor", "grader_workers"), 1)
    for name, low in lows.items():
        if flags[name] < low:
            raise UserError(f"--{name}={flags[name]} must be at least {low}")
    _sampling(flags)
    _budgets(flags)


def _sampling(flags: dict) -> SamplingParams:
    try:
        return SamplingParams(*(flags[name] for name in ("temperature", "top_k", "top_p", "min_p")))
    except ValueError as e:
        raise UserError(f"--{e}") from None


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


def evaluate_sets(
    config, params, tokenizer, sets: Sequence[EvalSet], step, flags, out, placement=None
) -> list[dict]:
    """Every set, at every budget if there are any: one summary each. params: as load_model returns them."""
    mode, jobs = flags["budget_mode"], []  # (set, problems, prompts, limit, budget)
    asked = mode if mode in ("exact", "max") else "none"
    for data in sets:
        for budget in _budgets(flags) or [None]:
            problems = data.problems
            if budget is not None:
                problems = [dataclasses.replace(p, budget=budget, mode=asked) for p in problems]
            limit = flags["max_new_tokens"] or data.max_tokens
            if budget is not None and mode != "none":
                limit = generation_cap(budget, mode, flags["max_new_tokens"])
            limit = min(limit, config.max_position_embeddings)
            jobs.append((data, problems, [data.encode(p) for p in problems], limit, budget))
    context = config.max_position_embeddings
    longest = max((len(p) for job in jobs for p in job[2] if 0 < len(p) < context), default=1)
    replicas = placement.row_multiple if placement else 1
    sampler = Engine(
        config,
        tokenizer.eos_ids,
        max_prompt=longest,
        max_tokens=max(job[3] for job in jobs),
        slots=-(-flags["slots"] // replicas) * replicas,
        dtype=jnp.dtype(flags["dtype"]),
        placement=placement,
        allowed=decodable(tokenizer, config.vocab_size),
    )
    layout = sampler.layout(params)
    results = []
    for data, problems, prompts, limit, budget in jobs:
        suffix = "" if step is None else f" step {step}"
        name = data.name + (f" @ {budget}" if budget else "") + suffix
        # left alone, a model answers alike whatever its lengths are compared with
        own = name if mode != "none" else data.name + suffix
        store = Store(out / "completions" / f"{_slug(own)}.jsonl", _settings(flags, limit, budget, data))
        force = None
        if budget and mode == "forced":
            answer = flags["answer_tokens"] or data.answer_tokens
            force = forced_generate(sampler, budget, data.delimiters(), answer, flags["waits"])
        unreadable = sum(not prompt for prompt in prompts)
        if unreadable and distributed.is_main():
            note = "hold text that the model has no tokens for; they count as answered wrongly"
            print(f"{name}: {unreadable} of {len(prompts)} prompts {note}", file=sys.stderr)
        run_set(store, name, data, problems, prompts, limit, sampler, layout, tokenizer, flags, force)
        records = [store.records[p.id] | {"budget": p.budget} for p in problems]
        row = {"name": name, "data": data.name, "step": step, "budget": budget, "max_tokens": limit}
        row |= {"template": data.template, "grader": data.grader_version}
        row |= {"mode": mode if budget else problems[0].mode, **summarize(records)}
        results.append(row | length_metrics(records, flags["soft_tolerance"]))
    return results


def run_set(store, name, data, problems, prompts, limit, sampler, params, tokenizer, flags, force=None) -> None:
    """Samples and grades what the store does not hold yet, some problems at a time. force: see forced_generate."""
    texts = [tokenizer.decode(prompt) for prompt in prompts]
    done = {key: (r["prompt"], r["answer"]) for key, r in store.records.items()}  # of another text: asked again
    todo = [i for i, p in enumerate(problems) if done.get(p.id) != (texts[i], p.answer)]
    todo.sort(key=lambda i: len(prompts[i]))  # prompts of one prefill bucket together
    size = flags["batch"] or max(1, math.ceil(4 * flags["slots"] / flags["samples"]))
    begin, tokens = time.perf_counter(), 0
    for first in range(0, len(todo), size):
        part = todo[first : first + size]
        records = evaluate_problems(
            sampler,
            params,
            tokenizer,
            [problems[i] for i in part],
            [prompts[i] for i in part],
            data.grade,
            samples=flags["samples"],
            sampling=_sampling(flags),
            seed=flags["seed"] % 2**32,
            max_tokens=limit,
            vote=data.vote,
            generate=force,
            room=limit if force else 1,
        )
        for i, record in zip(part, records, strict=True):
            record["prompt"] = texts[i]
        store.append(records)
        tokens += sum(s["tokens"] for r in records for s in r["samples"])
        rate = tokens / (time.perf_counter() - begin)
        count = len(problems) - len(todo) + first + len(part)
        graded = [s["correct"] for r in store.records.values() for s in r["samples"] if s["valid"]]
        right = 100 * sum(graded) / max(len(graded), 1)
        if distributed.is_main():
            said = f"{name}: {count}/{len(problems)} problems, accuracy {right:.1f} %, {rate:,.0f} tokens/s"
            print(said, file=sys.stderr)


class Store:
    """The records of one set as jsonl, appended batch by batch: what is there need not be sampled again.

    The first line holds the settings; other settings on the same file raise UserError. A last line torn by a
    kill is cut off. Of several hosts the first reads and writes the file. records: {problem id: record}.
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
        if isinstance(opened, str):  # on every host, or the others would wait for this one
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


def _settings(flags: dict, limit: int, budget: int | None, data: EvalSet) -> dict:
    """Everything that a completion or its grade depends on."""
    forced = flags["budget_mode"] == "forced" and budget
    keys = ("waits", "answer_tokens", "end_thinking") if forced else ()
    keys += ("samples", "temperature", "top_p", "top_k", "min_p", "seed", "dtype")
    model = str(pathlib.Path(flags["model"]).resolve())
    mode = flags["budget_mode"] if budget else None
    own = dict(data=data.spec, template=data.template, grader=data.grader_version, limit=limit, mode=mode)
    return {"model": model, **own, **{k: flags[k] for k in keys}}


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "_" for c in name)


def write_results(out: pathlib.Path, results: list[dict], info: dict, flags: dict) -> str:
    """result.json and table.md; returns the table. Sweeps over budgets also get their summary figures."""
    swept = {}
    for row in results:
        if row["budget"]:
            key = row["data"] + ("" if row["step"] is None else f" step {row['step']}")
            swept.setdefault(key, []).append(row)
    sweeps = {name: sweep_metrics(rows) for name, rows in swept.items()}
    report = accuracy_table(results)
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
