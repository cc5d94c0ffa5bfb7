"""The rollout browser of a report page: what is embedded in it, so that browser.js can show any of it on demand.

A page holds, for each run, an index and one blob per step, each as gzipped and base64-encoded JSON in a <script> that
is not executed. The index has what filters need (length, outcome and fate of every answer), so they decode no blob; a
blob is decoded when a group of its step is on the screen. `index_of` and `blob_of` describe the fields.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from jaxrl.errors import UserError
from jaxrl.reporting.runs import Run

HERE = pathlib.Path(__file__).parent
HEAD = 160  # characters of a prompt that the index holds, to search in
CORRECT, CUT, DROPPED, UNGRADED = 1, 2, 4, 8  # bits of an answer's digit in the index; browser.js knows them, too
_GRADED = ("correct", "wrong", "unparsed", "")


def style() -> str:
    """The browser's part of the page's style sheet."""
    return (HERE / "browser.css").read_text(encoding="utf-8")


def section(runs: Sequence[tuple[str, Run]], room: int) -> str:
    """The browser as HTML that takes at most about `room` bytes; "" if no run has samples.

    runs: (label, run). Each run gets an equal share of the room, and more if others need less. If its share is too
    small, steps are left out evenly, and the page says how many.
    """
    runs = [(label, run) for label, run in runs if run.samples]
    if not runs:
        return ""
    script = (HERE / "browser.js").read_text(encoding="utf-8")
    room -= len(script) + 1000  # for the tags
    sizes = [sum(file.stat().st_size for file in run.samples) for _, run in runs]
    embedded = [""] * len(runs)
    for done, i in enumerate(sorted(range(len(runs)), key=sizes.__getitem__)):
        embedded[i] = _embedded(f"r{i}", *runs[i], room // (len(runs) - done))
        room -= len(embedded[i])
    return (
        "<h2>Completions</h2><noscript><p class=lead>The completions need JavaScript; nothing is loaded.</p></noscript>"
        f"<div id=rollouts></div>{''.join(embedded)}<script>{script}</script>"
    )


def _embedded(name: str, label: str, run: Run, room: int) -> str:
    """The <script>s of a run, index first."""
    blobs, facts = {}, {}
    for i in _spread(len(run.samples)):
        step, rows = step_of(run.samples[i]), read_samples(run.samples[i])
        blob, fact = pack(blob_of(rows, step)), facts_of(rows)
        room -= len(blob) + len(pack(fact)) + 60  # its tag; the index of all steps is smaller than its parts alone
        if room < 0:
            break
        blobs[step], facts[step] = blob, fact
    steps = [step for step in sorted(blobs) if facts[step]]
    head = index_of(label, {step: facts[step] for step in steps}, len(run.samples))
    texts = {name: pack(head)} | {f"{name}-{i}": blobs[step] for i, step in enumerate(steps)}
    return "".join(f"<script type=text/plain id={key}>{text}</script>" for key, text in texts.items())


def _spread(n: int) -> list[int]:
    """range(n) in an order whose every prefix is spread over the range: the ends, the middle, the quarters, ..."""
    order, stride = dict.fromkeys([n - 1, 0][: max(n, 0)]), 1 << max(n - 1, 1).bit_length()
    while stride >= 1 and n > 0:
        order |= dict.fromkeys(range(0, n, stride))
        stride //= 2
    return list(order)


def step_of(file: pathlib.Path) -> int:
    """The step of samples/step_00000012.jsonl."""
    return int(file.stem.rpartition("_")[2])


def read_samples(file: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a step's samples. Raises UserError for what is not such a file."""
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
        [row["id"] for row in rows]
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{file}: not a samples file of jaxrl.train; move it out of the run") from None
    return rows


def pack(value: Any) -> str:
    """JSON, gzipped, base64-encoded: no character has a meaning in HTML. Equal values give equal text."""
    data = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    return base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()


