r"""Equality of two answers by algebra: math-verify behind guards. Runs as `python -m jaxrl.tasks.grader_worker MB`.

math-verify answers "equal" to a few pairs that are not. The guards here change what it is given, or check its
verdict:

- words are passed as \text{...}, or they would be products of letters and anagrams equal
- units are removed here: its own pattern cuts 1+\frac{1}{\text{e}} after the first brace, and takes 2c for 2
- "..." in a sequence stays in it as a symbol; a formula it cannot parse is compared as a string, never by a
  number found inside
- chains that contradict themselves (y=6=7) are wrong
- two constants must agree to 20 significant digits, so that 1/2004! is not 1/2006!
- and one "different" is checked: expressions that agree at a dozen random points are equal (sqrt(1/n),
  1/sqrt(n))
"""

from __future__ import annotations

import functools
import logging
import random
import re
import sys

from jaxrl.tasks import units, workers
from jaxrl.tasks.answers import is_word
from jaxrl.tasks.equality import plain_number
from jaxrl.tasks.intervals import as_intervals, is_intervals
from jaxrl.tasks.notation import DEGREE, WRAPPER, clean
from jaxrl.tasks.numerals import in_digits

logging.disable(logging.CRITICAL)  # math-verify warns about every formula it cannot read

_TEXT = WRAPPER + r"\{[^{}]*\}"
_TOKEN = re.compile(rf"{_TEXT}|\\(?:begin|end)\s*\{{[^{{}}]*\}}|\\[A-Za-z]+|_\{{[^{{}}]*\}}|[A-Za-z]+")
_UNIT_WORDS = frozenset("mm cm dm km kg mg ft lb oz hr hrs yr cc mi mL ml mph kmh rad".split())
_FUNCTION = re.compile(r"(?<![A-Za-z\\])([A-Za-z])\s*\(\s*([a-z])\s*\)\s*=")
_ANGLE = rf"(\d+(?:\.\d+)?)\s*(?:{DEGREE})"
_IN_DEGREES = re.compile(
    rf"(\\(?:sin|cos|tan|cot|sec|csc)(?:\s*\^\s*(?:\d|\{{-?\d+\}}))?)\s*(?:[({{]\s*{_ANGLE}\s*[)}}]|{_ANGLE})"
)
_ASSIGNED = re.compile(r"([A-Za-z](?:_\{?\w\}?)?)\s*=\s*")
_EQUALS = re.compile(r"(?<![<>!:\\])=(?!=)")


