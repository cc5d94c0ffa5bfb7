r"""The grader of mathematical answers: extraction, exact checks here, algebra in processes that can be killed.

    with Grader(workers=2) as grader:
        outcomes = grader.grade([(completion_text, reference_answer), ...])

Outcomes: "correct", "wrong", "unparsed" (no answer found, or not a formula) are rewards; "timeout" and "crashed" say
that the grader failed, and such completions must be kept out of training. Text of the model is never evaluated in this
process. What counts as an answer: answers.py. What counts as equal: equality.py and grader_worker.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from jaxrl.tasks import answers, equality
from jaxrl.tasks.workers import Pool

GRADER_VERSION = "6"  # raise it with every change of a verdict: results of different versions do not compare
OUTCOMES = ("correct", "wrong", "unparsed", "timeout", "crashed")

_reference = functools.lru_cache(4096)(answers.reference)


class Grader:
    """Grades batches from any thread; a context manager. Worker processes start at the first pair that needs them.

    workers: processes. timeout: wall-clock seconds per pair; then its worker is killed. memory_mb: address space of a
    worker. batch_timeout: seconds for all pairs of one call, so that any batch costs bounded time; pairs not started by
    then are "timeout". need_marker: without a box, <answer>, "####" or "answer is", a text is "unparsed". unfinished:
    how a text that ends inside its thinking is read: "wrong" (no answer) or "graded" (as if that were no thinking).
    """

    def __init__(
        self,
        workers: int = 2,
        timeout: float = 5.0,
        *,
        memory_mb: int = 1024,
        batch_timeout: float = 300.0,
        need_marker: bool = False,
        unfinished: str = "wrong",
    ):
        self.batch_timeout = batch_timeout
        self.reading = {"need_marker": need_marker, "unfinished": unfinished}
        self._pool = Pool("jaxrl.tasks.grader_worker", [str(memory_mb)], workers, timeout)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        self._pool.close()

    @property
    def version(self) -> str:
        """Everything that verdicts depend on besides the texts: results of different versions do not compare."""
        marker, graded = self.reading["need_marker"], self.reading["unfinished"] == "graded"
        return GRADER_VERSION + " need_marker" * marker + " unfinished=graded" * graded

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[str]:
        """One outcome for each (completion text, reference answer). Equal pairs that need algebra are compared once.

        Raises UserError if no worker can be started (math-verify not installed).
        """
        outcomes: list[str | None] = []
        jobs: dict[tuple[str, str], list[int]] = {}
        for i, (text, gold) in enumerate(pairs):
            outcome = self._quick(text, gold)
            if isinstance(outcome, tuple):
                jobs.setdefault(outcome, []).append(i)
                outcome = None
            outcomes.append(outcome)
        if jobs:
            for places, (status, value) in zip(
                jobs.values(), self._pool.map(list(jobs), self.batch_timeout), strict=True
            ):
                for i in places:
                    outcomes[i] = value if status == "ok" else "timeout" if status == "timeout" else "crashed"
        return outcomes

    def _quick(self, text: str, gold: str) -> str | tuple[str, str]:
        """The outcome where it takes no algebra, otherwise the pair of formulas to compare."""
        answer = answers.extract(text, **self.reading)
        if answer is None:
            return "unparsed"
        reference = _reference(gold)
        equal = equality.decide(reference, answer)
        if equal is not None:
            return "correct" if equal else "wrong"
        if equality.too_costly(answer.latex):
            return "unparsed"
        return reference.latex[: answers.MAX_ANSWER], answer.latex
