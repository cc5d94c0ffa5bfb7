"""Arithmetic in words: a generated data set for small instruction-tuned models.

    words                               training problems
    words:split=test:count=256          held-out ones; a hash of the question decides which those are
    words:kind=other                    other kinds, out of domain: rectangles, sequences, clocks, percentages
    words:split=demos:budgets=exact     training problems with solutions, whose length the prompt asks for (jaxrl.sft)

    Ana has 23 shells. Ben gives her 18 more, and then she gives 9 to Cleo. How many shells does Ana have now?
    23 + 18 = 41. 41 - 9 = 32. The answer is \\boxed{32}.

Settings: split (train, test, demos), kind (sums, other), count, seed, most (the largest number drawn: how hard the
arithmetic is), budgets (none, exact, max: the length that prompts of demonstrations ask for), lengths (four: solutions
of four styles; many: the calculations and up to seven remarks, 25 to 110 tokens). A problem has one to three steps and
a whole number as its answer. A row holds id, problem, answer, solution, kind and steps. If prompts of demonstrations
ask for a length, it also holds mode; if solutions state their length, length_as: the placeholder for it in them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxrl.errors import UserError

PEOPLE = (
    "Ana Ben Cleo Dan Ella Finn Gia Hugo Ivy Jack Kate Liam Mia Noah Olga Paul Rosa Sam Tara Umar Vera Will Yara Zoe "
    "Adam Beth Carl Dora Emil Fay Gus Hana Igor June Karl Lena Max Nina Omar Pia"
).split()
THINGS = (
    "apples shells marbles stickers pencils books cards coins beads stamps cookies flowers balloons tickets buttons "
    "photos plums candles oranges keys"
).split()
DEFAULTS = dict(split="train", kind="sums", count=0, seed=0, most=40, budgets="none", lengths="four")
COUNTS = {"train": 8000, "test": 512, "demos": 8000}
CHOICES = {"split": tuple(COUNTS), "kind": ("sums", "other"), "budgets": ("none", "exact", "max"),
           "lengths": ("four", "many")}


class Worked(NamedTuple):
    """A problem with its working. steps: (what is found, the calculation, its value); the last one is the answer."""

    question: str
    steps: list[tuple[str, str, int]]


class _Draw:
    """The random parts of one problem: numbers, people, a thing."""

    def __init__(self, rng: np.random.Generator, most: int):
        self.rng, self.most = rng, most
        self.a, self.b, self.c = (PEOPLE[i] for i in rng.choice(len(PEOPLE), 3, replace=False))
        self.thing = THINGS[int(rng.integers(len(THINGS)))]

    def number(self, low: int = 2, high: int = 0) -> int:
        """A whole number in [low, high]; high 0 stands for the setting `most`."""
        return int(self.rng.integers(low, max(low, high or self.most) + 1))


def _more(d: _Draw) -> Worked:
    x, y = d.number(5), d.number()
    return Worked(
        f"{d.a} has {x} {d.thing} and {d.b} has {y} {d.thing}. How many {d.thing} do they have together?",
        [(f"{d.thing} together", f"{x} + {y}", x + y)],
    )


def _left(d: _Draw) -> Worked:
    x = d.number(10)
    y = d.number(2, x - 1)
    return Worked(
        f"{d.a} had {x} {d.thing} and gave {y} of them to {d.b}. How many {d.thing} does {d.a} have left?",
        [(f"{d.thing} left", f"{x} - {y}", x - y)],
    )


def _boxes(d: _Draw) -> Worked:
    n, k = d.number(3, 12), d.number(3, 12)
    return Worked(
        f"{d.a} packs {n} boxes with {k} {d.thing} in each. How many {d.thing} does {d.a} pack?",
        [(f"{d.thing} in all boxes", f"{n} * {k}", n * k)],
    )


def _give(d: _Draw) -> Worked:
    x, y = d.number(5), d.number()
    z = d.number(2, x + y - 1)
    return Worked(
        f"{d.a} has {x} {d.thing}. {d.b} gives {d.a} {y} more, and then {d.a} gives {z} to {d.c}. "
        f"How many {d.thing} does {d.a} have now?",
        [(f"{d.thing} after {d.b}'s gift", f"{x} + {y}", x + y), (f"{d.thing} now", f"{x + y} - {z}", x + y - z)],
    )


def _times(d: _Draw) -> Worked:
    x, k = d.number(3, d.most // 2), d.number(2, 5)
    return Worked(
        f"{d.a} read {x} pages on Monday and {k} times as many on Tuesday. How many pages did {d.a} read on both days?",
        [("pages on Tuesday", f"{x} * {k}", x * k), ("pages on both days", f"{x} + {x * k}", x + x * k)],
    )


def _share(d: _Draw) -> Worked:
    k, each, trays = d.number(2, 6), d.number(2, 12), d.number(2, 5)
    return Worked(
        f"{d.a} bakes {trays} trays of {k * each} cookies and shares all of them equally among {k} friends. "
        "How many cookies does each friend get?",
        [("cookies", f"{trays} * {k * each}", trays * k * each),
         ("cookies for each friend", f"{trays * k * each} / {k}", trays * each)],
    )  # fmt: skip


def _earn(d: _Draw) -> Worked:
    rate, x, y = d.number(5, 20), d.number(2, 8), d.number(2, 8)
    return Worked(
        f"{d.a} earns ${rate} an hour and works {x} hours on Monday and {y} hours on Tuesday. "
        f"How many dollars does {d.a} earn?",
        [("hours", f"{x} + {y}", x + y), ("dollars", f"{rate} * {x + y}", rate * (x + y))],
    )


def _change(d: _Draw) -> Worked:
    n, price = d.number(2, 9), d.number(2, 12)
    paid = n * price + d.number(1)
    return Worked(
        f"{d.a} buys {n} {d.thing} at ${price} each and pays with ${paid}. How many dollars does {d.a} get back?",
        [("dollars to pay", f"{n} * {price}", n * price), ("dollars back", f"{paid} - {n * price}", paid - n * price)],
    )


def _save(d: _Draw) -> Worked:
    weekly, weeks, have = d.number(3, 15), d.number(2, 12), d.number(5)
    cost = have + weekly * weeks
    return Worked(
        f"{d.a} wants a bike for ${cost}. {d.a} has ${have} and saves ${weekly} every week. "
        "After how many weeks can the bike be bought?",
        [("dollars missing", f"{cost} - {have}", cost - have), ("weeks", f"{cost - have} / {weekly}", weeks)],
    )


def _half(d: _Draw) -> Worked:
    x, y = 2 * d.number(3), d.number()
    return Worked(
        f"{d.a} had {x} {d.thing}, gave half of them to {d.b} and then found {y} more. "
        f"How many {d.thing} does {d.a} have now?",
        [(f"{d.thing} kept", f"{x} / 2", x // 2), (f"{d.thing} now", f"{x // 2} + {y}", x // 2 + y)],
    )


def _ages(d: _Draw) -> Worked:
    x, k = d.number(4, 20), d.number(2, 3)
    z = d.number(1, k * x - 1)
    return Worked(
        f"{d.a} is {x} years old. {d.b} is {k} times as old as {d.a}, and {d.c} is {z} years younger than {d.b}. "
        f"How old is {d.c}?",
        [(f"{d.b}'s age", f"{k} * {x}", k * x), (f"{d.c}'s age", f"{k * x} - {z}", k * x - z)],
    )


def _shop(d: _Draw) -> Worked:
    n, p, m, q = d.number(2, 9), d.number(2, 12), d.number(2, 9), d.number(2, 12)
    total = n * p + m * q
    return Worked(
        f"{d.a} buys {n} pens at ${p} each and {m} cups at ${q} each. How many dollars does {d.a} spend?",
        [("dollars for pens", f"{n} * {p}", n * p), ("dollars for cups", f"{m} * {q}", m * q),
         ("dollars in all", f"{n * p} + {m * q}", total)],
    )  # fmt: skip


def _stock(d: _Draw) -> Worked:
    boxes, each, rows = d.number(3, 9), d.number(4, 12), d.number(2, 4)
    sold = rows * d.number(2, max(2, boxes * each // rows - 1))
    return Worked(
        f"A shop has {boxes} boxes of {each} {d.thing}. It sells {sold // rows} {d.thing} on each of {rows} days. "
        f"How many {d.thing} are left?",
        [(f"{d.thing} at first", f"{boxes} * {each}", boxes * each),
         (f"{d.thing} sold", f"{sold // rows} * {rows}", sold),
         (f"{d.thing} left", f"{boxes * each} - {sold}", boxes * each - sold)],
    )  # fmt: skip


def _rectangle(d: _Draw) -> Worked:
    x, y = d.number(3, 20), d.number(3, 20)
    return Worked(
        f"A garden is {x} metres long and {y} metres wide. How many metres of fence go around it?",
        [("metres of two sides", f"{x} + {y}", x + y), ("metres of fence", f"2 * {x + y}", 2 * (x + y))],
    )


def _sequence(d: _Draw) -> Worked:
    x, step = d.number(1), d.number(2, 12)
    terms = [x + i * step for i in range(4)]
    return Worked(
        f"The numbers {', '.join(map(str, terms))} follow a rule. What is the next number?",
        [("the step", f"{terms[1]} - {terms[0]}", step), ("the next number", f"{terms[3]} + {step}", terms[3] + step)],
    )


def _clock(d: _Draw) -> Worked:
    hours, minutes, spent = d.number(1, 4), 5 * d.number(1, 11), d.number(5, 55)
    total = 60 * hours + minutes
    return Worked(
        f"A film lasts {hours} hours and {minutes} minutes. {d.a} has seen {spent} minutes of it. "
        "How many minutes are left?",
        [("minutes of whole hours", f"60 * {hours}", 60 * hours),
         ("minutes of the film", f"{60 * hours} + {minutes}", total),
         ("minutes left", f"{total} - {spent}", total - spent)],
    )  # fmt: skip


def _percent(d: _Draw) -> Worked:
    share, whole = (10, 20, 25, 50)[d.number(0, 3)], 20 * d.number(1, 12)
    parts = 100 // share
    return Worked(
        f"{share} percent of the {whole} pupils of a school come by bike. How many pupils do not come by bike?",
        [("pupils with a bike", f"{whole} / {parts}", whole // parts),
         ("pupils without", f"{whole} - {whole // parts}", whole - whole // parts)],
    )  # fmt: skip


KINDS: dict[str, tuple[Callable[[_Draw], Worked], ...]] = {
    "sums": (_more, _left, _boxes, _give, _times, _share, _earn, _change, _save, _half, _ages, _shop, _stock),
    "other": (_rectangle, _sequence, _clock, _percent),
}


def is_held_out(question: str) -> bool:
    """Whether a question belongs to the held-out tenth."""
    return hashlib.sha256(question.encode()).digest()[0] < 26


def solution(worked: Worked, style: int, rng: np.random.Generator) -> str:
    """The working in words. style: 0 calculations only, 1 a sentence a step, 2 with a plan in front, 3 with a check of
    every step besides."""
    lines = []
    if style >= 2:
        wanted = [f"the {what.removeprefix('the ')}" for what, _, _ in worked.steps]
        plan = ", then ".join(wanted)
        lines.append((f"Let us find {plan}.", f"We need {plan}. Let us go step by step.")[int(rng.integers(2))])
    return _ended(lines + _steps(worked, style), worked)


def _steps(worked: Worked, style: int) -> list[str]:
    lines = []
    for i, (what, calculation, value) in enumerate(worked.steps):
        if style == 0:
            lines.append(f"{calculation} = {value}.")
            continue
        start = ("First", "Then", "Finally")[min(i, 2)] if len(worked.steps) > 1 else "So"
        lines.append(f"{start}, {what}: {calculation} = {value}.")
        if style == 3:
            lines.append(_check(calculation, value))
    return lines


def _ended(lines: list[str], worked: Worked) -> str:
    return " ".join([*lines, f"The answer is \\boxed{{{worked.steps[-1][2]}}}."])


LENGTH = "{tokens}"
REMARKS = 8  # a solution of chosen length has fewer remarks than that


def long_solution(worked: Worked, remarks: int) -> str:
    """The calculations, the length that was asked for, the number of remarks, and so many remarks, counted down. Each
    is nine of SmolLM2's tokens.

    The model decides on the number of remarks once, right after the length that it follows from. Afterwards it need not
    count, so a small model can learn this. LENGTH stands for the length until jaxrl.sft fills it in.
    """
    counted = (f"{i}: no number was left out." for i in range(remarks, 0, -1))
    said = [f"Think for {LENGTH} tokens: {remarks} remarks.", *counted]
    return _ended([*_steps(worked, 0), *said], worked)


def _check(calculation: str, value: int) -> str:
    x, sign, y = calculation.split()
    inverse = {"+": "-", "-": "+", "*": "/", "/": "*"}[sign]
    return f"Check: {value} {inverse} {y} = {x}, which is right."


def settings_of(spec: str) -> dict[str, Any]:
    """The settings of "words:name=value:...". Raises UserError naming the setting that is wrong."""
    settings = dict(DEFAULTS)
    for part in spec.split(":")[1:]:
        key, _, value = part.partition("=")
        try:
            settings[key] = type(DEFAULTS[key])(value)
        except (KeyError, ValueError):
            raise UserError(f"{spec}: {part!r}: need one of {', '.join(DEFAULTS)}, and a value") from None
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"{spec}: {key}={value!r}: choose one of {', '.join(CHOICES[key])}")
    if settings["count"] < 0 or settings["seed"] < 0 or not 10 <= settings["most"] <= 500:
        raise UserError(f"{spec}: count and seed must be at least 0, most within 10..500")
    settings["count"] = settings["count"] or COUNTS[settings["split"]]
    return settings


def rows(spec: str) -> Iterator[dict[str, Any]]:
    """The rows of a specification, in order; the i-th depends on the settings and i only. Questions do not repeat."""
    s = settings_of(spec)
    seen: set[str] = set()
    number = 0
    while len(seen) < s["count"]:
        rng = np.random.default_rng([s["seed"], tuple(COUNTS).index(s["split"]), number])
        number += 1
        if number > 50 * s["count"] + 1000:
            raise UserError(f"{spec}: only {len(seen)} different questions can be made; lower count or raise most")
        makers = KINDS[s["kind"]]
        worked = makers[int(rng.integers(len(makers)))](_Draw(rng, s["most"]))
        if worked.question in seen or is_held_out(worked.question) != (s["split"] == "test"):
            continue
        seen.add(worked.question)
        style = int(rng.choice(4, p=(0.35, 0.35, 0.2, 0.1)))
        if s["lengths"] == "many":
            text = long_solution(worked, int(rng.integers(REMARKS)))
        else:
            text = solution(worked, style, rng)
        row = {"id": f"words/{s['split']}/{s['seed']}/{len(seen) - 1}", "problem": worked.question}
        row |= {"answer": str(worked.steps[-1][2]), "solution": text}
        row |= {"kind": s["kind"], "steps": len(worked.steps)}
        if s["lengths"] == "many":
            row |= {"length_as": LENGTH}
        if s["split"] == "demos" and s["budgets"] != "none":
            row |= {"mode": s["budgets"]}
        yield row