@functools.cache
def _library():
    """math-verify and the way it is configured here (its own time limits off: the parent kills)."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    config = (LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normalization),)

    def read(latex: str):
        found = parse(f"$${latex}$$", config, fallback_mode="no_fallback", parsing_timeout=None)
        if not found and latex.count("\\pm") == 1:  # it reads 1 \pm 2, but not inside a fraction
            return read(latex.replace("\\pm", "+") + ", " + latex.replace("\\pm", "-"))
        return found[0] if found else None

    def equal(gold, answer) -> bool:
        return verify(gold, answer, timeout_seconds=None)

    return functools.lru_cache(256)(read), equal


def _without_unit(latex: str) -> str:
    """Cuts a unit off the end, if something is left: \\text{...} with an exponent, a unit name or a plain word."""
    for _ in range(2):
        rest = re.sub(rf"{_TEXT}\s*(?:\^\s*\{{?\s*\d\s*\}}?)?$", "", latex).strip()
        word = re.search(r"(?<=[\d})\s])\s*([A-Za-z]+)(?:\^\{?[23]\}?|[²³])?$", rest)
        if word and (word[1] in _UNIT_WORDS or is_word(word[1])) and not re.search(r"\\$", rest[: word.start(1)]):
            rest = rest[: word.start()].strip()
        if rest in ("", latex) or rest[-1] in "=<>+-,;:*/^_(" or rest.count("{") != rest.count("}"):
            break
        latex = rest
    return latex


def _split_unit(latex: str) -> tuple[str, str]:
    """(the formula, the plain text of the unit behind it)."""
    rest = _without_unit(latex)
    unit = latex[len(rest) :] if latex.startswith(rest) else ""
    return rest, re.sub(rf"{WRAPPER}|[{{}}\\]", " ", unit).replace(" ^", "^").strip()


def _parts(latex: str) -> tuple[str, list[str]]:
    """What an answer of several values is ("tuple", "set", "equations", "list", or "" for one value) and its values."""
    latex = latex.strip()
    kind, inner = "list", latex
    for name, opening, closing in (("set", "\\{", "\\}"), ("tuple", "(", ")")):
        if latex.startswith(opening) and latex.endswith(closing):
            kind, inner = name, latex[len(opening) : -len(closing)]
    parts, depth, start = [], 0, 0
    for i, char in enumerate(inner):
        depth += (char in "([{") - (char in ")]}")
        if depth < 0:  # (1,2),(3,4): the outer brackets are not a pair
            return "", [latex]
        if char in ",;" and depth == 0:
            parts.append(inner[start:i].strip())
            start = i + 1
    parts.append(inner[start:].strip())
    if len(parts) < 2 or not all(parts):
        return "", parts
    names = [match[1] for part in parts if (match := _ASSIGNED.match(part))]
    return ("equations" if kind == "list" and len(set(names)) == len(parts) else kind), parts


def _ordered(gold: str, answer: str) -> str | None:
    r"""The verdict where order matters, on one side at least: a tuple, or equations for several variables.

    (5,2) is not (2,5), and \{2,5\} is neither; x=2, y=5 is (2,5), in the order written or that of the alphabet.
    """
    (g_kind, g), (a_kind, a) = _parts(gold), _parts(answer)
    if not g_kind or not a_kind or not {"tuple", "equations"} & {g_kind, a_kind} or g_kind == a_kind == "equations":
        return None
    if len(g) != len(a) or "set" in (g_kind, a_kind):
        return "wrong"
    orders = [(g, a)]
    if "equations" in (g_kind, a_kind):
        orders.append((sorted(g), a) if g_kind == "equations" else (g, sorted(a)))
    for gold_parts, answer_parts in orders:
        values = [[_ASSIGNED.sub("", part) for part in parts] for parts in (gold_parts, answer_parts)]
        verdicts = {compare(x, y) for x, y in zip(*values, strict=True)}
        if verdicts == {"correct"}:
            return "correct"
    return "wrong" if "wrong" in verdicts else "unparsed"


def _protect_words(latex: str) -> str:
    def protect(match: re.Match) -> str:
        return rf"\text{{{match[0]}}}" if match[0][0].isalpha() and is_word(match[0]) else match[0]

    return _TOKEN.sub(protect, latex)


def _has_words(latex: str) -> bool:
    return any(m[0][0].isalpha() and is_word(m[0]) for m in _TOKEN.finditer(latex))


def _same_variable(gold: str, answer: str) -> str:
    """The answer with the variable of its function named as in the reference: f(t)=t^2 is f(x)=x^2."""
    g, a = _FUNCTION.search(gold), _FUNCTION.search(answer)
    if not (g and a and g[1] == a[1]) or re.search(rf"(?<![A-Za-z\\]){g[2]}(?![A-Za-z])", answer):
        return answer
    return re.sub(rf"(?<![A-Za-z\\]){a[2]}(?![A-Za-z])", g[2], answer)


def prepare(latex: str) -> str:
    """Cleaned LaTeX in the form that math-verify reads as meant, its unit still there."""
    latex = in_digits(clean(latex))
    latex = re.sub(r"\\[lc]?dots(?![A-Za-z])", r"\\text{dots}", latex)
    latex = re.sub(r"\{\d{1,3}(?:,\d{3})+\}", lambda m: m[0].replace(",", ""), latex)
    latex = re.sub(r"(?<=[\d\w)}])\s*\^\s*\(([^()]*)\)", r"^{\1}", latex)
    return _IN_DEGREES.sub(r"\1(\\frac{\2\3 \\pi}{180})", latex)


def _constant(latex: str):
    """sympy number of one part of a chain, and the digits after its point; None if it is no constant."""
    number = plain_number(clean(latex))
    if number is not None:
        point = re.search(r"\.(\d+)", latex)
        return float(number.true_value), len(point[1]) if point else 0, True
    read, _ = _library()
    value = read(latex)
    if value is None or not getattr(value, "is_number", False):
        return None
    try:
        return float(value.evalf(20)), 0, False
    except (TypeError, ValueError, OverflowError):
        return None


def contradicts_itself(latex: str, gold: str) -> bool:
    """Whether a chain of equations gives two values: y=6=7.

    Numbers written out must all agree; values of expressions only if the reference is not an equation itself
    (math-verify's own suite accepts z=3+3=2 for z=1+1=2). A decimal may be a rounding of what it is set equal to.
    """
    if re.search(r"[,;&]|\\text|\\\\", latex):
        return False
    parts = [part.strip() for part in _EQUALS.split(re.split(r"\\approx|\\sim|\\simeq|≈", latex)[0])]
    if len(parts) < 2 or not all(parts):
        return False
    values = [_constant(part) for part in parts]
    if len(parts) == 2:
        literal = all(v and v[2] for v in values) and not any("frac" in p or "/" in p for p in parts)
        values = values if literal else []
    elif "=" in gold and not all(v and v[2] for v in values[1:]):
        return False
    known = [v for v in values if v]
    for i, (x, digits_x, _) in enumerate(known):
        for y, digits_y, _ in known[i + 1 :]:
            digits = max(digits_x, digits_y)
            if abs(x - y) > (0.51 * 10.0**-digits if digits else 1e-9 * max(abs(x), abs(y))):
                return True
    return False


def _imaginary(gold, answer):
    """Two expressions with the letter i as the imaginary unit, if there is no other letter that it could count with."""
    from sympy import Expr, I

    both = [value for value in (gold, answer) if isinstance(value, Expr)]
    if len(both) < 2 or {symbol.name for value in both for symbol in value.free_symbols} != {"i"}:
        return gold, answer
    return tuple(value.subs({symbol: I for symbol in value.free_symbols}) for value in both)


def _right_side(value):
    """The value of x = value; other things as they are."""
    from sympy import Eq, Symbol

    return value.rhs if isinstance(value, Eq) and isinstance(value.lhs, Symbol) else value


def _really_equal(gold, answer) -> bool:
    """For two exact constants that math-verify calls equal: whether 20 significant digits agree."""
    from sympy import Expr, Float

    gold, answer = _right_side(gold), _right_side(answer)
    if not (isinstance(gold, Expr) and isinstance(answer, Expr) and gold.is_number and answer.is_number):
        return True
    if gold.has(Float) or answer.has(Float) or gold == answer or gold.is_infinite or answer.is_infinite:
        return True
    gold, answer = gold.evalf(30), answer.evalf(30)
    return bool(abs(gold - answer) <= 1e-20 * max(abs(gold), abs(answer))) or _is_percent_pair(gold, answer)


def _is_percent_pair(gold, answer) -> bool:
    """math-verify lets 9% pass for 9; the two differ by exactly a hundred."""
    return bool(gold and answer and abs(abs(gold / answer) - 100) < 1e-20 or abs(abs(answer / gold) - 100) < 1e-20)


def _agree_at_points(gold, answer) -> bool:
    """Whether two expressions in the same variables agree wherever both are real, at random points."""
    from sympy import Expr, Float

    if not (isinstance(gold, Expr) and isinstance(answer, Expr)) or gold.has(Float) or answer.has(Float):
        return False
    symbols = sorted(gold.free_symbols, key=str)
    if not symbols or set(symbols) != answer.free_symbols or gold.count_ops() + answer.count_ops() > 150:
        return False
    rng, agreed = random.Random(0), 0
    for _ in range(16):
        point = {s: rng.choice((-1, 1)) * rng.uniform(0.3, 3.0) for s in symbols}
        try:
            x, y = (complex(e.evalf(15, subs=point)) for e in (gold, answer))
        except (TypeError, ValueError, ArithmeticError, AttributeError):
            continue
        if abs(x.imag) > 1e-9 or abs(y.imag) > 1e-9:
            continue
        if not abs(x - y) <= 1e-9 * max(abs(x), abs(y)):
            return False
        agreed += 1
    return agreed >= 4


def compare(gold: str, answer: str) -> str:
    """ "correct", "wrong", or "unparsed" if the answer is no formula. Arguments: LaTeX without delimiters."""
    gold, gold_unit = _split_unit(prepare(gold))
    answer, answer_unit = _split_unit(prepare(answer))
    if units.ratio(gold_unit, answer_unit) != 1:
        return "wrong"  # amounts of two scales; those that are plain numbers were converted before
    ordered = _ordered(gold, answer)
    if ordered is not None:
        return ordered
    answer = as_intervals(answer) if is_intervals(gold) else _same_variable(gold, answer)
    if re.sub(r"\s", "", gold) == re.sub(r"\s", "", answer):
        return "correct"
    if contradicts_itself(answer, gold):
        return "wrong"
    if _has_words(gold) and _has_words(answer):
        gold, answer = _protect_words(gold), _protect_words(answer)
    read, equal = _library()
    answer_value = read(answer)
    if answer_value is None:
        return "unparsed"
    gold_value = read(gold)
    if gold_value is None:
        return "wrong"
    gold_value, answer_value = _imaginary(gold_value, answer_value)
    if equal(gold_value, answer_value):
        return "correct" if _really_equal(gold_value, answer_value) else "wrong"
    return "correct" if _agree_at_points(gold_value, answer_value) else "wrong"


def main() -> None:
    """Answer comparisons until the parent closes the pipe; argv[1]: memory limit of a worker in MB."""
    compare("x+1", "1+x")  # imports the libraries and warms their parser, once for all workers
    workers.serve(lambda job: compare(*job), memory_mb=int(sys.argv[1]))


if __name__ == "__main__":
    main()
