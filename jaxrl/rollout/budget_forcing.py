"""Budget forcing of s1 (arXiv 2501.19393, section 3): thinking is cut at a maximum, or prolonged to a minimum.

A response is sampled in segments. Thinking runs until the end-of-thinking tokens, an end token, or its budget.
Ended early, and while `ignore` lasts: the end is taken back, "Wait" appended, thinking resumed. At the budget the
end of thinking and "Final Answer:" are appended. Then the answer is sampled, with a budget of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxrl.rollout.engine import Engine, Request, SamplingParams


@dataclasses.dataclass(frozen=True)
class Delimiters:
    """Token ids that are looked for or appended.

    end_thinking: ends the thinking part, at least one token. final_answer: appended after it when thinking was
    cut. wait: appended when thinking is prolonged. newline: put before an end of thinking that cuts a line short.
    """

    end_thinking: tuple[int, ...]
    final_answer: tuple[int, ...] = ()
    wait: tuple[int, ...] = ()
    newline: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Forced:
    """One response. tokens: int32 [n], appended ones included. logprobs: float32 [n], 0 where appended.
    sampled: bool [n], False where appended. thinking, answer: tokens in either part, appended ones included in
    thinking. waits: how often thinking was prolonged. cut: whether it reached its budget. finish: of the answer.
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    sampled: np.ndarray
    thinking: int
    answer: int
    waits: int
    cut: bool
    finish: str


class _Draft:
    def __init__(self, request: Request, sample: int):
        self.request, self.sample = request, sample
        self.tokens, self.logprobs, self.sampled = [], [], []
        self.waits, self.cut, self.thinking = 0, False, 0

    def extend(self, tokens, logprobs=None):
        self.tokens += [int(t) for t in tokens]
        self.logprobs += [0.0] * len(tokens) if logprobs is None else [float(x) for x in logprobs]
        self.sampled += [logprobs is not None] * len(tokens)

    def next(self, segment: int, **changes) -> Request:
        """The request that continues this response; its random keys are those of no other segment."""
        prompt = np.concatenate([self.request.prompt, np.array(self.tokens, np.int32)]).astype(np.int32)
        key = (self.request.key + segment * 0x9E3779B1) % 2**32
        changes |= dict(
            prompt=prompt, samples=1, key=key, first_sample=self.request.first_sample + self.sample
        )
        return dataclasses.replace(self.request, **changes)


def generate_forced(
    sampler: Engine,
    params,
    requests: Sequence[Request],
    delimiters: Delimiters,
    *,
    max_thinking: int,
    max_answer: int,
    ignore: int = 0,
    seed: int,
    step: int = 0,
    sampling: SamplingParams | None = None,
) -> list[list[Forced]]:
    """Responses under a thinking budget and an answer budget.

    Args:
      params: from `sampler.layout`. requests: their max_tokens, min_tokens and stop are not used.
      max_thinking: thinking tokens sampled or appended ("Wait") at most, before the closing delimiters.
      max_answer: answer tokens. ignore: how often an early end of thinking is taken back.

    Returns:
      One list of `samples` responses per request.

    Raises:
      ValueError: no end_thinking, `ignore` without wait tokens, budgets below 1, or a response so far that
        exceeds the sampler's max_prompt (it must hold prompt + thinking + delimiters).
    """
    d = delimiters
    if not d.end_thinking or (ignore and not d.wait):
        raise ValueError("delimiters: end_thinking must not be empty, nor wait when ignore is above 0")
    if max_thinking < 1 or max_answer < 1 or ignore < 0:
        raise ValueError(
            f"max_thinking={max_thinking}, max_answer={max_answer}: at least 1; ignore={ignore}: at least 0"
        )
    drafts = [[_Draft(r, j) for j in range(r.samples)] for r in requests]
    running, segment = sum(drafts, []), 0

    def run(batch):
        return [g[0] for g in sampler.generate(params, batch, seed=seed, step=step, sampling=sampling)]

    while running:
        thinking = [
            draft.next(
                segment,
                max_tokens=max_thinking - len(draft.tokens),
                min_tokens=min(segment, 1),
                stop=(d.end_thinking,),
            )
            for draft in running
        ]
        resumed = []
        for draft, done in zip(running, run(thinking), strict=True):
            tokens, size = done.tokens, len(d.end_thinking)
            strip = 1 if done.finish == "eos" else 0
            if tuple(tokens[-size:]) == d.end_thinking:
                strip = size
            draft.cut = not strip
            keep = len(tokens) - strip
            draft.extend(tokens[:keep], done.logprobs[:keep])
            if strip and draft.waits < ignore and len(draft.tokens) + len(d.wait) < max_thinking:
                draft.extend(d.wait)
                draft.waits += 1
                resumed.append(draft)
                continue
            if draft.cut:
                cut_line = d.newline and tuple(draft.tokens[-len(d.newline) :]) != d.newline
                draft.extend((d.newline if cut_line else ()) + d.end_thinking + d.final_answer)
            elif done.finish == "eos":
                draft.extend(d.end_thinking)
            else:
                draft.extend(tokens[keep:], done.logprobs[keep:])  # the model closed its thinking itself
            draft.thinking = len(draft.tokens)
        running, segment = resumed, segment + 1

    flat = sum(drafts, [])
    # keys of the answer do not depend on how many thinking segments other responses took
    answers = run([draft.next(-1, max_tokens=max_answer, min_tokens=0, stop=()) for draft in flat])
    for draft, done in zip(flat, answers, strict=True):
        draft.extend(done.tokens, done.logprobs)
        draft.finish = done.finish
    return [[_finished(draft) for draft in group] for group in drafts]


def _finished(draft: _Draft) -> Forced:
    return Forced(
        np.array(draft.tokens, np.int32),
        np.array(draft.logprobs, np.float32),
        np.array(draft.sampled, bool),
        draft.thinking,
        len(draft.tokens) - draft.thinking,
        draft.waits,
        draft.cut,
        draft.finish,
    )
