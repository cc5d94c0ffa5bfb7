"""Budget forcing of s1 (arXiv 2501.19393, section 3): thinking is cut at a maximum, or prolonged to a minimum.

A response is sampled in segments. Thinking runs until the end-of-thinking tokens, an EOS token, or its budget.
If it ends early, the end is removed, "Wait" is appended and thinking resumes, up to `ignore` times. At the budget the
end of thinking and "Final Answer:" are appended. Then the answer is sampled, with a budget of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxrl.rollout.engine import Engine, Request, SamplingParams
from jaxrl.types import Completion


@dataclasses.dataclass(frozen=True)
class Delimiters:
    """Token ids that are looked for or appended.

    end_thinking: ends the thinking part, at least one token. final_answer: appended after it when thinking was
    cut. wait: appended when thinking is prolonged. newline: put before end_thinking where thinking was cut in a line.
    """

    end_thinking: tuple[int, ...]
    final_answer: tuple[int, ...] = ()
    wait: tuple[int, ...] = ()
    newline: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Forced(Completion):
    """One response; appended tokens have `sampled` False. finish: of the answer. thinking: tokens of the thinking part,
    appended ones included. waits: how often thinking was prolonged. cut: whether it reached its budget.
    """

    thinking: int = 0
    waits: int = 0
    cut: bool = False

    @property
    def answer(self) -> int:
        """Tokens of the answer."""
        return self.length - self.thinking


@dataclasses.dataclass
class _Draft:
    """One response under way: sample `sample` of a request for its thinking. anew: how often it went on with random
    numbers of its own, because those of the next positions had drawn the end that was removed."""

    request: Request
    sample: int
    max_answer: int
    ignore: int
    anew: int = 0
    done: Forced = Forced(np.zeros(0, np.int32), np.zeros(0, np.float32), "partial", sampled=np.zeros(0, bool))

    def follow(self, segment: Completion, d: Delimiters) -> Request | None:
        """Add a drawn segment; returns the request for the next one, None if this was the answer."""
        done = self.done = self.done.joined(segment)
        if done.thinking:
            return None
        size = len(d.end_thinking)
        closed = tuple(done.tokens[-size:].tolist()) == d.end_thinking
        ended = size if closed else int(segment.finish == "eos")  # tokens that end the thinking
        kept = done.head(done.length - ended)
        if ended and done.waits < self.ignore and kept.length + len(d.wait) < self.request.max_tokens:
            self.done = dataclasses.replace(kept.forced(d.wait), waits=done.waits + 1)
            self.anew += ended > len(d.wait)
            return dataclasses.replace(self._rest(), min_tokens=self.done.length + 1)
        if not ended:
            cut_line = d.newline and tuple(done.tokens[-len(d.newline) :].tolist()) != d.newline
            done = done.forced((d.newline if cut_line else ()) + d.end_thinking + d.final_answer)
        elif not closed:
            done = kept.forced(d.end_thinking)
        self.done = dataclasses.replace(done, thinking=done.length, cut=not ended)
        return dataclasses.replace(self._rest(), max_tokens=self.max_answer, stop=())

    def _rest(self) -> Request:
        step = self.request.step + (self.anew << 20)
        return dataclasses.replace(self.request.resumed(self.sample, self.done), step=step)


def generate_forced(
    engine: Engine,
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
      params: from `engine.layout`. requests: their max_tokens, min_tokens and stop are not used.
      max_thinking: thinking tokens sampled or appended ("Wait") at most, before the closing delimiters.
      max_answer: answer tokens. ignore: how often an early end of thinking is removed.

    Returns:
      One list of `samples` responses per request.

    Raises:
      ValueError: no end_thinking, `ignore` without wait tokens, budgets below 1, or above the sampler's max_tokens
        together with the delimiters.
    """
    _check(delimiters, max_thinking, max_answer, ignore, engine.max_tokens if requests else None)
    drafts: list[list[_Draft]] = []
    running: dict[tuple[int, int], _Draft] = {}  # by (ticket, sample)
    try:
        for request in requests:
            thinking = dataclasses.replace(
                request, max_tokens=max_thinking, min_tokens=0, stop=(delimiters.end_thinking,),
                step=step if request.step is None else request.step,
            )
            ticket = engine.submit(thinking, seed=seed, step=step)
            drafts.append([_Draft(thinking, sample, max_answer, ignore) for sample in range(request.samples)])
            running |= {(ticket, draft.sample): draft for draft in drafts[-1]}
        while running:
            for event in engine.step(params, sampling):
                if event.completion is None:
                    continue
                draft = running.pop((event.ticket, event.sample))
                rest = draft.follow(event.completion, delimiters)
                if rest is not None:
                    running[engine.submit(rest, seed=seed, step=step), 0] = draft
    finally:
        for ticket, _ in running:
            engine.cancel(ticket)
    return [[draft.done for draft in group] for group in drafts]


def _check(d: Delimiters, max_thinking: int, max_answer: int, ignore: int, max_tokens: int | None) -> None:
    if not d.end_thinking or (ignore and not d.wait):
        raise ValueError("delimiters: end_thinking must not be empty, nor wait when ignore is above 0")
    if max_thinking < 1 or max_answer < 1 or ignore < 0:
        raise ValueError(
            f"max_thinking={max_thinking}, max_answer={max_answer}: at least 1; ignore={ignore}: at least 0"
        )
    closing = len(d.newline + d.end_thinking + d.final_answer)
    if max_tokens is not None and max_thinking + closing + max_answer > max_tokens:
        raise ValueError(
            f"max_thinking={max_thinking}, {closing} closing tokens and max_answer={max_answer} are more than the "
            f"sampler's max_tokens={max_tokens}"
        )
