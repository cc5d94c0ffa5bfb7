"""Samples answers to problems and summarises their grades: accuracy, pass@k, maj@k, with intervals.

A record is one problem with its graded samples, JSON-able, and all statistics are functions of records, so
that an interrupted evaluation can be finished and old completions can be summarised anew.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import numpy as np

from jaxrl.algorithms.metrics import bootstrap_interval, maj_at_k, pass_at_k, wilson_interval
from jaxrl.rollout.engine import Engine, Request, SamplingParams
from jaxrl.runtime import distributed
from jaxrl.tasks.task import Grade
from jaxrl.types import Problem

# Training steps count from 0, so evaluation never draws with a training step's random keys; and all
# checkpoints of a run are evaluated with the same ones, which makes their differences less noisy.
EVALUATION_STEP = 2**32 - 1

Records = list[dict[str, Any]]


def evaluate_problems(
    sampler: Engine,
    params: Any,
    tokenizer,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    *,
    grade: Callable[[Sequence[Problem], Sequence[str]], Sequence[Grade]],
    samples: int = 1,
    sampling: SamplingParams | None = None,
    seed: int = 0,
    max_tokens: int | None = None,
    vote: Callable[[Problem, str], Hashable | None] | None = None,
    generate: Callable | None = None,
    room: int = 1,
) -> Records:
    """Samples every problem `samples` times, and grades. On several hosts each does its share.

    Args:
      params: in the sampler's layout. prompts: token ids, one list per problem.
      grade: as Task.grade; called once with problems repeated for their samples.
      max_tokens: limit per response; None is the sampler's own. Prompts that leave less room than that in
        the model's context get what is left.
      vote: (problem, text) -> the answer in a normal form for majority voting, None if there is none. All
        correct samples get the same vote, whatever form their answer has. None leaves maj@k out.
      generate: in place of sampler.generate. room: tokens that the context must leave for a response.

    A problem's completions depend on (seed, problem id, sample index) only: not on which others are
    evaluated with it.

    Returns:
      Records in the order of problems: {"id", "answer", "budget", "mode", "prompt_tokens", "samples":
      [{"text", "tokens", "finish", "outcome", "correct", "valid", "vote"}]}.
    """
    count, share = len(problems), slice(jax.process_index(), None, jax.process_count())
    problems, prompts = problems[share], prompts[share]
    generate = generate or sampler.generate
    context = sampler.config.max_position_embeddings
    limits = [min(max_tokens or sampler.max_tokens, context - len(prompt)) for prompt in prompts]
    fits = [
        0 < len(prompt) <= sampler.max_prompt and limit >= room
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    requests = [
        Request(np.asarray(prompt, np.int32), samples, limit, zlib.crc32(problem.id.encode()))
        for problem, prompt, limit, fit in zip(problems, prompts, limits, fits, strict=True)
        if fit
    ]
    drawn = iter(generate(params, requests, seed=seed, step=EVALUATION_STEP, sampling=sampling))
    # A prompt that leaves no room for an answer, or that the tokenizer cannot encode, counts as answered wrongly:
    # leaving it out would raise the accuracy.
    groups = [
        [{"text": tokenizer.decode(c.tokens), "tokens": c.length, "finish": c.finish} for c in next(drawn)]
        if fit
        else [{"text": None, "tokens": 0, "finish": "no room" if len(prompt) else "no words"}] * samples
        for prompt, fit in zip(prompts, fits, strict=True)
    ]
    records = graded_records(problems, [len(prompt) for prompt in prompts], groups, grade, vote)
    if jax.process_count() == 1:
        return records
    shares = distributed.allgather(records)
    return [shares[i % len(shares)][i // len(shares)] for i in range(count)]


def graded_records(
    problems: Sequence[Problem], prompt_tokens: Sequence[int], groups: Sequence[list[dict]], grade: Callable,
    vote: Callable | None,
) -> Records:  # fmt: skip
    """Records of sampled answers. groups: the samples of each problem, {"text", "tokens", "finish"}; text None: the
    prompt could not be sampled. grade, vote: as in evaluate_problems."""
    asked = [(p, s["text"]) for p, group in zip(problems, groups, strict=True) for s in group if s["text"] is not None]
    grades = iter(grade([p for p, _ in asked], [text for _, text in asked]))

    def graded(problem: Problem, sample: dict) -> dict:
        if sample["text"] is None:
            return {**sample, "text": "", "outcome": "unparsed", "correct": 0.0, "valid": True, "vote": None}
        found = next(grades)
        voted = "correct" if found.correct else _vote(vote, problem, sample["text"])
        outcome = {"outcome": found.outcome, "correct": float(found.correct), "valid": bool(found.valid)}
        return {**{k: sample[k] for k in ("text", "tokens", "finish")}, **outcome, "vote": voted}

    return [
        {
            "id": problem.id,
            "answer": problem.answer,
            "budget": problem.budget,
            "mode": problem.mode,
            "prompt_tokens": size,
            "samples": [graded(problem, sample) for sample in group],
        }
        for problem, size, group in zip(problems, prompt_tokens, groups, strict=True)
    ]


def _vote(vote, problem: Problem, text: str) -> str | None:
    answer = vote(problem, text) if vote else None
    return None if answer is None else f"= {answer}"  # never equal to "correct"


def sample_counts(n: int) -> list[int]:
    """The k of pass@k and maj@k worth reporting for n samples: powers of two from 2, and n."""
    return sorted({*(2**i for i in range(1, n.bit_length()) if 2**i <= n), *([n] if n > 1 else [])})


def summarize(records: Records) -> dict[str, float]:
    """Statistics of records (see evaluate_problems); {} for none.

    accuracy: mean over problems of the share of correct samples (avg@k). pass@k: unbiased. maj@k: where
    votes were recorded. Each with _low and _high, a 95 % interval over problems: Wilson's for one sample
    each or if all problems agree, else bootstrap. Samples that could not be graded count in none of these,
    nor problems without any graded sample; `ungraded` is their share. mean_tokens, median_tokens: of all
    samples. truncated: share that ran into the limit, or had no room at all. unparsed: share without an
    answer. problems, samples: counts.
    """
    if not records:
        return {}
    graded = [[s for s in record["samples"] if s["valid"]] for record in records]
    graded = [group for group in graded if group]
    every = [s for record in records for s in record["samples"]]
    tokens = np.array([s["tokens"] for s in every])
    out: dict[str, float] = {}
    means = [float(np.mean([s["correct"] for s in group])) for group in graded]
    single = all(len(group) == 1 for group in graded)
    out |= _estimate("accuracy", means, wilson=single)
    counts = [(len(group), round(sum(s["correct"] for s in group))) for group in graded]
    for k in sample_counts(max(len(record["samples"]) for record in records)):
        enough = [i for i, (n, _) in enumerate(counts) if n >= k]
        if enough:
            out |= _estimate(f"pass@{k}", [pass_at_k(*counts[i], k) for i in enough])
        if enough and any(s.get("vote") for s in every):
            out |= _estimate(f"maj@{k}", [_majority(graded[i], k) for i in enough])
    out |= {
        "mean_tokens": float(tokens.mean()),
        "median_tokens": float(np.median(tokens)),
        "truncated": float(np.mean([s["finish"] in ("length", "no room") for s in every])),
        "unparsed": float(np.mean([s["outcome"] == "unparsed" for s in every])),
        "ungraded": float(np.mean([not s["valid"] for s in every])),
        "problems": len(records),
        "samples": max(len(record["samples"]) for record in records),
    }
    return out


def _estimate(name: str, values: list[float], wilson: bool = False) -> dict[str, float]:
    if not values:
        return {name: float("nan"), f"{name}_low": 0.0, f"{name}_high": 1.0}
    # a bootstrap of nothing but zeros, or ones, would claim certainty
    wilson = wilson or set(values) in ({0.0}, {1.0})
    low, high = wilson_interval(sum(values), len(values)) if wilson else bootstrap_interval(values)
    return {name: float(np.mean(values)), f"{name}_low": low, f"{name}_high": high}


def _majority(group: list[dict], k: int) -> float:
    correct = [s["correct"] for s in group]
    if not any(correct) or all(correct):  # most problems: spares the resampling
        return float(correct[0])
    return maj_at_k([s["vote"] for s in group], correct, k, draws=200)
