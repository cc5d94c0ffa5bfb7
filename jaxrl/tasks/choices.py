r"""The letter of the option a completion settles on, and None where it names none, or several.

What counts, in this order: the last \boxed{...} or <answer>...</answer> that holds a letter, or what settles it later;
"Answer: B", "the correct option is B", "B is correct", "I choose B"; "option B"; a last or first line that is or begins
with a letter, "(B)", "B) 42", or ends "so it is B". A word that begins a sentence is none: "A dog ...", "I think ...".
"""

from __future__ import annotations

import re

from jaxrl.tasks.answers import TAIL, last_marked, spoken
from jaxrl.tasks.notation import SPACING, WRAPPER

# A letter as an option has it: (B), [B], B) 42, B. 42, B: 42, B - the dog, B, B because. Small ones only in brackets or
# alone. A and I are words, too: something that no sentence begins with has to follow them.
_END = r"(?=\s*(?:$|[.,:;!?)\]>\"”\n]|'(?!\w)|[-–—=]\s|(?:because|since|as|is|for|due|and|or)\b))"
_LETTER = (
    rf"(?:[(\[]{{1,3}}\s*(?P<{{0}}a>[A-Za-z])\s*[)\]]|[\"'“<]?(?P<{{0}}b>(?:[B-HJ-Z](?![\w'’])|[AI]{_END})"
    r"|[a-z](?=\s*[.!]?\s*(?:$|\n)))|(?P<{0}c>(?<=['‘`])[A-Za-z](?=['’])))"
)
_ALONE = re.compile(r"[\"'“(\[<]*([A-Za-z])[\"'”)\]>]*[.):]?")


def _pattern(text: str) -> re.Pattern:
    for i in range(text.count("LETTER")):
        text = text.replace("LETTER", _LETTER.replace("{0}", f"_{i}"), 1)
    return re.compile(text)


_KEYWORD = r"(?i:answers?|options?|choices?|letter)"
_SETTLED = _pattern(
    rf"(?:\b(?:(?i:answer)|(?i:(?:correct|right|best|final|my))\s+{_KEYWORD})[\"']?\s*"
    r"(?:(?i:is|would be|should be|must be|will be)\b\s*:?|[:=]|[-–—])?\s*"
    r"(?:(?i:not)\s+[(\[\"']?[A-Za-z][)\]\"']?,?\s+(?i:but)\s+(?:(?i:rather)\s+)?)?"  # not A but B
    rf"(?:(?i:the)\s+)?(?:{_KEYWORD}\s*:?\s*)?[\"'‘]?LETTER)"
    rf"|(?:\b(?i:choose|pick|select|go with|going with|chose)\s+(?:(?i:the)\s+)?{_KEYWORD}?\s*['‘]?LETTER)"
    r"|(?:(?<![\w'’])LETTER[^\n.]{0,60}?\s(?i:is)\s+(?i:the\s+)?(?i:correct|right|best|answer)\b)"
)
_NAMED = _pattern(
    r"(?<!not )\b(?i:option|choice)\s+LETTER"
    r"(?!,?\s+(?:which )?(?i:is|are|was)\s+(?i:not|wrong|incorrect|false)\b)"
)
_LINE = _pattern(r"LETTER(?:[).:\]]|\s*[-–—,]|\s*$)")
_SO = _pattern(r"\b(?i:therefore|thus|hence|so|it is|it's|must be)[,:]?\s+LETTER\s*[.!]?$")
_ANOTHER = re.compile(r"\s*[)\].]?\s*(?:,|/|&|\band\b|\bor\b|,\s*and\b|,\s*or\b)\s*[(\[]?[A-Z](?![\w'’])")


def _plain(text: str) -> str:
    """Without markdown and LaTeX around letters: **(B)**, $\\textbf{B}$."""
    return re.sub(r"[{}$*_`]|\\[()\[\],;: ]", "", re.sub(WRAPPER, "", text)).strip()


def _letter(match: re.Match | None, text: str) -> str | None:
    """The letter of a match; "" if it is one of several."""
    if match is None:
        return None
    group = next(name for name, value in match.groupdict().items() if value)
    return "" if _ANOTHER.match(text, match.end(group)) else match[group].upper()


def _last(pattern: re.Pattern, text: str) -> str | None:
    match = None
    for match in pattern.finditer(text):  # noqa: B007
        pass
    return _letter(match, text)


def _held(content: str) -> str | None:
    """The letter that a box or a tag holds: B, (B), B. the dog, B - the dog, Option B, The answer is B."""
    plain = _plain(content)
    if alone := _ALONE.fullmatch(plain):
        return alone[1].upper()
    found = _last(_SETTLED, plain)
    named = re.match(rf"(?i:the\s+)?(?:{_KEYWORD}\s*:?\s*)?", plain)
    return found if found is not None else _letter(_pattern("LETTER").match(plain, named.end()), plain)


def choice_letter(text: str, need_marker: bool = False, unfinished: str = "wrong") -> str | None:
    """The letter of the option a completion settles on, or None. need_marker, unfinished: as for answers.extract."""
    text = spoken(text, unfinished)
    if text is None:
        return None
    text = text.translate(SPACING)
    marked = last_marked(text)
    if marked:
        content, end = marked
        if not content:  # cut off
            return None
        later = _last(_SETTLED, _plain(text[end:][-TAIL:]))
        held = later if later is not None else _held(content)
        if held is not None:
            return held or None
    plain = _plain(text[-TAIL:])
    found = _last(_SETTLED, plain)
    if found is None and not need_marker:
        found = _last(_NAMED, plain)
        lines = [line.strip() for line in plain.splitlines() if line.strip()]
        if found is None and lines:
            last = re.sub(r"^(?:[-•>#]\s*)+", "", lines[-1])
            alone = _ALONE.fullmatch(last) or (_ALONE.fullmatch(lines[0]) if len(text) <= TAIL else None)
            found = alone[1].upper() if alone else _letter(_LINE.match(last) or _SO.search(last), last)
    return found or None