def groups_of(rows: Sequence[dict]) -> list[list[dict]]:
    """The rows grouped by prompt; a samples file has the rows of one prompt in sequence."""
    groups: list[list[dict]] = []
    key = None
    for row in rows:
        this = (row["id"], row.get("prompt"), row.get("budget"))
        if this != key:
            groups.append([])
        groups[-1].append(row)
        key = this
    return groups


def facts_of(rows: Sequence[dict]) -> list[tuple[str, str, list[int], str]]:
    """For each group of a step: its problem's id, the head of its prompt, lengths, and one hex digit per answer."""
    found = []
    for group in groups_of(rows):
        digits = [
            CORRECT * bool(row.get("correct"))
            + CUT * (row.get("finish") == "length")
            + DROPPED * (row.get("selected") is False)
            + UNGRADED * (row.get("outcome", "") not in _GRADED)
            for row in group
        ]
        lengths = [row.get("length") or len(row.get("tokens") or ()) for row in group]
        head = str(group[0].get("prompt", ""))[:HEAD]
        found.append((str(group[0]["id"]), head, lengths, "".join(f"{d:x}" for d in digits)))
    return found


def index_of(label: str, facts: dict[int, list], stored: int) -> dict[str, Any]:
    """What filters need. facts: {step: facts_of its rows}. stored: steps that the run has samples of.

    steps: those on the page. problems: [id, head of the prompt]. groups: [index of the step, index of the problem,
    lengths of the answers, their digits].
    """
    problems: dict[tuple[str, str], int] = {}
    groups = []
    for i, step in enumerate(facts):
        for name, head, lengths, digits in facts[step]:
            groups.append([i, problems.setdefault((name, head), len(problems)), lengths, digits])
    return {"label": label, "stored": stored, "steps": list(facts), "problems": list(problems), "groups": groups}


def blob_of(rows: Sequence[dict], step: int) -> list[dict[str, Any]]:
    """The groups of a step with their answers, in the order of the index.

    Of an answer: text (of each token), logp (hundredths of nats), advantage (a number or None), advantages (one a
    token, where they differ), old (runs of tokens by the age in steps of the parameters that drew them, [age, count],
    where any is older than the step), reward, rewards, correct, outcome, cut, dropped (the reason; None: kept), facts.
    """
    return [
        {
            "prompt": str(group[0].get("prompt", "")),
            "answer": _shown(group[0].get("answer")),
            "budget": group[0].get("budget"),
            "answers": [_answer(row, step) for row in group],
        }
        for group in groups_of(rows)
    ]


def _answer(row: dict, step: int) -> dict[str, Any]:
    tokens = row.get("tokens") or [str(row.get("text", ""))]
    logprobs = [*(row.get("logprobs") or ()), *[None] * len(tokens)][: len(tokens)]
    out = {
        "text": tokens,
        "logp": [round(100 * value) if _finite(value) else None for value in logprobs],
        "advantage": _number(row.get("advantage")),
        "reward": _number(row.get("reward")),
        "rewards": {str(k): _number(v) for k, v in (row.get("rewards") or {}).items()},
        "outcome": str(row.get("outcome") or ("correct" if row.get("correct") else "wrong")),
        "length": row.get("length") or len(tokens),
        "cut": row.get("finish") == "length",
        "dropped": None if row.get("selected") is not False else str(row.get("reason") or ""),
    }
    if row.get("advantages"):
        out["advantages"] = [_number(value) for value in row["advantages"]]
    ages = [[step - 1 - version, count] for version, count in row.get("versions") or ()]
    if any(age > 0 for age, _ in ages):
        out["old"] = ages
    return out


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: Any) -> float | None:
    """A finite number in few digits, or None: JSON knows no NaN."""
    return float(f"{value:.4g}") if _finite(value) else None


def _shown(answer: Any) -> str:
    return "" if answer is None else answer if isinstance(answer, str) else json.dumps(answer)
