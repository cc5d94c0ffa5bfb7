"""Collecting a training batch: prompts -> responses -> grades -> selection, until the batch is full.

The order of problems is a fixed function of (seed, position), and every later random choice is a function of (seed,
step, position). An exact resume therefore needs only the position, the waiting rollouts and a few statistics.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

import grain
import jax
import numpy as np

from jaxrl import rollouts as records
from jaxrl.algorithms.greso import greso_init, greso_keep, greso_update
from jaxrl.algorithms.selection import mean_accuracy, mean_length, select
from jaxrl.errors import UserError
from jaxrl.rollout.engine import Engine, SamplingParams
from jaxrl.rollout.requests import Request
from jaxrl.rollout_metrics import Collected, outcome_counts, sampled_metrics, selection_metrics
from jaxrl.rollouts import Prompt, Rollouts
from jaxrl.runtime import distributed
from jaxrl.shaping import (
    adapt,
    budget_factor,
    length_weight,
    named_columns,
    restored,
    shape_rewards,
    shaping_metrics,
)
from jaxrl.tasks.answers import thinking_of
from jaxrl.tasks.budgets import with_budget
from jaxrl.tasks.task import Task, without_infinities
from jaxrl.types import Problem

STATE_VERSION = 2  # of Collector.state; 1 held groups as JSON


@dataclasses.dataclass
class Costs:
    """What the generation batches of one step took: seconds, tokens drawn on all hosts, decode steps x slots."""

    rollout: float = 0.0
    grade: float = 0.0
    tokens: int = 0
    slot_steps: int = 0


class Collector:
    """Draws problems, samples and grades responses, and selects until a batch is full.

    On several hosts each samples and grades its share of the prompts; all decisions are made from the gathered
    rollouts, identically everywhere.
    """

    def __init__(self, config, task: Task, tokenizer, sampler: Engine):
        self.config, self.task, self.tokenizer, self.sampler = config, task, tokenizer, sampler
        self.order = grain.MapDataset.range(len(task.train)).seed(config.seed).shuffle().repeat(None)
        self.position = 0  # problems drawn so far
        self.surplus = records.begin([])  # selected, but beyond the batch (batch.keep_surplus)
        self.pending = records.begin([])  # groups with responses to be continued (sampling.carry_over)
        self.ahead = records.begin([])  # groups of the next generation batch that have begun (sampling.prefetch)
        self.greso = greso_init(config.batch.greso_hyper)
        self.mean_lengths: dict[str, float] = {}  # last mean response length per problem; the longest start first
        self.shaping: dict = {}  # adaptive state of the rewards (jaxrl.shaping)

    # ---- checkpoints

    def state(self) -> tuple[dict, dict[str, np.ndarray]]:
        """(JSON-able numbers, arrays); `restore` continues from them bit for bit."""
        numbers = {"position": self.position, "greso": self.greso, "mean_lengths": self.mean_lengths}
        numbers |= {"shaping": self.shaping}
        waiting = {"surplus": self.surplus, "pending": self.pending, "ahead": self.ahead}
        arrays = {f"{name}/{k}": v for name, r in waiting.items() for k, v in r.to_arrays().items()}
        return numbers | {"version": STATE_VERSION}, arrays

    def restore(self, numbers: dict, arrays: dict[str, np.ndarray]) -> None:
        """Continue from a `state`. Raises UserError if it has another version."""
        if (version := numbers.get("version", 1)) != STATE_VERSION:
            raise UserError(
                f"the checkpoint's waiting rollouts are of version {version}, this program reads {STATE_VERSION}: go "
                "on with the program that wrote it, or start anew in another config.run_dir"
            )
        self.position, self.greso, self.mean_lengths = (numbers[k] for k in ("position", "greso", "mean_lengths"))
        self.shaping = restored(numbers.get("shaping", {}), self.config)
        for name in ("surplus", "pending", "ahead"):
            mine = {k.removeprefix(f"{name}/"): v for k, v in arrays.items() if k.startswith(f"{name}/")}
            setattr(self, name, Rollouts.from_arrays(mine))

    # ---- one step

    def collect(self, params, step: int) -> Collected:
        """Rollouts for one training step. params: in the sampler's layout.

        Raises UserError when the limit of generation batches is reached with config.batch.on_short="error",
        or when too many responses could not be graded.
        """
        b, a = self.config.batch, self.config.algorithm
        hyper = {name: dict(a.selection_hyper[name]) for name in a.selection.split("+")}
        costs, selected, sampled, reasons = Costs(), self.surplus, [], []
        while selected.num_groups < b.prompts:
            if 0 < b.max_generation_batches <= len(sampled):
                if b.on_short == "error":
                    raise UserError(
                        f"step {step}: {selected.num_groups} of {b.prompts} groups after {len(sampled)} batches; "
                        "raise config.batch.max_generation_batches or set config.batch.on_short=smaller"
                    )
                break
            finished = self._generate(params, step, costs)
            keep, reason = select(finished, a.selection, hyper)
            selected = records.concat([selected, finished.where(keep)])
            sampled.append(finished)
            reasons.append(reason)
        chosen, beyond = selected.split_groups(b.prompts)
        self.surplus = beyond if b.keep_surplus else records.begin([])
        everything, reason = records.concat(sampled), np.concatenate([np.zeros(0, object), *reasons])
        self._check_failures(everything, step)
        thrown_away = 0 if b.keep_surplus else int(beyond.lengths[beyond.valid].sum())
        batch = Collected(chosen, everything, reason, step)
        metrics = {
            "time/rollout": costs.rollout,
            "time/grade": costs.grade,
            "perf/slot_utilisation": costs.tokens / max(costs.slot_steps, 1),
            "generated_tokens": costs.tokens,
            "selection/generation_batches": len(sampled),
            "selection/surplus": self.surplus.num_groups,
            "selection/pending": self.pending.num_groups + self.ahead.num_groups,
            **shaping_metrics(self.shaping, self.config, step),
            **selection_metrics(batch, thrown_away),
            **(sampled_metrics(everything) if len(everything) else {}),
        }
        self.shaping = adapt(self.shaping, everything, self.config, step)
        if b.greso:
            ids = [p.problem.id for p in everything.prompts]
            again = [p.position >= len(self.task.train) for p in everything.prompts]
            self.greso = greso_update(self.greso, ids, mean_accuracy(everything), b.greso_hyper, again)
        return batch._replace(metrics=metrics)

    def _generate(self, params, step: int, costs: Costs) -> Rollouts:
        """Sample, grade and shape one generation batch; returns the groups that are finished.

        A batch has room for generation_prompts groups of running responses: first those left by the batch before, then
        those begun ahead of time, then new ones.
        """
        c = self.config
        room = c.batch.generation_prompts or c.batch.prompts
        running = int(self.pending.unfinished.sum())
        fresh = room - running // c.batch.group_size - self.ahead.num_groups
        batch = records.concat([self.pending, self.ahead, self._begin(max(fresh, 0), step)])
        ahead = self._begin(room if c.sampling.prefetch else 0, step)

        # ---- sample and grade this host's share, then gather the shares of all hosts
        begin = time.perf_counter()
        me = jax.process_index()
        mine = self._sample(params, batch.take_groups(share(batch, me)), ahead.take_groups(share(ahead, me)), step)
        middle = time.perf_counter()
        mine = self._grade(mine[0]), mine[1]
        done, self.ahead = (gather(part, whole) for part, whole in zip(mine, (batch, ahead), strict=True))

        costs.rollout += middle - begin
        costs.tokens += sum(len(r.tokens) for r in (done, self.ahead)) - len(batch.tokens)
        costs.slot_steps += self.sampler.stats.slot_steps * jax.process_count()
        left = done.group_any(done.unfinished)
        self.pending = done.take_groups(np.flatnonzero(left))
        weight = length_weight(c, step, self.shaping)
        finished = shape_rewards(done.take_groups(np.flatnonzero(~left)), c, weight, self.shaping)
        self._learn_from(finished)
        costs.grade += time.perf_counter() - middle
        return finished

    def _begin(self, count: int, step: int) -> Rollouts:
        """The next `count` problems as groups whose responses have no token yet."""
        size, encode = self.config.batch.group_size, self.task.encode
        return records.begin(
            Prompt(problem, np.array(encode(problem), np.int32), size, position, step)
            for position, problem in self._draw(count)
        )

    def _draw(self, count: int) -> list[tuple[int, Problem]]:
        """The next `count` problems with their positions; GRESO may skip some before they cost a rollout."""
        out: list[tuple[int, Problem]] = []
        while len(out) < count:  # GRESO keeps every prompt with a positive probability, so this ends
            first, n = self.position, count - len(out)
            rows = [(p, self.task.train[int(self.order[p])]) for p in range(first, first + n)]
            self.position += n
            if self.config.batch.greso:
                rng = np.random.default_rng([self.config.seed, first])
                keep = greso_keep(self.greso, [problem.id for _, problem in rows], rng, self.config.batch.greso_hyper)
                rows = [row for row, k in zip(rows, keep, strict=True) if k]
            out += rows
        factor = budget_factor(self.config, self.shaping)
        return [(p, with_budget(problem, self.config, p, factor)) for p, problem in out]

    def _sample(self, params, batch: Rollouts, ahead: Rollouts, step: int) -> tuple[Rollouts, Rollouts]:
        """Continue both; `ahead` gets only the slots that idle while the batch finishes."""
        c = self.config
        limit = c.sampling.max_tokens
        first, then = (requests(r, limit, c.sampling.carry_over, self.mean_lengths) for r in (batch, ahead))
        found = self.sampler.generate(
            params, first + then, seed=c.seed, step=step, sampling=sampling_settings(c), background=len(then)
        )
        completions = [completion for request in found for completion in request]
        n = int(batch.unfinished.sum())
        return batch.extend(completions[:n], step, limit), ahead.extend(completions[n:], step, limit)

    def _grade(self, rollouts: Rollouts) -> Rollouts:
        """Grade the groups without unfinished responses; the others stay as they are."""
        waiting = rollouts.per_response(rollouts.group_any(rollouts.unfinished))
        index, tokens = np.flatnonzero(~waiting), rollouts.split_tokens()
        texts = [self.tokenizer.decode(tokens[i]) for i in index]
        grades = self.task.grade([rollouts.prompts[rollouts.group[i]].problem for i in index], texts)
        grades = [without_infinities(grade) for grade in grades]
        finite = rollouts.token_sum(~np.isfinite(rollouts.logprobs)) == 0
        new = {k: getattr(rollouts, k).copy() for k in ("correct", "reward", "valid", "outcome")}
        for i, grade in zip(index, grades, strict=True):
            new["correct"][i], new["reward"][i] = grade.correct, grade.reward
            new["valid"][i] = grade.valid and finite[i]
            new["outcome"][i] = grade.outcome if finite[i] else "nonfinite"
        columns = rollouts.columns | named_columns(grades, index, len(rollouts), self.config)
        if self.config.length.count == "thinking":
            thinking = [len(self.tokenizer.encode(thinking_of(t))) for t in texts]
            counted = rollouts.lengths.copy()
            counted[index] = np.minimum(thinking, counted[index])
            columns = columns | {"thinking_tokens": counted}
        return rollouts.replace(**new, columns=columns)

    def _learn_from(self, finished: Rollouts) -> None:
        """Update the mean response lengths, by which later requests are ordered."""
        lengths = np.nan_to_num(mean_length(finished)).tolist()
        self.mean_lengths |= dict(zip([p.problem.id for p in finished.prompts], lengths, strict=True))

    def _check_failures(self, rollouts: Rollouts, step: int) -> None:
        invalid, total = int((~rollouts.valid).sum()), len(rollouts)
        if total and invalid / total > self.config.task.max_failures:
            raise UserError(
                f"step {step}: {invalid} of {total} completions could not be graded ({outcome_counts(rollouts)}), "
                f"more than config.task.max_failures={self.config.task.max_failures}"
            )


def requests(rollouts: Rollouts, limit: int, most: int, mean_lengths: Mapping[str, float]) -> list[Request]:
    """Requests for what is left to sample, in the order of the unfinished responses: one for a group without tokens,
    otherwise one for each unfinished response, whose tokens so far are prefilled again.

    limit: most tokens of a response. most: most new tokens of a response in this call, 0 = no bound. mean_lengths:
    expected response length by problem id.
    """
    out, tokens, lengths, most = [], rollouts.split_tokens(), rollouts.lengths, most or limit
    begun = rollouts.per_response(rollouts.group_any(lengths > 0))
    for i in np.flatnonzero(rollouts.unfinished):
        prompt, sample, done = rollouts.prompts[rollouts.group[i]], int(rollouts.sample[i]), int(lengths[i])
        expected = mean_lengths.get(prompt.problem.id, 0.0)
        common = dict(key=prompt.position % 2**32, step=prompt.step)
        if begun[i]:
            out.append(
                Request(
                    prompt=np.concatenate([prompt.tokens, tokens[i]]),
                    samples=1,
                    max_tokens=min(limit - done, most),
                    expected=max(expected, limit / 2),  # it outlived others, so start it early
                    first_sample=sample,
                    done=done,
                    **common,
                )
            )
        elif sample == 0:
            out.append(Request(prompt.tokens, prompt.samples, min(limit, most), expected=expected, **common))
    return out


# ---- hosts


def share(rollouts: Rollouts, host: int) -> Sequence[int]:
    """The groups that a host samples and grades."""
    return range(host, rollouts.num_groups, jax.process_count())


def gather(mine: Rollouts, whole: Rollouts) -> Rollouts:
    """On every host: all groups of `whole`, in that order, as the hosts have continued them (each its own share).

    Sends the arrays of `mine` without the prompts, which every host has: 8 1/8 bytes per token, a few per response.
    """
    if jax.process_count() == 1:
        return mine
    found = distributed.allgather_arrays(mine.to_arrays(prompts=False))
    shares = [share(whole, host) for host in range(len(found))]
    parts = [
        Rollouts.from_arrays(arrays, [whole.prompts[g] for g in groups])
        for arrays, groups in zip(found, shares, strict=True)
    ]
    return records.merge(parts, shares)


def sampling_settings(config) -> SamplingParams:
    """The sampling parameters of training."""
    s = config.sampling
    return SamplingParams(s.temperature, s.top_k, s.top_p, s.min_p)
