"""From completions to grades, for every kind of task: dial, math, choice, and reward functions of the user."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from jaxrl.errors import UserError
from jaxrl.tasks import dial
from jaxrl.tasks.choices import choice_letter
from jaxrl.tasks.grader import Grader
from jaxrl.tasks.task import Grade
from jaxrl.tasks.workers import Pool
from jaxrl.types import Problem

KINDS = ("dial", "math", "choice", "user")
_GRADED = ("correct", "wrong", "unparsed")
_MIN_CALLS = 16  # before the share of failures means anything
_log = logging.getLogger(__name__)


class UserReward:
    """A function `reward(problem, completion_text, answer, **info) -> float`, named "module:function". It may return a
    dict name -> float instead, of rewards that are logged apart and summed with config.rewards.weights.

    problem: the prompt text; info: the other fields of the data row and the problem's id. It runs in worker
    processes (module found from the current directory), `timeout` seconds of wall clock per call. A call
    that raises, returns None, NaN, an infinity (also one in float32) or no number, or does not return, fails: its
    completion is masked, and the first of each batch is logged with the problem's id. A share of failed calls above
    max_failures raises UserError. A context manager; usable from any thread.
    """

    def __init__(self, spec: str, workers: int = 1, timeout: float = 5.0, max_failures: float = 0.5):
        module = spec.partition(":")[0]
        if not spec.partition(":")[2] or not module:
            raise UserError(f"reward {spec!r}: valid is module:function")
        self.spec, self.max_failures = spec, max_failures
        self.calls = self.failures = 0
        self._pool = Pool("jaxrl.tasks.reward_worker", [spec], workers, timeout)

    def __enter__(self) -> UserReward:
        return self

    def __exit__(self, *exc) -> None:
        self._pool.close()

    def rewards(self, problems: Sequence[Problem], texts: Sequence[str]) -> list[tuple[float | dict | None, str]]:
        """(reward, "ok") or (None, "timeout" or "crashed") per completion.

        Raises UserError if the function cannot be imported, or fails too often.
        """
        jobs = [[p.prompt, t, p.answer, _info(p)] for p, t in zip(problems, texts, strict=True)]
        results, first = [], ""
        for problem, (status, value) in zip(problems, self._pool.map(jobs), strict=True):
            if status == "ok":
                results.append((value, "ok"))
                continue
            if not first:
                reason = {
                    "timeout": f"took more than {self._pool.timeout:g} s",
                    "crashed": "ended its process",
                }
                first = f"problem {problem.id!r}: {reason.get(status, value)}"
            results.append((None, "timeout" if status == "timeout" else "crashed"))
        failed = sum(value is None for value, _ in results)
        self.calls, self.failures = self.calls + len(results), self.failures + failed
        if failed:
            _log.warning("reward %s failed for %d of %d completions, %s", self.spec, failed, len(results), first)
        if self.calls >= _MIN_CALLS and self.failures > self.max_failures * self.calls:
            raise UserError(
                f"reward {self.spec} failed {self.failures} of {self.calls} times, more than the share of "
                f"{self.max_failures:g} that is allowed; {first}"
            )
        return results


def _info(problem: Problem) -> dict:
    """Keyword arguments for a reward function; values that JSON has no form for are passed as text."""
    info = {k: v for k, v in problem.info.items() if k not in ("problem", "completion_text", "answer")}
    return json.loads(json.dumps({"id": problem.id, **info}, default=str))


def grade_group(
    problems: Sequence[Problem],
    texts: Sequence[str],
    grader: Grader | None = None,
    reward: UserReward | None = None,
    opening: str = "",
) -> list[Grade]:
    """Grades completions (texts, parallel to problems), which may belong to different problems and kinds of task.

    Problem.task says how correctness is found: "dial" and "choice" in this process, "math" by `grader`, "user" by
    `reward` alone (correct means a reward of at least 1: of the one named "correct" if there is one, else of the sum).
    With `reward` given, the rewards of all kinds are its own, and correctness is still reported. A completion that the
    grader or the reward function failed on is not valid, its outcome "timeout" or "crashed". opening: the beginning of
    the responses that the prompt already contains (templates.opening), for the graders only. Raises UserError for an
    unknown kind, or one whose grader is missing.
    """
    kinds = {p.task or "math" for p in problems}
    if not kinds <= set(KINDS):
        raise UserError(f"task {', '.join(sorted(kinds - set(KINDS)))!r} cannot be graded; valid: {', '.join(KINDS)}")
    if "math" in kinds and grader is None:
        raise UserError("task 'math' needs a grader")
    if "user" in kinds and reward is None:
        raise UserError("task 'user' needs a reward function: set it as module:function")
    outcomes: list[str] = [""] * len(problems)
    reading = grader.reading if grader else {}
    math_rows = [i for i, p in enumerate(problems) if (p.task or "math") == "math"]
    if math_rows:
        found = grader.grade([(opening + texts[i], problems[i].answer) for i in math_rows])
        for i, outcome in zip(math_rows, found, strict=True):
            outcomes[i] = outcome
    for i, (problem, text) in enumerate(zip(problems, texts, strict=True)):
        if problem.task == "dial":
            outcomes[i] = dial.grade(problem, text)
        elif problem.task == "choice":
            letter = choice_letter(opening + text, **reading)
            outcomes[i] = "unparsed" if letter is None else "correct" if letter == problem.answer else "wrong"
    if reward is None:
        return [Grade(float(o == "correct"), float(o == "correct"), o in _GRADED, o) for o in outcomes]
    grades = []
    for outcome, (value, status) in zip(outcomes, reward.rewards(problems, texts), strict=True):
        named = value if isinstance(value, dict) else {}
        value = sum(named.values()) if named else value
        if value is not None and not outcome:
            outcome = "correct" if named.get("correct", value) >= 1 else "wrong"
        if value is None and outcome in ("", *_GRADED):
            outcome = status
        grades.append(Grade(float(outcome == "correct"), value or 0.0, outcome in _GRADED, outcome, named))
    return grades
