"""Numbers written in words, as digits: "twelve", "half a million", "two dozen eggs", "minus one and a half".

Only a text that is such an amount from its first word to its last is read: number words, then at most a unit or what
was counted. "One of them", "no one", "one-to-one", "two-sided", "half full", "third" and "Twelve Angry Men" stay words.
"""

from __future__ import annotations

import re
from fractions import Fraction

from jaxrl.tasks import units
from jaxrl.tasks.notation import WRAPPER

_SMALL = {
    word: i
    for i, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
        "seventeen eighteen nineteen".split()
    )
}
_TENS = {word: 10 * i for i, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_SCALES = {word: 10**power for word, power in units.POWERS.items() if power > 2}
_PARTS = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8}
_PARTS |= {"ninth": 9, "tenth": 10, "twelfth": 12, "hundredth": 100, "thousandth": 1000}
_PLURALS = {"halves": 2} | {f"{word}s": size for word, size in _PARTS.items() if size > 2}
_MULTIPLES = _SCALES | {"hundred": 100, "dozen": 12}
_NUMBER_WORDS = frozenset([*_SMALL, *_TENS, *_PARTS, *_PLURALS, *_MULTIPLES])
_NO_NOUNS = _NUMBER_WORDS | frozenset(
    "a an and are as at but by each either fewer fold for from full if in into is it less minus more most not of off "
    "on only or other others out over per percent plus point sided than that the them then these this those time times "
    "to under up was way ways which who with".split()
)
MOST = 160  # characters of an amount in words

# For other patterns: what an amount in words can begin with, and the part behind a number in digits (2 and a half).
BEGINS = rf"(?:(?:an?|minus|negative)\s+)?(?:{'|'.join(sorted(_NUMBER_WORDS, key=len)[::-1])})(?!\w)"
AND_A_PART = rf"(?:\s+and\s+(?:(?:an?|one)[\s-]+(?:{'|'.join(_PARTS)})|(?:two|three)[\s-]+(?:{'|'.join(_PLURALS)}))\b)"
_BEGINS = re.compile(rf"(?i)(?:\d+{AND_A_PART}|{BEGINS})")
_HYPHEN = re.compile(r"(?i)(?<=[a-z])-(?=([a-z]+))")


def in_digits(latex: str) -> str:
    r"""An amount in words, in \text{...} or not, with its number in digits; any other text as it is.

    "two dozen eggs" -> "24 eggs"; a list of numbers ("two, three and five") becomes one of digits.
    """
    if len(latex) > MOST or not re.search("[a-z]{3}", latex):
        return latex
    text = re.sub(r"\s+", " ", re.sub(rf"{WRAPPER}(?=\{{)|[{{}}]", " ", latex)).strip()
    if not _BEGINS.match(text):
        return latex
    whole = _amount(text)
    if whole is not None:
        return whole
    parts = [_amount(part) for part in re.split(r"\s*(?:,\s*and\b|,\s*or\b|\band\b|\bor\b|,|;)\s*", text.strip(" .!"))]
    if len(parts) > 1 and all(part is not None and re.fullmatch(r"[-\d./]+", part) for part in parts):
        return ", ".join(parts)
    return latex


def _amount(text: str) -> str | None:
    """One amount in digits, or None: [minus] number [percent | unit | what was counted]."""
    text = _HYPHEN.sub(lambda m: " " if m[1].lower() in _NUMBER_WORDS else "-", text.strip(" .!"))
    shown = text.split()
    tokens = [word.lower() for word in shown]
    sign = tokens[:1] in (["minus"], ["negative"])
    value, used, part = _number(tokens[sign:]) if tokens[sign:] else (None, 0, False)
    if value is None:
        return None
    used += sign
    behind = tokens[used:]
    if behind in (["percent"], ["per", "cent"]):
        behind = ["percent"]
    elif part and behind:
        of = behind[0] == "of"
        behind = behind[of:]
        counted = behind[:1] in (["a"], ["an"])
        behind = behind[counted:]
        if not behind or not (counted or units.parse(" ".join(behind))) or (of and not counted):
            return None
    if behind != ["percent"] and not _is_counted(behind, shown[len(shown) - len(behind) :]):
        return None
    return " ".join([f"{'-' * sign}{value}", *behind])


def _is_counted(words: list[str], shown: list[str]) -> bool:
    """Whether words are a unit or name what was counted: "apples", "miles per hour"; not "of them", not "Angry Men"."""
    plain = [word for word in words if word != "per"]
    return (
        len(words) <= 4
        and not _NO_NOUNS.intersection(plain)
        and all(re.fullmatch("[a-z]+", word) for word in shown)
        and "per" not in (words[:1] + words[-1:])
    )


