"""What can be evaluated: the embedded task, data files, and benchmarks by name with the papers' protocols."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

from jaxrl.errors import UserError
from jaxrl.tasks import dial
from jaxrl.tasks.task import Grade
from jaxrl.types import Problem


class EvalSet(NamedTuple):
    """Problems ready to be asked. spec: as given. encode, grade: as in Task. vote: the answer in a normal
    form, or None. max_tokens: response limit when none is given."""

    spec: str
    name: str
    problems: list[Problem]
    encode: Callable[[Problem], list[int]]
    grade: Callable[[Sequence[Problem], Sequence[str]], list[Grade]]
    vote: Callable[[Problem, str], Hashable | None]
    template: str
    grader_version: str
    max_tokens: int


def load_dial(spec: str, tokenizer, limit: int) -> EvalSet:
    """The embedded task's held-out problems: "dial", or "dial:n_max=12:seed=7:mode=exact".

    Settings: count, seed, n_min, n_max, mode (none, exact, max: problems with a feasible budget each),
    max_budget. Seed 1 is not what training looks at when it evaluates (seed 0).
    """
    settings = dict(count=512, seed=1, n_min=2, n_max=8, mode="none", max_budget=22)
    for part in spec.split(":")[1:]:
        key, _, value = part.partition("=")
        try:
            settings[key] = type(settings[key])(value)
        except (KeyError, ValueError):
            valid = ", ".join(settings)
            raise UserError(f"--data={spec}: {part!r}: need one of {valid}, and a value") from None
    settings["count"] = min(settings["count"], limit or settings["count"])
    problems = dial.problems("heldout", **settings)
    return EvalSet(
        spec=spec,
        name=spec,
        problems=problems,
        encode=lambda problem: tokenizer.encode(dial.prompt_text(problem)),
        grade=_grade_dial,
        vote=lambda problem, text: text.split("=>")[-1].strip() if "=>" in text else None,
        template="dial",
        grader_version="dial 1",
        max_tokens=2 * settings["n_max"] + 8,
    )


def _grade_dial(problems: Sequence[Problem], texts: Sequence[str]) -> list[Grade]:
    outcomes = [dial.grade(problem, text) for problem, text in zip(problems, texts, strict=True)]
    return [Grade(float(o == "correct"), float(o == "correct"), True, o) for o in outcomes]


def load_set(spec: str, tokenizer, grader, flags) -> EvalSet:
    """The data set of one part of --data. Raises UserError for what is neither a file nor a known name."""
    if spec.split(":")[0] == "dial":
        return load_dial(spec, tokenizer, flags["limit"])
    raise UserError(f"--data={spec}: no such file, and no known name")
