"""What goes into the engine and comes out of it: requests, settings, events, statistics. Host data only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxrl.errors import UserError
from jaxrl.types import Completion


@dataclasses.dataclass(frozen=True)
class Request:
    """`samples` completions of one prompt, or the rest of a completion that was begun earlier.

    prompt: int32 [p], p >= 1. max_tokens: response tokens allowed, at least 1; one number, or one per sample.
    key: uint32, identifies the problem in the random keys. expected: guessed response length; longer requests
    start first. first_sample: index of the first sample in the random keys. min_tokens: response tokens before an EOS
    token may be drawn. stop: token sequences that end a completion (finish "stop", the sequence included).
    done: number of tokens at the end of `prompt` that are response tokens, drawn or forced earlier. max_tokens counts
    only the tokens after them; positions in the random keys and min_tokens count them. step: the training step in the
    random keys; None: the one given to `submit`.
    """

    prompt: np.ndarray
    samples: int
    max_tokens: int | Sequence[int]
    key: int
    expected: float = 0.0
    first_sample: int = 0
    min_tokens: int = 0
    stop: tuple[tuple[int, ...], ...] = ()
    done: int = 0
    step: int | None = None

    @property
    def limits(self) -> np.ndarray:
        """int32 [samples]: response tokens allowed. Raises ValueError if max_tokens has another length, or samples is
        negative."""
        if self.samples < 0:
            raise ValueError(f"samples={self.samples}: need 0 or more")
        limits = np.asarray(self.max_tokens, np.int32)
        if limits.ndim and limits.shape != (self.samples,):
            raise ValueError(f"max_tokens: {limits.shape} limits for {self.samples} samples")
        return np.broadcast_to(limits, (self.samples,))

    def resumed(self, sample: int, begun: Completion) -> Request:
        """The request that continues one sample after the tokens `begun` (drawn, forced, or both).

        It draws the same tokens as a sample that drew `begun` itself, without an interruption.
        """
        return dataclasses.replace(
            self,
            prompt=np.concatenate([self.prompt, begun.tokens]).astype(np.int32),
            samples=1,
            max_tokens=int(self.limits[sample]) - begun.length,
            first_sample=self.first_sample + sample,
            done=self.done + begun.length,
        )


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """temperature 0 is greedy; top_k 0, top_p 1, min_p 0 are off. bias: float32 [V], added to the logits.

    -inf in `bias` bans a token. Raises ValueError naming the field that is out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    bias: np.ndarray | None = None

    def __post_init__(self):
        valid = {
            "temperature": (0 <= self.temperature < float("inf"), "at least 0 (0 is greedy)"),
            "top_k": (self.top_k >= 0, "at least 0 (0 is off)"),
            "top_p": (0 < self.top_p <= 1, "in (0, 1] (1 is off)"),
            "min_p": (0 <= self.min_p <= 1, "in [0, 1] (0 is off)"),
        }
        for name, (ok, range_) in valid.items():
            if not ok:
                raise ValueError(f"{name}={getattr(self, name)}: must be {range_}")


@dataclasses.dataclass(frozen=True)
class Event:
    """What one engine step did to one sample of a ticket.

    tokens: int32 [n]; logprobs: float32 [n]: new ones, n >= 1. completion: the whole response, if it ended in this
    step; else None.
    """

    ticket: int
    sample: int
    tokens: np.ndarray
    logprobs: np.ndarray
    completion: Completion | None


@dataclasses.dataclass
class Stats:
    """Counts since the last reset; `generate` resets them when it starts. steps: decode steps run; slot_steps: rows x
    steps, the denominator of utilisation. waits: how often a response gave up its pages for a while.

    seconds_decode: running or waiting for decode calls. seconds_prefill: only launching prefills, which run while the
    host continues (benchmarks/sampler.py measures all of their time). The rest of seconds_total is work of the host.
    """

    tokens: int = 0
    steps: int = 0
    slot_steps: int = 0
    decode_calls: int = 0
    prefill_calls: int = 0
    prefill_tokens: int = 0
    waits: int = 0
    seconds_prefill: float = 0.0
    seconds_decode: float = 0.0
    seconds_total: float = 0.0

    @property
    def utilisation(self) -> float:
        """Share of the slot-steps that produced a token of a completion."""
        return self.tokens / max(self.slot_steps, 1)


def check_request(r: Request, vocab_size: int, max_prompt: int, max_tokens: int) -> np.ndarray:
    """The limits of a request, int32 [samples]. Raises ValueError if a sampler of these sizes cannot take it."""
    limits = r.limits
    low, high = (limits.min(), limits.max()) if len(limits) else (1, 1)
    given, most = len(r.prompt) - r.done, max_tokens - r.done
    if not 1 <= given <= max_prompt or not 1 <= low <= high <= most:
        begun = f", {r.done} of them drawn already" if r.done else ""
        raise ValueError(
            f"prompt of {len(r.prompt)}{begun} and limit of {low if low < 1 else high} tokens; the "
            f"sampler takes prompts of 1..{max_prompt} and limits of 1..{most}"
        )
    tokens = np.asarray(r.prompt)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise ValueError(f"prompt tokens outside the vocabulary, 0..{vocab_size - 1}")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"prompt tokens of {tokens.dtype}: need integers")
    if not all(isinstance(stop, tuple | list) and len(stop) for stop in r.stop):
        raise ValueError("an empty stop sequence, or one that is no tuple of tokens")
    for name, most in (("key", 2**32 - 1), ("first_sample", 2**32 - 1), ("samples", 2**20), ("done", len(tokens))):
        if not 0 <= getattr(r, name) <= most:
            raise ValueError(f"{name}={getattr(r, name)}: need 0 to {most}")
    return limits


def first_stop(tokens: np.ndarray, new: int, stops) -> int | None:
    """Length of `tokens` up to the end of the first stop sequence that ends in its last `new` tokens."""
    ends = []
    for stop in stops:
        first = max(len(tokens) - new - len(stop) + 1, 0)
        for at in range(first, len(tokens) - len(stop) + 1):
            if tuple(tokens[at : at + len(stop)]) == tuple(stop):
                ends.append(at + len(stop))
                break
    return min(ends, default=None)


def decodable(tokenizer, vocab_size: int) -> np.ndarray | None:
    """bool [vocab_size]: the model's tokens that the tokenizer can decode; None if it can decode all of them.

    Models pad their vocabulary: Qwen2.5 has about 270 more rows than tokens. These rows have no text and must not be
    drawn. Raises UserError for a tokenizer with more tokens than the model has rows.
    """
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"tokenizer {tokenizer.name} has token ids up to {tokenizer.vocab_size - 1}, the model only "
                        f"{vocab_size} rows of its vocabulary (vocab_size): they do not belong together")
    allowed = np.arange(vocab_size) < tokenizer.vocab_size
    allowed[list(tokenizer.unused_ids)] = False
    return None if allowed.all() else allowed
