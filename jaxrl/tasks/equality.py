r"""Decide the equality of two answers without a computer algebra system, where that is possible, and exactly.

`decide(gold, answer)` reads plain numbers (fractions.Fraction), words, and numbers with a base; math-verify
decides everything else (grader_worker). Policies:

- Numbers: an integer reference needs exactly its value; a decimal on either side of a non-integer reference
  is compared as math-verify does, to 6 decimals (and 5 significant digits). No data-set tolerance: 33.3 is
  not 100/3.
- Thousands: 1,000  1\,000  1{,}000  1 000  are 1000; "32, 349" is a list of two. 1,5 is 1.5 in plain text
  only.
- 1e3 and 1 \times 10^3 are 1000; 1\frac{1}{2} is 3/2.
- An unreduced fraction is wrong where the reference is a fraction (prm800k's rule); 3/3 for the reference 1
  is not.
- A percent sign may be missing, or the value given instead: 28\% is matched by 28, 28\%, 0.28; but 0.28 not
  by 28.
- Scale words count: 12 million is 12000000 and not 12; a dozen is 12.
- Numbers in words are numbers (numerals.py): twelve, half a million, two dozen, a quarter. A reference that counts
  something in words ("two lines") asks for what it counts, too.
- Units and currency may be missing; where both sides have one, amounts convert (60 minutes for 1 hour), and an amount
  of another scale or kind (5 m for 5 cm, 5 kg for 5 m) is wrong. Degrees count as a unit.
- Bounds are no values: "12 or more", "at least 12", \ge 12 only equal each other. "About 12" is 12.
- Powers and operators in words count: 12 squared is 144.
- Words are compared letter by letter, case ignored: never as a product of letters, so that Clara is not
  Carla.
- Bases: 2516_8 is matched by 2516_8 and 2516; 2516_{10} and 1358 are wrong. For a reference without a base
  the value counts.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import NamedTuple

from jaxrl.tasks import units
from jaxrl.tasks.answers import MAX_ANSWER, Answer, words
from jaxrl.tasks.notation import DEGREE, WRAPPER, clean, closing_brace
from jaxrl.tasks.numerals import BEGINS, in_digits

MAX_DIGITS = 400
_DECIMALS = Fraction(1, 2_000_000)  # half a unit of the sixth decimal
_RELATIVE = Fraction(1, 100_000)

# Atomic: a unit of many words that something else follows would otherwise be tried in 2^letters ways.
_UNIT = rf"(?>(?:{WRAPPER}\{{[^{{}}\d]*\}}|{DEGREE}|[^\W\d_]+\.?|[²³/€£¥¢]|(?<=[\w}}])(?<!\d)\^\{{?[23]\}}?|\s)*)"
_PERCENT = rf"(?:\\?%|(?:{WRAPPER}\{{\s*)?(?:per\s?cent|percentage|pct)\s*\}}?)"
_INTEGER = r"\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+"
_POWER = r"\s*(?:\\times|\\cdot|×|\*|x)\s*10\s*\^\s*[{(]?\s*([+-]?\d{1,3})\s*[})]?"
_DECIMAL = rf"({_INTEGER}|(?=\.\d))(\.\d*)?(?:[eE]([+-]?\d{{1,3}})|{_POWER})?"
_FRACTION = (
    r"(?:(\d+)\s*)?\\frac\s*(?:\{\s*([+-]?\s*\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d+))|"
    r"(?:(\d+)\s+(?!0))?(\d+)\s*/\s*(\d+)"
)
_END = rf"\s*+(?P<percent>{_PERCENT})?\s*+(?P<unit>{_UNIT})"
_NUMBER = re.compile(rf"(?P<sign>[+-]?)\s*(?P<body>{_DECIMAL}){_END}")
_RATIO = re.compile(rf"(?P<sign>[+-]?)\s*(?:{_FRACTION}){_END}")
_REPEATING = re.compile(rf"(?P<sign>[+-]?)\s*(\d*)\.(\d*)\\overline\s*\{{\s*(\d+)\s*\}}{_END}")
_UNITLESS = frozenset("or and plus minus times over than least most squared cubed".split())  # no unit has these words
_BASE_NAMES = "zero one two three four five six seven eight nine ten eleven twelve".split()


class Number(NamedTuple):
    """A plain number as written. value: before the percent sign. exact: integer or fraction, no decimal point."""

    value: Fraction
    exact: bool
    percent: bool = False
    unit: str = ""
    fraction: tuple[int, int] | None = None  # as written, when it was written as one

    @property
    def true_value(self) -> Fraction:
        return self.value / 100 if self.percent else self.value


def _unit(text: str) -> str | None:
    """Plain unit word of a number, "" for none; None if what follows the digits is not a unit but algebra."""
    wrapped = re.search(WRAPPER, text) is not None
    text = re.sub(DEGREE, " degree ", text)
    text = re.sub(r"\s+", " ", re.sub(rf"{WRAPPER}|[{{}}]", " ", text)).replace(" ^", "^").replace("^ ", "^").strip()
    parts = re.findall(r"[^\s/^.²³\d]+", text.lower())
    if not _UNITLESS.isdisjoint(parts) and parts[-1] not in ("squared", "cubed"):
        return None
    if not text or wrapped or len(words(text)) == len(parts):
        return text
    if any(len(p) == 1 and p not in units.LETTERS for p in re.findall("[A-Za-z]+", text)):
        return None
    return text if units.parse(text) else None


def plain_number(latex: str, bare: bool = False) -> Number | None:
    """Reads cleaned LaTeX as one number, or returns None. bare: the text stood outside formulas (decimal commas)."""
    if len(latex) > MAX_DIGITS:
        return None
    text = re.sub(r"^\s*[$€£¥]", "", latex).strip()
    if text.startswith("(") and text.endswith(")") and closing_brace(text, 0, pair="()") == len(text) - 1:
        text = text[1:-1].strip()
    if text.startswith("{") and text.endswith("}") and closing_brace(text, 0) == len(text) - 1:
        text = text[1:-1].strip()
    if bare and re.fullmatch(r"[+-]?(?:0,\d+|\d+,(?:\d{1,2}|\d{4,}))(?!\d).{0,30}", text):
        text = text.replace(",", ".", 1)
    if match := _REPEATING.fullmatch(text):
        integer, fixed, repeated = match.groups()[1:4]
        value = Fraction(f"{integer or 0}.{fixed or 0}")
        value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(fixed))
        exact, fraction = True, None
    elif match := _RATIO.fullmatch(text):
        whole, a1, a2, b1, b2, mixed, a3, b3 = match.groups()[1:9]
        top, bottom = int((a1 or a2 or a3).replace(" ", "")), int(b1 or b2 or b3)
        if bottom == 0 or (whole and top < 0) or (mixed and top >= bottom):
            return None
        whole = whole or mixed
        value, exact = Fraction(top, bottom) + int(whole or 0), True
        fraction = (top, bottom) if whole is None else None
    elif match := _NUMBER.fullmatch(text):
        integer, decimals, *powers = match.groups()[2:6]
        power = int(powers[0] or powers[1] or 0)
        digits = (integer or "0").replace(",", "").replace(" ", "")
        value = Fraction(digits + (decimals or "")) * Fraction(10) ** power
        exact, fraction = decimals in (None, ".") and power >= 0, None
    else:
        return None
    unit = _unit(match["unit"])
    if unit is None or (re.fullmatch("[A-Za-z]", match["unit"]) and not text[match.start("unit") - 1].isspace()):
        return None  # "5 m" is a length, "5m" a product
    if match["sign"] == "-":
        value = -value
        fraction = fraction and (-fraction[0], fraction[1])
    return Number(value, exact, match["percent"] is not None, unit, fraction)


def _close(gold: Fraction, value: Fraction, exact: bool) -> bool:
    if exact or gold.denominator == 1:
        return gold == value
    difference = abs(gold - value)
    return difference <= _DECIMALS and difference <= _RELATIVE * abs(gold)


def numbers_equal(gold: Number, answer: Number) -> bool:
    """Equality of two plain numbers under the policies above."""
    if gold.unit and answer.unit:
        ratio = units.ratio(gold.unit, answer.unit)
        if ratio is None:
            return False
        if ratio != 1:
            return _close(gold.true_value, answer.true_value * ratio, gold.exact and answer.exact)
    if gold.fraction and answer.fraction and gold.fraction != answer.fraction:
        if Fraction(*answer.fraction).denominator != answer.fraction[1]:
            return False
    exact = gold.exact and answer.exact
    if gold.percent or answer.percent:
        unsigned = gold.percent or abs(answer.value) >= 1
        return (unsigned and _close(gold.value, answer.value, exact)) or (
            gold.percent != answer.percent and _close(gold.true_value, answer.true_value, exact)
        )
    return _close(gold.value, answer.value, exact)


def as_words(latex: str) -> list[str] | None:
    """Sorted parts of an answer made of words ("Clara", "no solution", "Ann and Bob", "(C)"), or None."""
    text = re.sub(WRAPPER + r"(?=\{)", "", latex)
    text = re.sub(r"\s+", " ", re.sub(r"[{}]", " ", text)).strip(" .!\"'")
    letter = re.fullmatch(r"\(\s*([A-Za-z])\s*\)|([A-Za-z])", text)
    if letter:
        return [letter[1] or letter[2]]
    if not re.fullmatch(r"[^\W\d_](?:[^\W\d_]|[ ,;.'’!?-])*", text) or not words(text):
        return None
    parts = re.split(r"\s*(?:,\s*and|,\s*or|\band\b|\bor\b|,|;)\s*", text.casefold())
    return sorted(re.sub(r"^(?:the|an?) |[.'’!?]", "", part).replace("-", " ").strip() for part in parts if part)


def _based(latex: str) -> tuple[str, int] | None:
    """(digits, base) of a number with a base as subscript: 2516_8, (101)_{2}, 12_{\\text{seven}}."""
    plain = re.sub(rf"{WRAPPER}(?=\{{)|[(){{}}\s,]", "", latex)
    match = re.fullmatch(r"([0-9A-Fa-f]+)_(?:base)?(\d{1,2}|[a-z]+)", plain)
    if match is None:
        return None
    named = _BASE_NAMES.index(match[2]) if match[2] in _BASE_NAMES else 0
    base = int(match[2]) if match[2].isdigit() else named
    digits = match[1].upper().lstrip("0") or "0"
    if not 2 <= base <= 16 or any(int(d, 16) >= base for d in digits):
        return None
    return digits, base


def _bases_equal(gold: str, answer: str) -> bool | None:
    """Equality where at least one side has a base; None where neither has."""
    gold_based, answer_based = _based(gold), _based(answer)
    if gold_based and answer_based:
        return gold_based == answer_based
    if gold_based:
        return gold_based[0] == (re.sub(r"[ ,]", "", answer).upper().lstrip("0") or "0")
    if answer_based:
        number = plain_number(gold)
        return number is not None and number.value == int(*answer_based)
    return None


def _ratios_equal(gold: str, answer: str) -> bool | None:
    """Equality of two a:b; with a zero they are times of day (12:00), not quotients."""
    g, a = (re.fullmatch(r"(\d{1,9})\s*:\s*(\d{1,9})", text) for text in (gold, answer))
    if not (g and a):
        return None
    (g1, g2), (a1, a2) = map(int, g.groups()), map(int, a.groups())
    return (g1, g2) == (a1, a2) or (g1 * a2 == g2 * a1 and 0 not in (g1, g2, a1, a2))


# How a bound is said: behind the number ("12 or more", "12+") and in front of it ("at least 12", "> 12").
_BOUND_AFTER = {
    ">=": r"(?:or|and) (?:more|greater|above|higher|over|larger|older|longer|later|up(?:wards)?)",
    "<=": r"(?:or|and) (?:less|fewer|below|lower|under|smaller|younger|shorter|earlier)",
}
_BOUND_BEFORE = {
    ">=": r"at least|(?:no|not) (?:less|fewer|smaller|lower) than|a minimum of|\\geq?(?:slant)?(?![A-Za-z])|>=",
    "<=": r"at most|(?:no|not) (?:more|greater|larger|higher) than|up to|a maximum of|\\leq?(?:slant)?(?![A-Za-z])|<=",
    ">": r"(?:more|greater|larger|higher|bigger) than|over|above|exceeding|\\gt(?![A-Za-z])|>",
    "<": r"(?:less|fewer|smaller|lower) than|under|below|\\lt(?![A-Za-z])|<",
}
_AFTER = re.compile(
    "|".join(f"(?P<_{i}>\\b{p}\\b)" for i, p in enumerate(_BOUND_AFTER.values())) + r"|(?P<_2>(?<=\d)\s*\+$)"
)
_BEFORE = re.compile("|".join(f"(?P<_{i}>{p})" for i, p in enumerate(_BOUND_BEFORE.values())))
_ABOUT = re.compile(
    rf"(?i)(?:about|approximately|approx\.?|around|roughly|exactly|just|only)\s+(?=[-+\d\\.$]|{BEGINS})"
)


def bound(latex: str) -> tuple[str, str]:
    r"""("" or the relation, the rest) of a cleaned answer: (">=", "12") for "12 or more", "at least 12", "12+"."""
    if not latex or not (latex[0] in "\\<>" or latex[-1] == "+" or " " in latex):
        return "", latex
    plain = re.sub(r"\s+", " ", re.sub(rf"{WRAPPER}(?=\{{)|[{{}}]", " ", latex)).strip()
    if before := _BEFORE.match(plain):
        return list(_BOUND_BEFORE)[int(before.lastgroup[1:])], plain[before.end() :].strip()
    if (after := _AFTER.search(plain)) and re.search(r"\d", in_digits(plain[: after.start()])):
        relation = ">=" if after.lastgroup == "_2" else list(_BOUND_AFTER)[int(after.lastgroup[1:])]
        return relation, (plain[: after.start()] + plain[after.end() :]).strip()
    about = _ABOUT.match(plain)
    return "", plain[about.end() :] if about else latex


def _number(answer: Answer, text: str) -> Number | None:
    """The plain number of a cleaned answer; a currency sign in front, which cleaning takes away, is its unit."""
    number = plain_number(text, answer.bare)
    if number and not number.unit and re.match(r"\s*-?\s*\\\$" if not answer.bare else r"\s*-?\s*\\?\$", answer.latex):
        return number._replace(unit="dollar")
    return number


def normal_form(answer: Answer) -> str:
    """A text that is the same for all answers of one value, as far as that is known without algebra. Votes are counted
    by it."""
    text = in_digits(clean(answer.latex))
    number = plain_number(text, answer.bare) if len(text) <= MAX_ANSWER else None
    return str(number.true_value) if number else text[:200]


def decide(gold: Answer, answer: Answer) -> bool | None:
    """Whether two answers are equal, or None if it takes algebra to tell. Never raises on any text."""
    g, a = clean(gold.latex), clean(answer.latex)
    if len(g) > MAX_ANSWER or len(a) > MAX_ANSWER:
        return g == a
    for known in (_bases_equal(g, a), _ratios_equal(g, a)):
        if known is not None:
            return known
    a = re.sub(r"^[A-Za-z]\w{0,2}\s*=\s*(?=[-+\d\\.])", "", a) if "=" not in g else a
    (g_bound, g), (a_bound, a) = bound(g), bound(a)
    if g_bound != a_bound:  # unless the other one says it as a relation or an interval
        return None if re.search(r"[<>\[]|\\[lg]eq?(?![a-z])|\\in", a if g_bound else g) else False
    g_number, a_number = _number(gold, g), _number(answer, a)
    if g_number and a_number:
        return numbers_equal(g_number, a_number)
    g_words, a_words = as_words(g), as_words(a)
    if g_words and g_words == a_words:
        return True
    said = g, a
    if said != (spelled := (in_digits(g), in_digits(a))):
        g, a = spelled
        g_number, a_number = _number(gold, g), _number(answer, a)
        if g != said[0] and g_number and g_number.unit and not units.parse(g_number.unit):  # "two lines": no bare 2
            same = a_number and a_number.unit.casefold().removesuffix("s") == g_number.unit.removesuffix("s")
            return bool(same) and numbers_equal(g_number, a_number)
        if g_number and a_number:
            return numbers_equal(g_number, a_number)
    if g_words and a_words:
        return False
    choice = re.match(r"\(([A-J])\)|([A-J])[.):] ", re.sub(WRAPPER + r"|[{}]", "", a))
    if choice and g_words and re.fullmatch("[A-J]", g_words[0]):
        return g_words == [choice[1] or choice[2]]
    return True if g.replace(" ", "") == a.replace(" ", "") else None


def too_costly(latex: str) -> str:
    """Why an answer is not given to the algebra system, or "": bounds on size, depth and magnitude."""
    if len(latex) > MAX_ANSWER:
        return "long"
    depth = deepest = 0
    for char in latex:
        depth += (char in "{([") - (char in "})]")
        deepest = max(deepest, depth)
    if deepest > 30 or re.search(r"[-+]{20}", latex):
        return "deep"
    if re.search(rf"\d{{{MAX_DIGITS},}}", latex):
        return "digits"
    text = re.sub(r"\s|(?<!\\)\\[,;:! ]", "", latex.replace("**", "^"))
    text = re.sub(r"[{}()]", " ", re.sub(r"\^[{(]+", "^", text))
    if re.search(r"\d{5,}!|!{2,}", text) or any(map(_is_huge, re.findall(r"(?<!\w)\w*(?:\^-?\w+)+", text))):
        return "magnitude"
    return ""


def _is_huge(power: str) -> bool:
    """Whether a tower like 9^9^9 has an exponent beyond 10^4 somewhere, or more storeys than mathematics needs."""
    storeys = power.split("^")
    if len(storeys) > 4:
        return True
    exponent = 1
    for storey in reversed(storeys[1:]):
        base = abs(int(storey[:12])) if re.fullmatch(r"-?\d+", storey) else 2
        if exponent * math.log10(base or 1) > 4:
            return True
        exponent = base**exponent
    return False