def _number(tokens: list[str]) -> tuple[str | None, int, bool]:
    """(the number at the start in digits, how many tokens it takes, whether it is a part of one); (None, 0, False)."""
    none = (None, 0, False)
    part, used = _part(tokens)
    if part:
        scale, more = _scale_behind_part(tokens[used:])
        return (str(Fraction(*part) * scale), used + more, False) if more else ("{}/{}".format(*part), used, True)
    whole, used = _whole(tokens)
    if whole is None:
        return none
    if tokens[used : used + 1] == ["point"]:
        digits = 0
        while (word := tokens[used + 1 + digits : used + 2 + digits]) and _SMALL.get(word[0], 10) < 10:
            digits += 1
        if not digits:
            return none
        decimals = "".join(str(_SMALL[word]) for word in tokens[used + 1 : used + 1 + digits])
        used += 1 + digits
        scale = _MULTIPLES.get("".join(tokens[used : used + 1]), 0)
        value = f"{whole}.{decimals}"
        return (str(Fraction(value) * scale), used + 1, False) if scale else (value, used, False)
    if tokens[used : used + 1] == ["and"]:
        part, more = _part(tokens[used + 1 :])
        if not part or whole >= 1000 or part[0] >= part[1]:
            return none
        used += 1 + more
        scale = _MULTIPLES.get("".join(tokens[used : used + 1]), 0)
        value = whole + Fraction(*part)
        return (str(value * scale), used + 1, False) if scale else (f"{whole} {part[0]}/{part[1]}", used, False)
    return (str(whole), used, False) if not tokens[0].isdigit() else none


def _part(tokens: list[str]) -> tuple[tuple[int, int] | None, int]:
    """((numerator, denominator), tokens) of "half", "a quarter", "three quarters"; (None, 0) without one."""
    if tokens[:1] == ["half"]:
        return (1, 2), 1
    if len(tokens) > 1 and tokens[0] in ("a", "an", "one") and tokens[1] in _PARTS:
        return (1, _PARTS[tokens[1]]), 2
    top, used = _below_hundred(tokens)
    if top is not None and top > 1 and tokens[used : used + 1] and tokens[used] in _PLURALS:
        return (top, _PLURALS[tokens[used]]), used + 1
    return None, 0


def _scale_behind_part(tokens: list[str]) -> tuple[int, int]:
    """(scale, tokens) of "[of] [a] million" behind "half"; (1, 0) without one."""
    used = int(tokens[:1] == ["of"])
    used += tokens[used : used + 1] in (["a"], ["an"], ["one"])
    scale = _MULTIPLES.get("".join(tokens[used : used + 1]), 0)
    return (scale, used + 1) if scale else (1, 0)


def _below_hundred(tokens: list[str]) -> tuple[int | None, int]:
    if not tokens:
        return None, 0
    first = tokens[0]
    if first in _TENS:
        second = _SMALL.get(tokens[1], 0) if len(tokens) > 1 else 0
        return (_TENS[first] + second, 2) if 0 < second < 10 else (_TENS[first], 1)
    return (_SMALL[first], 1) if first in _SMALL else (None, 0)


def _whole(tokens: list[str]) -> tuple[int | None, int]:
    """(the whole number at the start, how many tokens it takes): "two million three hundred thousand and five"."""
    if tokens[0].isdigit():
        return (int(tokens[0]), 1) if len(tokens[0]) < 4 else (None, 0)
    total, used, last = 0, 0, 10**15
    while True:
        rest = tokens[used:]
        skip = int(used > 0 and rest[:1] == ["and"])
        group, more = _below_thousand(rest[skip:], article=used == 0)
        if group is None:
            break
        used += skip + more
        scale = _SCALES.get("".join(tokens[used : used + 1]).removesuffix("s"), 1)
        if scale >= last:
            return None, 0
        total, used, last = total + group * scale, used + (scale > 1), scale
        if scale == 1:
            break
    if used and tokens[used : used + 1] in (["dozen"], ["dozens"]):
        total, used = 12 * total, used + 1
    return (total, used) if used else (None, 0)


def _below_thousand(tokens: list[str], article: bool) -> tuple[int | None, int]:
    """Up to ninety-nine hundred and ninety-nine; article: "a" may stand for one in front of a word that multiplies."""
    if article and tokens[:1] in (["a"], ["an"]) and tokens[1:2] and tokens[1] in _MULTIPLES:
        group, used = 1, 1
    else:
        group, used = _below_hundred(tokens)
    if group is None or tokens[used : used + 1] != ["hundred"]:
        return group, used
    used += 1
    skip = int(tokens[used : used + 1] == ["and"])
    rest, more = _below_hundred(tokens[used + skip :])
    return (100 * group + rest, used + skip + more) if rest else (100 * group, used)
