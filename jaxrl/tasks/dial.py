"""The embedded task: a dial that stops at 0 and 9. No download; a tiny model learns it on a CPU in minutes.

    prompt      dial 7: a+5 b-6 c-4 ?          turn a 7 up by 5 (it stops at 9), b down by 6, c down by 4
    completion   a=9 b=3 c=0 => 0.             the value after each turn, the answer, the end token "."
    also good    => 0.     or    a=9 .. => 0.  turns may be left out; ".." is a token that says nothing

One token per operand ("dial 7:", " a+5"), a label and a digit token per written turn (" a=", "9"): full
working of a problem with n operands costs 2n+1 tokens, end token included, a direct answer 3. A length budget
is one more token in front: "[15 tokens] " (about that many) or "[max 15 tokens] " (at most that many).

Clamping gives every turn a strong marginal signal (its sign and size), which is why a small model learns it
within a few hundred steps where sums modulo 10 stay at chance.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections.abc import Iterator, Sequence

import numpy as np

from jaxrl.errors import UserError
from jaxrl.types import Problem

LABELS = "abcdefghijk"  # one per turn: at most 11 turns, n = 12 operands
MAX_STEP = 6
MAX_OPERANDS = len(LABELS) + 1
MAX_BUDGET = 32
PAD, END, ASK, ARROW, FILLER = "<pad>", ".", " ?", " => ", " .."


def _start(digit: int) -> str:
    return f"dial {digit}:"


def _turn(label: str, step: int) -> str:
    return f" {label}{step:+d}"


def _write(label: str) -> str:
    return f" {label}="


def budget_piece(budget: int | None, mode: str) -> str:
    """The leading length-budget token of a prompt; "" for mode "none". UserError outside 1..MAX_BUDGET."""
    if mode == "none" or budget is None:
        return ""
    if mode not in ("exact", "max") or not 1 <= budget <= MAX_BUDGET:
        raise UserError(f"dial: no token for budget {budget!r} in mode {mode!r}; valid: 1..{MAX_BUDGET}, exact or max")
    return f"[{budget} tokens] " if mode == "exact" else f"[max {budget} tokens] "


# The vocabulary in id order. No piece is a prefix of another: text made of pieces splits in exactly one way.
PIECES: tuple[str, ...] = (
    PAD,
    END,
    ASK,
    ARROW,
    FILLER,
    *(str(d) for d in range(10)),
    *(_start(d) for d in range(10)),
    *(_write(label) for label in LABELS),
    *(_turn(label, sign * size) for label in LABELS for sign in (1, -1) for size in range(1, MAX_STEP + 1)),
    *(budget_piece(b, "exact") for b in range(1, MAX_BUDGET + 1)),
    *(budget_piece(b, "max") for b in range(1, MAX_BUDGET + 1)),
)

_PROMPT = re.compile(r"dial (\d):((?: [a-k][+-][1-6])+) \?")
_ANSWER = re.compile(r"=> (\d)\.?\Z")


def parse_prompt(prompt: str) -> tuple[int, list[int]]:
    """The start digit and the n-1 signed steps of a prompt without budget token; UserError for other text."""
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise UserError(f"dial: not a dial prompt: {prompt!r}; valid: 'dial 7: a+5 b-6 ?'")
    return int(match[1]), [int(turn[1:]) for turn in match[2].split()]


def _turned(value: int, step: int) -> int:
    return min(9, max(0, value + step))


def solve(prompt: str) -> int:
    """Where the dial stands after all turns of a prompt without budget token."""
    return functools.reduce(_turned, parse_prompt(prompt)[1], parse_prompt(prompt)[0])


def is_held_out(prompt: str) -> bool:
    """Whether a prompt (without budget token) is in the held-out tenth; a hash decides, no list is kept."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 26


def feasible_budget(rng: np.random.Generator, n: int, high: int = 22) -> int:
    """Length budget from U[2n+1, high], in tokens: never below the full working of n operands.

    Budgets below that make honest work unaffordable and teach the policy to guess.
    """
    if high < 2 * n + 1:
        raise UserError(f"dial: budget limit {high} is below the {2 * n + 1} tokens that {n} operands need")
    return int(rng.integers(2 * n + 1, high + 1))


def make_problem(
    rng: np.random.Generator,
    id: str,
    split: str = "train",
    n_min: int = 2,
    n_max: int = 8,
    *,
    mode: str = "none",
    max_budget: int = 22,
) -> Problem:
    """Draws one problem of a split ("train" or "heldout") with n ~ U[n_min, n_max] operands.

    mode "exact" or "max" also draws a feasible length budget. Problem.info holds {"n": n}.
    Raises UserError for an unknown split or operand counts outside 2..12.
    """
    if split not in ("train", "heldout"):
        raise UserError(f"dial: unknown split {split!r}; valid: train, heldout")
    if not 2 <= n_min <= n_max <= MAX_OPERANDS:
        raise UserError(f"dial: operand counts {n_min}..{n_max} must lie within 2..{MAX_OPERANDS}")
    while True:
        n = int(rng.integers(n_min, n_max + 1))
        steps = rng.integers(1, MAX_STEP + 1, n - 1) * rng.choice([-1, 1], n - 1)
        turns = "".join(_turn(label, int(step)) for label, step in zip(LABELS, steps, strict=False))
        prompt = _start(int(rng.integers(10))) + turns + ASK
        if is_held_out(prompt) == (split == "heldout"):
            break
    budget = None if mode == "none" else feasible_budget(rng, n, max_budget)
    budget_piece(budget, mode)  # an impossible mode or budget fails here, not in the sampler
    return Problem(id, prompt, str(solve(prompt)), "dial", budget, mode, {"n": n})


