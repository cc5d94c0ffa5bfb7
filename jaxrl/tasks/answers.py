r"""Find the final answer in a text: pure Python, time linear in the text, nothing in it is executed.

Where the answer is, in this order (a model that reasons in <think> tags is read after the first </think>):

1. the last \boxed{...}; boxes next to each other, or joined by "and", "or" or a comma, form one list, so that
   naming two values in two boxes is a list of two values. An unclosed last box is no answer: it was cut off.
   A later "Final answer: ..." overrides the boxes.
2. "#### x", then "the answer is x" / "Answer: x".
3. otherwise the last formula, or the last number (or list of numbers: "41 or 42" is two values) of the last
   line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

MAX_ANSWER = 2000  # characters of an answer; longer ones are not parsed
TAIL = 4000  # characters at the end of a text that are searched when it has no box
MAX_BOXES = 20

# Letters that are not a word: functions and constants of mathematics, and the words that join lists.
MATH_WORDS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt frac pi inf infinity max "
    "min gcd lcm mod det deg dim lim sup ker and or percent percentage pct".split()
)
_PERCENT = re.compile(r"[\s$)\]\\]{0,8}?\\?(?:%|[Pp]ercent(?:age)?\b|[Pp]ct\b)")
_FORMULA = re.compile(
    r"(?<!\\)\$\$(.+?)(?<!\\)\$\$|\\\[((?:(?!\\\[).)+?)\\\]|(?<![\\\d])\$((?:\\\$|[^\n$])+?)(?<!\\)\$|\\\(((?:(?!\\\()[^\n])+?)\\\)",
    re.S,
)
_JOIN = r"\s*(?:,?\s*\b(?:and|or)\b|,|;)\s*"
_VALUE = r"[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:[.,]\d+)?|\.\d+)(?:\s*/\s*\d+)?"
_NUMBERS = re.compile(rf"(?:(?<=[\s=$€£¥:(*])|^){_VALUE}(?:{_JOIN}{_VALUE}){{0,9}}(?:\s*(?:\\?%|percent\b|pct\b))?")
_MARKER = re.compile(r"(?i)\banswer\b\**\s*(?:is\b\s*:?|:|=)\s*")
_FINAL = re.compile(r"(?i)\bfinal answer\b\**\s*(?:is\b\s*:?|:)\s*")
WRAPPER = r"\\(?:text(?:normal|bf|it|rm|sf|sc)?|[mh]box|math(?:rm|bf|it|sf)|operatorname|rm)(?![A-Za-z])\s*"


class Answer(NamedTuple):
    """An extracted answer. latex: without delimiters. bare: it stood in plain text, where 1,5 may be a decimal."""

    latex: str
    bare: bool


def closing_brace(text: str, start: int, limit: int = MAX_ANSWER, pair: str = "{}") -> int:
    """Index of the brace that closes the one at `start`, or -1 if none does within `limit` characters."""
    depth = 0
    for i in range(start, min(len(text), start + limit)):
        if text[i] == pair[0]:
            depth += 1
        elif text[i] == pair[1]:
            depth -= 1
            if depth == 0:
                return i
    return -1


def _last_boxes(text: str) -> tuple[str, int] | None:
    """(content, end) of the last box or list of boxes; content "" when the last box is not closed."""
    contents: list[str] = []
    first, last_end = len(text), len(text)
    for _ in range(MAX_BOXES):
        start = max(text.rfind("\\boxed", 0, first), text.rfind("\\fbox", 0, first))
        if start < 0:
            break
        brace = start + (6 if text.startswith("\\boxed", start) else 5)
        while brace < len(text) and text[brace].isspace():
            brace += 1
        if text[brace : brace + 1] == "{":
            end = closing_brace(text, brace)
            content = text[brace + 1 : end].strip()
        else:
            word = re.match(r"[^\s$]{1,50}", text[brace : brace + 50])
            end, content = (brace + word.end() - 1, word[0].rstrip(".,;")) if word else (-1, "")
        if not contents:
            if end < 0:
                return "", len(text)
            last_end = end + 1
        else:
            between = text[end + 1 : first]
            listed = len(between) < 70 and re.search(r"\b(?:and|or)\b|[,;]", between) and content != contents[-1]
            if end < 0 or end > first or not (len(between) < 10 or listed):
                break  # unclosed, around the one already found, or a result on the way
        if not contents or contents[-1] != content:
            contents.append(content)
        first = start
    if not contents:
        return None
    percent = r"\%" if _PERCENT.match(text[last_end : last_end + 24]) else ""
    return ", ".join(reversed(contents)) + percent, last_end


def boxed(text: str) -> str | None:
    """What the last box of a text, or list of boxes, holds; None without one."""
    found = _last_boxes(text)
    return (found[0] or None) if found else None


def _last(matches: Iterator[re.Match]) -> re.Match | None:
    last = None
    for match in matches:
        last = match
    return last


def _last_formulas(text: str) -> tuple[str, int] | None:
    """(content, end) of the last formula of a text, with those that a comma, "and" or "or" joins to it."""
    found = list(_FORMULA.finditer(text))
    if not found:
        return None
    first = len(found) - 1
    while first > 0 and re.fullmatch(_JOIN, text[found[first - 1].end() : found[first].start()]):
        first -= 1
    content = ", ".join(next(g for g in m.groups() if g) for m in found[first:])
    end = found[-1].end()
    return content + (r"\%" if _PERCENT.match(text[end : end + 24]) else ""), end


def words(latex: str) -> list[str]:
    """Runs of letters that are words, not products of variables or LaTeX commands."""
    plain = re.sub(r"\\[A-Za-z]+|_\{[^{}]*\}", " ", re.sub(WRAPPER, " ", latex))
    return [w for w in re.findall(r"[^\W\d_]{2,}", plain) if is_word(w)]


def is_word(run: str) -> bool:
    """Whether a run of letters reads as a word: "Clara", "odd"; but neither "xy" and "abc" nor "sin"."""
    if run.lower() in MATH_WORDS or len(run) < 3:
        return False
    return not any(set(run) <= set(variables) for variables in ("abcd", "xyzw", "pqrs", "klmn", "ijk", "uvw"))


def _reads_as_formula(text: str) -> bool:
    """Whether plain text without delimiters is itself a formula or a number with a unit, not prose."""
    text = re.sub(r"(?<=[\d)])(?:or|and)(?=[A-Za-z(\d-])", ",", text)
    return (
        len(text) <= 300
        and not words(re.sub(r"^[^A-Za-z\\]*\d\s*[A-Za-z]+[.²³]?$", "", text))
        and (not re.search(r"(?<![\\{A-Za-z])[a-z]{2}\s+\S|[A-Za-z]\d+[A-Za-z]", text))
    )


def _from_plain(text: str, numbers_in: str) -> Answer | None:
    """The answer of a text without boxes and markers; bare numbers are looked for in `numbers_in`, its end."""
    stripped = text.strip().strip("*").strip()
    if stripped and not _FORMULA.search(stripped) and "\n" not in stripped and _reads_as_formula(stripped):
        return Answer(stripped, True)
    formulas = _last_formulas(text)
    start = max(0, (formulas[1] if formulas else 0) - (len(text) - len(numbers_in)))
    numbers = _last(_NUMBERS.finditer(numbers_in, start))
    if numbers:
        return Answer(re.sub(r"\s*(?:,\s*)?\b(?:and|or)\b\s*", ", ", numbers[0].strip()), True)
    return Answer(formulas[0], False) if formulas else None


def _from_marker(rest: str) -> Answer | None:
    """The answer in what follows "the answer is"."""
    rest = rest.lstrip().lstrip("*:").lstrip()
    leading = _FORMULA.match(rest)
    if leading:
        end = leading.end()
        while joined := re.compile(_JOIN).match(rest, end):
            following = _FORMULA.match(rest, joined.end())
            if not following:
                break
            end = following.end()
        end += len(_PERCENT.match(rest[end : end + 24])[0]) if _PERCENT.match(rest[end : end + 24]) else 0
        return Answer(_last_formulas(rest[:end])[0], False)
    line = rest.split("\n", 1)[0]
    sentence = re.split(r"\.(?=\s|$|\*)", line, maxsplit=1)[0].strip().strip("*").strip()
    if not sentence:
        return None
    return _from_plain(sentence, sentence) or Answer(sentence, True)


def extract(text: str, need_marker: bool = False) -> Answer | None:
    """The final answer of a completion, or None. need_marker: accept only boxes, "####" and "answer is"."""
    text = text.split("</think>", 1)[-1]
    boxes = _last_boxes(text)
    if boxes:
        after = text[boxes[1] :][-TAIL:]
        final = _last(_FINAL.finditer(after))
        answer = _from_marker(after[final.end() :]) if final else None
        if answer is None or not re.search(r"\d|\\|[=<>]", answer.latex):
            answer = Answer(boxes[0], False)
        return answer if answer.latex else None
    tail = text[-TAIL:]
    if "####" in tail:
        line = tail.rsplit("####", 1)[1].strip().split("\n", 1)[0]
        return Answer(line.strip(), True) if line.strip() else None
    marker = _last(_MARKER.finditer(tail))
    if marker:
        return _from_marker(tail[marker.end() :])
    if need_marker:
        return None
    lines = tail.rstrip().rsplit("\n", 1)
    return _from_plain(tail.rstrip(), lines[-1])


def reference(gold: str) -> Answer:
    """The reference answer of a data set row: a box if it has one, otherwise all of it, delimiters removed."""
    boxes = _last_boxes(gold)
    if boxes and boxes[0]:
        return Answer(boxes[0], False)
    if boxes:  # never closed
        return Answer(gold[gold.rfind("{") + 1 :] if gold.count("{") == 1 else gold[gold.find("{") + 1 :], False)
    if not _FORMULA.search(gold):
        return Answer(gold.strip().rstrip("."), True)
    outside = _FORMULA.sub(" ", gold)
    if len(outside.split()) > 6:
        return extract(gold) or Answer(gold, True)
    parts, end = [], 0
    for match in _FORMULA.finditer(gold):
        parts += [_outside(gold[end : match.start()]), next(g for g in match.groups() if g)]
        end = match.end()
    return Answer(" ".join(p for p in [*parts, _outside(gold[end:])] if p), False)


def _outside(text: str) -> str:
    """Words between formulas as LaTeX text, so that "$125$ miles" keeps its unit and "$1$ and $2$" its "and"."""
    text = text.strip().strip(".").strip()
    return re.sub(r"[A-Za-z]+", lambda m: rf"\text{{ {m[0]} }}", text.replace("%", r"\%").replace(r"\\%", r"\%"))


def choice_letter(text: str) -> str | None:
    """The letter of the option a completion settles on: "\\boxed{\\text{(C)}}", "Answer: C. 42", a last line "(C)"."""
    answer = extract(text)
    candidate = answer.latex if answer else text[-TAIL:].strip().rsplit("\n", 1)[-1]
    plain = re.sub(r"[{}$*]", "", re.sub(WRAPPER, "", candidate)).strip()
    if re.fullmatch(r"\(?[a-z]\)?\.?", plain):
        plain = plain.upper()
    match = re.match(
        r"(?i:the |correct |option |choice |answer |is )*[(\[]?([A-Z])(?:[)\]]|[.:,!]?(?:\s*$|\s+\d)|[.:] )",
        plain,
    )
    return match[1] if match else None
