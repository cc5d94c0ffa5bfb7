"""Collecting a training batch: prompts -> completions -> grades -> selection, until the batch is full.

The order of problems is a fixed function of (seed, position), and every random choice below it a function of
(seed, step, position), so a position, the pending groups and a few statistics are all there is to save for
an exact resume.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import grain
import jax
import numpy as np

from jaxrl.algorithms.greso import greso_init, greso_keep, greso_update
from jaxrl.algorithms.length import LENGTH_REWARDS, sample_budgets
from jaxrl.algorithms.selection import explain, mean_accuracy, mean_length
from jaxrl.errors import UserError
from jaxrl.rollout import partial
from jaxrl.rollout.engine import Engine, SamplingParams
from jaxrl.rollout.partial import Partial
from jaxrl.runtime import distributed
from jaxrl.tasks.task import Task
from jaxrl.types import Group, Problem


@dataclasses.dataclass
class Collected:
    """One step's collection.

    chosen: the groups to train on. sampled: all of this step's groups. reasons: parallel to it, why selection
    dropped the group, "" for kept ones. metrics: for the step's record.
    """

    chosen: list[Group]
    sampled: list[Group]
    reasons: list[str]
    metrics: dict[str, Any]


class Collector:
    """Draws problems, samples and grades them, and selects groups until a batch is full.

    On several hosts each samples and grades its share of the prompts; all decisions are made from the
    gathered groups, identically everywhere.
    """

    def __init__(self, config, task: Task, tokenizer, sampler: Engine):
        self.config, self.task, self.tokenizer, self.sampler = config, task, tokenizer, sampler
        self.order = grain.MapDataset.range(len(task.train)).seed(config.seed).shuffle().repeat(None)
        self.position = 0  # problems drawn so far
        self.surplus: list[Group] = []
        self.pending: list[Partial] = []  # groups with completions to be continued (sampling.carry_over)
        self.ahead: list[Partial] = []  # groups of the next generation batch that have begun (sampling.prefetch)
        self.greso = greso_init()
        self.mean_lengths: dict[str, float] = {}  # last mean response length per problem: longest first

    def state(self) -> dict:
        """JSON-able; `restore` continues from it bit for bit."""
        return {
            "position": self.position,
            "surplus": [group_to_json(g) for g in self.surplus],
            "pending": [partial.to_json(p) for p in self.pending],
            "ahead": [partial.to_json(p) for p in self.ahead],
            "greso": self.greso,
            "mean_lengths": self.mean_lengths,
        }

    def restore(self, state: dict) -> None:
        self.position, self.greso, self.mean_lengths = (state[k] for k in ("position", "greso", "mean_lengths"))
        self.surplus = [group_from_json(g) for g in state["surplus"]]
        self.pending, self.ahead = ([partial.from_json(p) for p in state.get(k, [])] for k in ("pending", "ahead"))

    def collect(self, params, step: int) -> Collected:
        """Groups for one training step. params: in the sampler's layout.

        Raises UserError when the limit of generation batches is reached with config.batch.on_short="error",
        or when too many completions could not be graded.
        """
        b, a = self.config.batch, self.config.algorithm
        counts = {"time/rollout": 0.0, "time/grade": 0.0, "tokens": 0, "slot_steps": 0}
        self._age()
        chosen, self.surplus = self.surplus, []
        sampled, why, dropped, batches, accepted = [], [], {}, 0, 0
        while len(chosen) < b.prompts:
            if 0 < b.max_generation_batches <= batches:
                if b.on_short == "error":
                    raise UserError(
                        f"step {step}: {len(chosen)} of {b.prompts} groups after {batches} batches; "
                        "raise config.batch.max_generation_batches or set config.batch.on_short=smaller"
                    )
                break
            groups = self._generate(params, step, counts)
            hyper = {name: dict(a.selection_hyper[name]) for name in a.selection.split("+")}
            kept, reasons = explain(groups, a.selection, hyper)
            batches += 1
            chosen += kept
            sampled += groups
            accepted += sum(int(g.lengths.sum()) for g in kept)
            # by the prompt's array: one a group, while a problem may have been drawn twice
            ids = {id(g.prompt_tokens) for g in kept}
            by_group = {id(g.prompt_tokens): "" if id(g.prompt_tokens) in ids else a.selection for g in groups}
            for reason, what in reasons.items():
                key, of_groups = f"selection/dropped/{reason}", not isinstance(what, int)
                dropped[key] = dropped.get(key, 0) + (len(what) if of_groups else what)
                by_group |= {id(g.prompt_tokens): reason for g in what} if of_groups else {}
            why += [by_group[id(g.prompt_tokens)] for g in groups]
        if b.keep_surplus:
            self.surplus = chosen[b.prompts :]
        self._check_failures(sampled, step)
        lengths = [round(mean_length(g), 2) for g in sampled]
        trained = [c for g in chosen[: b.prompts] for c in g.completions]
        metrics = {
            "time/rollout": counts["time/rollout"],
            "time/grade": counts["time/grade"],
            "perf/slot_utilisation": counts["tokens"] / max(counts["slot_steps"], 1),
            "generated_tokens": counts["tokens"],
            "acceptance_rate": accepted / max(sum(int(g.lengths.sum()) for g in sampled), 1),
            "selection/generation_batches": batches,
            "selection/groups": min(len(chosen), b.prompts),
            "selection/surplus": len(self.surplus),
            "selection/pending": len(self.pending) + len(self.ahead),
            "selection/stale_tokens": sum(c.stale for c in trained) / max(sum(c.length for c in trained), 1),
            "selection/kept_lengths": [n for n, reason in zip(lengths, why, strict=True) if not reason],
            "selection/dropped_lengths": [n for n, reason in zip(lengths, why, strict=True) if reason],
            "selection/dropped_reasons": [reason.rpartition("/")[2] for reason in why if reason],
            **dict(sorted(dropped.items())),
            **(group_metrics(sampled) if sampled else {}),
        }
        return Collected(chosen[: b.prompts], sampled, why, metrics)

    def _age(self) -> None:
        """The parameters are new: mark what was drawn under older ones."""
        self.surplus = [dataclasses.replace(g, completions=partial.aged(g.completions)) for g in self.surplus]
        for groups in (self.pending, self.ahead):
            groups[:] = [dataclasses.replace(p, completions=partial.aged(p.completions)) for p in groups]

    def _generate(self, params, step: int, counts: dict) -> list[Group]:
        """Sample, grade and shape one generation batch: the groups that it finishes.

        A batch has room for generation_prompts groups of running completions: those left by the batch before, then
        those begun ahead of time, then new ones.
        """
        c, s = self.config, self.config.sampling
        room = c.batch.generation_prompts or c.batch.prompts
        running = sum(p.running for p in self.pending)
        fresh = room - running // c.batch.group_size - len(self.ahead)
        batch = self.pending + self.ahead + self._begin(max(fresh, 0), step)
        ahead = self._begin(room, step) if s.prefetch else []
        before = sum(p.drawn for p in batch + ahead)
        begin = time.perf_counter()
        mine = [groups[jax.process_index() :: jax.process_count()] for groups in (batch, ahead)]
        mine = self._sample(params, *mine, step)
        middle = time.perf_counter()
        done = iter(self._grade([p for p in mine[0] if not p.running]))
        groups = gather([p if p.running else next(done) for p in mine[0]])
        self.ahead = gather(mine[1])
        self.pending = [g for g in groups if isinstance(g, Partial)]
        groups = [g for g in groups if isinstance(g, Group)]
        drawn = sum(p.drawn for p in self.pending + self.ahead) + sum(int(g.lengths.sum()) for g in groups) - before
        groups = shape_rewards(groups, c, self.tokenizer, length_weight(c, step))
        for g in groups:
            self.mean_lengths[g.problem.id] = mean_length(g) if g.valid.any() else 0.0
        if c.batch.greso:
            self.greso = greso_update(self.greso, groups)
        counts["time/rollout"] += middle - begin
        counts["time/grade"] += time.perf_counter() - middle
        counts["tokens"] += drawn
        counts["slot_steps"] += self.sampler.stats.slot_steps * jax.process_count()
        return groups

    def _begin(self, count: int, step: int) -> list[Partial]:
        """The next `count` problems as groups without completions."""
        size = self.config.batch.group_size
        return [
            partial.begin(position, step, problem, np.array(self.task.encode(problem), np.int32), size)
            for position, problem in self._draw(count)
        ]

    def _sample(self, params, batch: list[Partial], ahead: list[Partial], step: int) -> tuple[list, list]:
        """Both lists continued; `ahead` only as far as slots idle while the batch finishes."""
        c, s = self.config, self.config.sampling
        requests = [
            [
                r
                for p in groups
                for r in partial.requests(p, s.max_tokens, s.carry_over, self.mean_lengths.get(p.problem.id, 0.0))
            ]
            for groups in (batch, ahead)
        ]
        out = self.sampler.generate(
            params,
            sum(requests, []),
            seed=c.seed,
            step=step,
            sampling=sampling_settings(c),
            background=len(requests[1]),
        )
        pieces = iter([completion for group in out for completion in group])
        return tuple([partial.extend(p, pieces, s.max_tokens) for p in groups] for groups in (batch, ahead))

    def _draw(self, count: int) -> list[tuple[int, Problem]]:
        """The next `count` problems with their positions; GRESO may skip some before they cost a rollout."""
        out: list[tuple[int, Problem]] = []
        while len(out) < count:  # GRESO keeps every prompt with a positive probability, so this ends
            first, n = self.position, count - len(out)
            rows = [(p, self.task.train[int(self.order[p])]) for p in range(first, first + n)]
            self.position += n
            if self.config.batch.greso:
                rng = np.random.default_rng([self.config.seed, first])
                keep = greso_keep(self.greso, [problem.id for _, problem in rows], rng)
                rows = [row for row, k in zip(rows, keep, strict=True) if k]
            out += rows
        return [(p, with_budget(problem, self.config, p)) for p, problem in out]

    def _grade(self, done: list[Partial]) -> list[Group]:
        texts = [[self.tokenizer.decode(c.tokens) for c in p.completions] for p in done]
        repeated = [p.problem for p, group in zip(done, texts, strict=True) for _ in group]
        grades = iter(self.task.grade(repeated, [t for group in texts for t in group]))
        groups = []
        for p, group_texts in zip(done, texts, strict=True):
            graded = [next(grades) for _ in p.completions]
            finite = [bool(np.isfinite(c.logprobs).all()) for c in p.completions]
            groups.append(
                Group(
                    problem=p.problem,
                    prompt_tokens=p.prompt,
                    completions=p.completions,
                    texts=group_texts,
                    correct=np.array([g.correct for g in graded], np.float32),
                    rewards=np.array([g.reward for g in graded], np.float32),
                    valid=np.array([g.valid and ok for g, ok in zip(graded, finite, strict=True)], bool),
                    outcomes=[g.outcome if ok else "nonfinite" for g, ok in zip(graded, finite, strict=True)],
                )
            )
        return groups

    def _check_failures(self, groups, step: int) -> None:
        invalid = sum(int((~g.valid).sum()) for g in groups)
        total = sum(len(g.completions) for g in groups)
        if total and invalid / total > self.config.task.max_failures:
            raise UserError(
                f"step {step}: {invalid} of {total} completions could not be graded ({outcome_counts(groups)}), "
                f"more than config.task.max_failures={self.config.task.max_failures}"
            )


def sampling_settings(config) -> SamplingParams:
    """What training samples with."""
    s = config.sampling
    return SamplingParams(s.temperature, s.top_k, s.top_p, s.min_p)


def with_budget(problem: Problem, config, position: int) -> Problem:
    """The problem with a length budget drawn for this position, if the config asks for one."""
    mode = config.length.mode
    if mode == "none" or problem.budget is not None:
        return problem
    rng = np.random.default_rng([config.seed, 7, position])
    if mode == "both":
        mode = ("exact", "max")[int(rng.integers(2))]
    budget = int(sample_budgets(rng, 1, config.length.budgets, config.length.low, config.length.high)[0])
    return dataclasses.replace(problem, budget=budget, mode=mode)


def length_weight(config, step: int) -> float:
    """Weight of the length term at a step: config.length.weight, reached linearly in warmup_steps steps."""
    c = config.length
    return c.weight * min(1.0, step / c.warmup_steps) if c.warmup_steps else c.weight


def shape_rewards(groups: list[Group], config, tokenizer=None, weight: float = 1.0) -> list[Group]:
    """Groups with the length reward of config.length applied; invalid completions keep out of its statistics.

    The term that is added to the task's reward is weight x (shaped - correct), so that the value of a user's
    reward function is kept and the term can be warmed up.
    """
    name = config.length.reward
    if name == "none" or not groups:
        return groups
    flags = [g.valid for g in groups]
    valid = np.concatenate(flags)
    lengths = np.concatenate([counted_lengths(g, config.length.count, tokenizer) for g in groups])
    sizes = [len(g.completions) for g in groups]
    correct = np.concatenate([g.correct for g in groups])
    shaped = correct.astype(np.float64)
    shaped[valid] = LENGTH_REWARDS[name].fn(
        correct[valid],
        lengths[valid],
        np.repeat([g.problem.budget or 0 for g in groups], sizes)[valid],
        np.repeat(np.arange(len(groups)), sizes)[valid],
        np.concatenate([g.truncated for g in groups])[valid],
        config.sampling.max_tokens,
        np.repeat([g.problem.mode for g in groups], sizes)[valid],
        dict(config.length.hyper[name]),
    )
    delta = np.split((weight * (shaped - correct)).astype(np.float32), np.cumsum(sizes)[:-1])
    return [dataclasses.replace(g, rewards=g.rewards + d) for g, d in zip(groups, delta, strict=True)]


def counted_lengths(group: Group, count: str, tokenizer) -> np.ndarray:
    """int32 [G]: the tokens a length reward counts: the whole response, or its part up to </think>."""
    if count == "response":
        return group.lengths
    thinking = [len(tokenizer.encode(t.split("</think>")[0])) for t in group.texts]
    return np.minimum(np.array(thinking, np.int32), group.lengths)


def outcome_counts(groups: list[Group]) -> dict[str, int]:
    """How often each grading outcome occurred."""
    counts: dict[str, int] = {}
    for g in groups:
        for outcome in g.outcomes:
            counts[outcome] = counts.get(outcome, 0) + 1
    return dict(sorted(counts.items()))


def group_metrics(groups: list[Group]) -> dict[str, Any]:
    """Metrics of everything that was sampled, before selection."""
    valid = np.concatenate([g.valid for g in groups])
    rewards = np.concatenate([g.rewards for g in groups])[valid]
    lengths = np.concatenate([g.lengths for g in groups])
    spread = [len(set(g.rewards[g.valid].tolist())) > 1 for g in groups]
    targets = np.repeat([g.problem.budget or 0 for g in groups], [len(g.completions) for g in groups])
    out = {
        "reward/mean": float(rewards.mean()) if len(rewards) else 0.0,
        "reward/std": float(rewards.std()) if len(rewards) else 0.0,
        "accuracy": float(np.nanmean([mean_accuracy(g) for g in groups])) if len(rewards) else 0.0,
        "zero_std_fraction": 1.0 - float(np.mean(spread)),
        "response_length/mean": float(lengths.mean()),
        "response_length/min": int(lengths.min()),
        "response_length/max": int(lengths.max()),
        "response_length/p10": float(np.percentile(lengths, 10)),
        "response_length/p50": float(np.percentile(lengths, 50)),
        "response_length/p90": float(np.percentile(lengths, 90)),
        "truncated_fraction": float(np.mean(np.concatenate([g.truncated for g in groups]))),
        "hist/length": length_histogram(lengths),
        **{f"outcome/{k}": v for k, v in outcome_counts(groups).items()},
    }
    if targets.any():
        has = targets > 0
        deviation = np.abs(lengths[has] - targets[has]) / targets[has]
        out["length/deviation"] = float(deviation.mean())
        out["length/violations"] = float((lengths[has] > targets[has]).mean())
    return out


def length_histogram(lengths: np.ndarray, bins: int = 32) -> list[list[int]]:
    """[[upper edge in tokens, count], ...] of at most `bins` bins of equal width."""
    width = max(1, -(-int(lengths.max()) // bins))
    index, counts = np.unique((lengths - 1) // width, return_counts=True)
    return [[int((i + 1) * width), int(n)] for i, n in zip(index, counts, strict=True)]


def group_to_json(group: Group) -> dict:
    """JSON-able form of a group: floats keep their exact value."""
    return {
        "problem": dataclasses.asdict(group.problem),
        "prompt_tokens": group.prompt_tokens.tolist(),
        "completions": [partial.completion_to_json(c) for c in group.completions],
        "texts": group.texts,
        "correct": group.correct.tolist(),
        "rewards": group.rewards.tolist(),
        "valid": group.valid.tolist(),
        "outcomes": group.outcomes,
    }


def group_from_json(data: dict) -> Group:
    """Inverse of group_to_json."""
    return Group(
        problem=Problem(**data["problem"]),
        prompt_tokens=np.array(data["prompt_tokens"], np.int32),
        completions=[partial.completion_from_json(c) for c in data["completions"]],
        texts=data["texts"],
        correct=np.array(data["correct"], np.float32),
        rewards=np.array(data["rewards"], np.float32),
        valid=np.array(data["valid"], bool),
        outcomes=data["outcomes"],
    )


def gather(groups: list[Group | Partial]) -> list[Group | Partial]:
    """The groups of all hosts, in the order the problems were drawn, on every host."""
    if jax.process_count() == 1:
        return groups
    shares = distributed.allgather([partial.to_json(g) if isinstance(g, Partial) else group_to_json(g) for g in groups])
    longest = max(map(len, shares))
    items = [share[i] for i in range(longest) for share in shares if i < len(share)]
    return [partial.from_json(item) if "position" in item else group_from_json(item) for item in items]