def problems(
    split: str,
    seed: int,
    count: int,
    n_min: int = 2,
    n_max: int = 8,
    *,
    mode: str = "none",
    max_budget: int = 22,
) -> list[Problem]:
    """`count` problems of a split; the i-th depends on (split, seed, i) only: longer lists extend shorter.

    Short chains repeat (n = 2 has 120 distinct prompts); ids do not. The harder variant is n_max = 12.
    """
    return [
        make_problem(
            np.random.default_rng([seed, int(split == "heldout"), i]),
            f"dial/{split}/{seed}/{i}",
            split,
            n_min,
            n_max,
            mode=mode,
            max_budget=max_budget,
        )
        for i in range(count)
    ]


def prompt_text(problem: Problem) -> str:
    """What the policy reads: the budget token, if the problem carries one, and the prompt."""
    return budget_piece(problem.budget, problem.mode) + problem.prompt


def grade(problem: Problem, text: str) -> str:
    """Outcome of a completion text: "correct", "wrong", or "unparsed" if it does not end in an answer.

    The text must end in "=> digit" (end token optional: a tokenizer may hide it) and give one answer only.
    """
    match = _ANSWER.search(text)
    if match is None:
        return "unparsed"
    return "correct" if match[1] == problem.answer and text.count("=>") == 1 else "wrong"


def _working(rng: np.random.Generator, prompt: str, phase: str) -> tuple[list[str], int]:
    """The written turns of one demonstration (two tokens each) and the answer they lead to."""
    style = rng.random()
    skip = 0.0 if phase == "full" or style >= 0.90 else 1.0 if style < 0.55 else 0.5
    error = 0.05 if phase == "sloppy" else 0.0
    value, steps = parse_prompt(prompt)
    written = []
    for label, step in zip(LABELS, steps, strict=False):
        value = _turned(value, step)
        if rng.random() >= skip:
            if rng.random() < error:  # carried on, so that the answer always follows from the working
                value = (value + int(rng.integers(1, 10))) % 10
            written.append(_write(label) + str(value))
    return written, value


def demonstrations(
    phase: str,
    seed: int,
    count: int,
    n_min: int = 2,
    n_max: int = 8,
    *,
    modes: Sequence[str] = ("exact",),
    max_tokens: int = 24,
    max_budget: int = 22,
) -> Iterator[tuple[str, str]]:
    """Warm-start data: (prompt text, completion text without the end token) pairs, on training prompts only.

    phase "full": correct working of every turn; it teaches the skill and sets the ceiling RL can reach.
    phase "sloppy": 55 % answer directly, 35 % leave out each turn with probability 1/2, 10 % write all; 5 %
        of the written turns are wrong; 20 % hold one to three fillers. It sets where RL starts.
    In both, half of the prompts carry a budget token U[4, max_budget] of one of `modes` (() for none at all)
    and 70 % of those are obeyed, sloppily: fillers before the answer bring the length up to budget times
    U(0.5, 1.5). These budgets need not be feasible. Completions take at most max_tokens, end token included.
    Raises UserError for another phase, or when max_tokens cannot hold the full working of n_max operands.
    """
    if phase not in ("full", "sloppy"):
        raise UserError(f"dial: unknown demonstration phase {phase!r}; valid: full, sloppy")
    if max_tokens < 2 * n_max + 1:
        raise UserError(f"dial: {n_max} operands need {2 * n_max + 1} tokens, max_tokens is {max_tokens}")
    for i in range(count):
        rng = np.random.default_rng([seed, 2 + int(phase == "sloppy"), i])
        problem = make_problem(rng, f"dial/demo/{i}", "train", n_min, n_max)
        parts, answer = _working(rng, problem.prompt, phase)
        length = 2 * len(parts) + 3
        if phase == "sloppy" and rng.random() < 0.2:
            for _ in range(min(int(rng.integers(1, 4)), max_tokens - length)):
                parts.insert(int(rng.integers(len(parts) + 1)), FILLER)
                length += 1
        if modes and rng.random() < 0.5:
            budget = int(rng.integers(4, max_budget + 1))
            problem = dataclasses.replace(problem, budget=budget, mode=modes[int(rng.integers(len(modes)))])
            if rng.random() < 0.7:
                target = min(max_tokens, round(budget * rng.uniform(0.5, 1.5)))
                parts += [FILLER] * max(0, target - length)
        yield prompt_text(problem), "".join(parts) + ARROW + str(answer)
