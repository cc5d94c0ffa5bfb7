r"""Find the final answer in a text: pure Python, time linear in the text, nothing in it is executed.

Thinking between <think> and </think> (and its relatives) is left out. The last answer counts, found in this order:

1. the last \boxed{...} or <answer>...</answer>; boxes with nothing but a joiner between them (and, or, a comma, space)
   are one list, so that naming two values in two boxes is a list of two values. An unclosed last box is no answer: it
   was cut off. A later "the answer is x", "Final answer: ..." or "#### x" overrides the box.
2. "#### x", then "the answer is x" / "Answer: x".
3. otherwise the last formula, or the last number (or list of numbers: "41 or 42" is two values) of the last
   line, with the scale word, unit or bound that belongs to it. Numbers in words count in 1 and 2 only.

A text that ends inside its thinking has no answer (unfinished="wrong"), or is read as if that were no thinking
("graded").
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from jaxrl.tasks import units
from jaxrl.tasks.notation import SPACING, WRAPPER, closing_brace
from jaxrl.tasks.numerals import AND_A_PART, BEGINS, in_digits

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
    r"(?<!\\)\$\$(.+?)(?<!\\)\$\$|\\\[((?:(?!\\\[).)+?)\\\]|"
    r"(?<![\\\d])\$((?:\\\$|[^\n$])+?)(?<!\\)\$|\\\(((?:(?!\\\()[^\n])+?)\\\)",
    re.S,
)
_JOIN = r"\s*(?:,?\s*\b(?:and|or)\b|,|;)\s*"
_BETWEEN = re.compile(  # what may lie between boxes of one list, wrappers aside: joiners, ends of formulas, labels
    r"(?:\s|\\[()\[\],;: ]|\\q?quad(?![A-Za-z])|[$,;&]|\b(?:and|or)\b|[A-Za-z](?:_\w)?\s*=|(?:for )?part \(?\w\)?:?)*+"
)
_VALUE = (
    r"[-+]?(?:\d+ [1-9]\d*/\d+|"  # 2 1/3
    r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:[.,]\d+)?|\.\d+)(?:\s*/\s*\d+)?)"
)
_NUMBERS = re.compile(rf"(?:(?<=[\s=$€£¥:(*])|^){_VALUE}(?:{_JOIN}{_VALUE}){{0,9}}(?:\s*(?:\\?%|percent\b|pct\b))?")
# What belongs to a number in prose: 12 million, 12 km, 12 or more, 12 squared; at least 12.
_BEHIND = re.compile(
    rf"{AND_A_PART}?"
    rf"(?:[ -]?(?:{'|'.join(units.SCALE_WORDS)})s?\b)*(?:(?<=\d)(?:[kKMB]|[mb]n)\b)?(?:\s*{units.IN_PROSE})?"
    r"(?:\s+(?:(?:or|and)\s+(?:more|less|fewer|greater|above|below|higher|lower|over|under|larger|smaller|longer|"
    r"shorter|up)|squared|cubed|factorial)\b)?"
)
_BEFORE = re.compile(
    r"(?i)\b(?:at least|at most|up to|(?:(?:no|not) )?(?:more|greater|less|fewer|larger|smaller|higher|lower) than)"
    r"\s*\$?$"
)
_MARKER = re.compile(
    r"(?i)\banswers?\b\**\s*(?:(?:is|are|equals?|(?:should|would|must|will) be|comes? (?:out )?to)\b\s*:?|:|=)\s*"
)
_FINAL = re.compile(r"(?i)\bfinal answer\b\**\s*(?:is\b\s*:?|:)\s*")
_DIRECT = re.compile(rf"[\s*:]*(?:\$|\\[(\[]|[-+]?\.?\d|{BEGINS})")  # a value comes next, not a word about it
_CUT = re.compile(r"\s*[,;(–—-]?\s*(?:and |but )?(?:not|because|since|as|which|so|rather|instead|where)\b")
_ASIDE = re.compile(r"\s*[,;:(–—]|\s+(?:because|since|as|so|which|where|not|but)\b")
_THINK = re.compile(
    r"(?i)<(/?)(?:think|thinking|thoughts?|reason|reasoning)>|\[(/?)think\]|<\|(begin|end)_of_thought\|>"
)
_ANSWER = re.compile(r"(?i)<answer>|</answer>")
UNFINISHED = ("wrong", "graded")


class Answer(NamedTuple):
    """An extracted answer. latex: without delimiters. bare: it stood in plain text, where 1,5 may be a decimal."""

    latex: str
    bare: bool


def thinking_of(text: str) -> str:
    """What stands before "</think>" or another end of thinking that the grader knows; without one, the whole text."""
    closing = (m for m in _THINK.finditer(text) if m[1] or m[2] or (m[3] or "").lower() == "end")
    first = next(closing, None)
    return text[: first.start()] if first else text


def _last_boxes(text: str, reference: bool = False) -> tuple[str, int] | None:
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
        elif end < 0 or end > first or not _joined(text[end + 1 : first], reference):
            break  # unclosed, around the one already found, or a result on the way
        if _ungrouped(content) not in map(_ungrouped, contents[-1:]):
            contents.append(content)
        first = start
    if not contents:
        return None
    percent = r"\%" if _PERCENT.match(text[last_end : last_end + 24]) else ""
    return ", ".join(reversed(contents)) + percent, last_end


def _joined(between: str, reference: bool) -> bool:
    """Whether two boxes are one list. A reference never corrects itself, so any word that joins will do there."""
    if reference:
        return len(between) < 10 or (len(between) < 70 and re.search(r"\b(?:and|or)\b|[,;]", between) is not None)
    return len(between) < 100 and _BETWEEN.fullmatch(re.sub(WRAPPER + "|[{}]", " ", between)) is not None


def _ungrouped(content: str) -> str:
    """The content with 1,000 written as 1000, so that the same value in two boxes is not taken for a list."""
    return re.sub(r"(?<=\d)(?:,|\{,\}|\\[,;: ]|\s)(?=\d{3}(?!\d))", "", content)


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
        and not re.search(r"\?|\b[Nn]ot?\b", text)
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
        return Answer(_in_prose(numbers_in, numbers), True)
    return Answer(formulas[0], False) if formulas else None


def _in_prose(text: str, numbers: re.Match) -> str:
    """A number or list of numbers with what belongs to it: bound and currency in front, scale, unit or bound behind."""
    values = re.sub(r"\s*(?:,\s*)?\b(?:and|or)\b\s*", ", ", numbers[0].strip())
    front = text[max(0, numbers.start() - 40) : numbers.start()]
    before = _BEFORE.search(front)
    currency = "$" if front.endswith("$") and text.count("$") % 2 else ""
    behind = _BEHIND.match(text, numbers.end())[0]
    return (before[0].rstrip("$ ") + " " if before else "") + currency + values + behind


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
    if in_words := _in_words(sentence):
        return Answer(in_words, True)
    leading = _NUMBERS.match(sentence)
    if leading and _CUT.match(sentence, leading.end()):  # "12, not 13"
        return Answer(leading[0].strip(), True)
    return _from_plain(sentence, sentence) or Answer(sentence, True)


def _in_words(sentence: str) -> str:
    """The number in words ("twelve apples") that a sentence is, or is up to the first aside; "" if it is none."""
    plain = sentence.replace("*", "").strip()
    for amount in (plain, _ASIDE.split(plain, maxsplit=1)[0]):
        if in_digits(amount) != amount:
            return amount
    return ""


def spoken(text: str, unfinished: str = "wrong") -> str | None:
    """A completion without its thinking. If it ends inside its thinking: None, or with "graded" also that text.

    The first end of thinking counts without a beginning, too: chat templates write the beginning into the prompt.
    """
    if unfinished not in UNFINISHED:
        raise ValueError(f"unfinished={unfinished!r}; valid: {', '.join(UNFINISHED)}")
    if "<" not in text and "[" not in text:
        return text
    parts, start, thinking, ended = [], 0, False, False
    for tag in _THINK.finditer(text):
        opens = tag[0][1] != "/" and tag[3] != "end"
        if opens and not thinking:
            parts.append(text[start : tag.start()])
        elif not opens and not thinking and ended:
            parts.append(text[start : tag.start()])
        elif not opens and not thinking:
            parts = []
        if not opens or not thinking:
            start = tag.end()
        thinking, ended = opens, ended or not opens
    if thinking and unfinished == "wrong":
        return None
    return " ".join([*parts, text[start:]]) if parts else text[start:]


def _last_tag(text: str) -> tuple[str, int] | None:
    """(content, end) of the last <answer>...</answer>; content "" if it is not closed."""
    start = max(text.rfind("<answer>"), text.rfind("<ANSWER>"), text.rfind("<Answer>"))
    if start < 0:
        return None
    end = _ANSWER.search(text, start + 8)
    return (text[start + 8 : end.start()].strip(), end.end()) if end else ("", len(text))


def _later_of(boxes: tuple[str, int] | None, tag: tuple[str, int] | None) -> tuple[str, int] | None:
    return max((found for found in (boxes, tag) if found), key=lambda found: found[1], default=None)


def last_marked(text: str) -> tuple[str, int] | None:
    """(content, end) of the last box (or list of boxes) or <answer> tag; content "" if it was cut off."""
    return _later_of(_last_boxes(text), _last_tag(text))


def extract(text: str, need_marker: bool = False, unfinished: str = "wrong") -> Answer | None:
    """The final answer of a completion, or None. need_marker: accept only boxes, <answer>, "####" and "answer is"."""
    text = spoken(text, unfinished)
    if text is None:
        return None
    if not text.isascii():
        text = text.translate(SPACING)
    boxes, tag = _last_boxes(text), _last_tag(text)
    marked = _later_of(boxes, tag)
    if marked:
        later = _later(text[marked[1] :][-TAIL:])
        if later:
            return later
        return _from_tag(tag[0]) if marked is tag else Answer(boxes[0], False) if boxes[0] else None
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


def _later(after: str) -> Answer | None:
    """What a marker behind the last box says, if it is a value and no word about the box."""
    if "####" in after and _DIRECT.match(line := after.rsplit("####", 1)[1]):
        return Answer(line.strip().split("\n", 1)[0].strip(), True)
    marker = _last(m for m in _MARKER.finditer(after) if _DIRECT.match(after, m.end())) or _last(_FINAL.finditer(after))
    answer = _from_marker(after[marker.end() :]) if marker else None
    return answer if answer and re.search(r"\d|\\|[=<>]", in_digits(answer.latex)) else None


def _from_tag(content: str) -> Answer | None:
    """The answer inside <answer>...</answer>: a box, a marker's, a formula, or all of it."""
    if not content or len(content) > TAIL:
        return None
    boxes = _last_boxes(content)
    if boxes:
        return Answer(boxes[0], False) if boxes[0] else None
    marker = _last(_MARKER.finditer(content))
    return _from_marker(content[marker.end() :] if marker else content)


def reference(gold: str) -> Answer:
    """The reference answer of a data set row: a box if it has one, otherwise all of it, delimiters removed."""
    boxes = _last_boxes(gold, reference=True)
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
