r"""One notation for answers: `clean` turns what people and models write into the LaTeX that is compared.

Unicode (x², √3, ½, ∞, ≤, zero-width and narrow spaces, fullwidth digits), programs' notation (pi/3, sqrt(2), **),
words (12 million, 12 squared, 5 plus 3, 5th), layout (\left, \dfrac, \quad, markdown) and leading prose
(\text{The answer is }). Takes time linear in the text; nothing is evaluated.
"""

from __future__ import annotations

import re

from jaxrl.tasks.units import POWERS, SCALE_WORDS

WRAPPER = r"\\(?:text(?:normal|bf|it|rm|sf|sc)?|[mh]box|math(?:rm|bf|it|sf)|operatorname|rm)(?![A-Za-z])\s*"
DEGREE = r"\^\s*\{?\s*\\circ\s*\}?|°|\\degree"
_INVISIBLE = dict.fromkeys([*range(0x200B, 0x2010), 0x2060, 0x2061, 0x2062, 0x2063, 0xFEFF, 0x00AD], "")
_SPACES = dict.fromkeys([0xA0, *range(0x2000, 0x200B), 0x202F, 0x205F, 0x3000], " ")
_FULLWIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
SPACING = _INVISIBLE | _SPACES | _FULLWIDTH  # what extraction may change without changing positions that matter
_SIGNS = {
    "−": "-", "–": "-", "‐": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "÷": r"\div ",
    "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ", "≤": r"\le ", "≥": r"\ge ",
    "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∈": r"\in ", "∪": r"\cup ", "∩": r"\cap ",
    "∅": r"\emptyset ", "≈": r"\approx ", "…": r"\ldots ", "ℝ": r"\mathbb{R}", "∖": r"\setminus ", "⁄": "/", "′": "'",
    "∘": r"\circ ", "º": "°", "‰": r" \times 10^{-3}", "∶": ":",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}", "⅖": r"\frac{2}{5}", "⅗": r"\frac{3}{5}", "⅘": r"\frac{4}{5}", "⅙": r"\frac{1}{6}",
    "⅚": r"\frac{5}{6}", "⅐": r"\frac{1}{7}", "⅛": r"\frac{1}{8}", "⅜": r"\frac{3}{8}", "⅝": r"\frac{5}{8}",
    "⅞": r"\frac{7}{8}", "⅑": r"\frac{1}{9}", "⅒": r"\frac{1}{10}",
}  # fmt: skip
_UNICODE = SPACING | {ord(sign): latex for sign, latex in _SIGNS.items()}
_RAISED, _LOWERED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ", "0123456789+-ni"), str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n")
_ROOTS = {"√": r"\sqrt", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]"}
_PLAIN = r"pi|sqrt|sin|cos|tan|ln|log|theta|alpha|beta|infinity|Infinity|infty|inf|oo"
_FUNCTION = re.compile(rf"{WRAPPER}\{{[^{{}}]*\}}|(?<![\\A-Za-z])({_PLAIN})(?![A-Za-z])")
_SCALE = re.compile(
    rf"(?P<before>\d|[)}}]|\\pi)[\s~]*(?P<open>{WRAPPER}\{{\s*)?(?:of an?\s+)?"
    rf"(?P<word>{'|'.join(SCALE_WORDS)}|(?<=\{{)\s*(?:k|mn|bn))s?(?![A-Za-z])(?:\s+of\b)?(?P<close>\s*\}})?"
)
_SHORT = re.compile(r"(\\?\$\s*\d[\d.,]*)\s*([kKMB]|[mb]n)(?![A-Za-z])")
_PROSE = re.compile(rf"^{WRAPPER}\{{[^{{}}\d]*(?:\b(?:is|are|be|equals?)|[:=])\s*\}}\s*(?=.)")
_WHOLE = re.compile(rf"^\s*{WRAPPER}\{{([^{{}}]*\d[^{{}}]*)\}}\s*$")
_OPERATORS = {"plus": "+", "minus": "-", "times": r"\times", "divided by": "/", "over": "/"}
_OPERATOR = re.compile(
    rf"(?<=\d)\s*(?:{WRAPPER}\{{)?\s*(plus|minus|times|divided by|over)(?![A-Za-z])\s*\}}?\s*(?=[\d\\(-])"
)
_RAISE = re.compile(rf"(?<=[\d)])\s*(?:({WRAPPER}\{{)\s*)?(squared|cubed|factorial)(?![A-Za-z])(?(1)\s*\}})")
_POWERS = {"squared": "^{2}", "cubed": "^{3}", "factorial": "!"}
_ORDINAL = re.compile(
    rf"(\d)(?:\s*\^\s*\{{?\s*)?(?:\s*{WRAPPER}\{{\s*)?(?:(?<=1)st|(?<=2)nd|(?<=3)rd|th|(?<=\{{)(?:st|nd|rd))"
    r"\s*\}{0,2}(?![A-Za-z])"
)


def clean(latex: str) -> str:
    """The same answer in the notation above: without what only concerns layout, a final stop, or prose in front."""
    if latex.isascii() and latex.isdigit():  # most answers are
        return latex
    text = latex if latex.isascii() else from_unicode(latex)
    text = _WHOLE.sub(r"\1", text)  # an amount that is text as a whole
    text = _SHORT.sub(lambda m: rf"{m[1]} \times 10^{{{dict(k=3, m=6, b=9)[m[2][0].lower()]}}}", text)
    text = text.replace("\\$", "").replace("$", "")
    text = re.sub(r"(?<=[\w)}])\s*\*\*\s*(?=[\w({-])", "^", text).replace("**", "")
    text = re.sub(r"(?<!\\)\\[()\[\]]", "", text)
    text = re.sub(r"(?<!\\)\\!\s*", "", text).replace("{,}", ",").replace("{ , }", ",")
    text = re.sub(r"(?<=\d)(?:\\[,;:]|\\ |~)\s*(?=\d{3}(?!\d))", ",", text)
    if not re.search("matrix|array|cases", text):
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # a doubled backslash: LaTeX that went through JSON once more
    text = re.sub(r"(?<=[\d)])(?:or|and)(?=[A-Za-z(\d-])", ", ", text)
    text = re.sub(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle)(?![A-Za-z])", "", text)
    text = re.sub(r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])|\s", " ", text)
    text = re.sub(r"\\(?:[dtc]|nice|s)frac(?![A-Za-z])", r"\\frac", text).replace(r"\varnothing", r"\emptyset")
    text = re.sub(r",?\s*\\(?:text|mbox)\s*\{\s*(?:and|or|AND|OR)\s*\}", ", ", text)
    text = re.sub(r"\\(?:mathrm|text|rm)\s*\{\s*([ei])\s*\}", r"\1", text)
    text = _words_to_signs(_PROSE.sub("", text.strip()))
    text = re.sub(r"^\s*\\(?:approx|simeq)(?![A-Za-z])\s*", "", text)
    return _close_roots(text).strip().rstrip(".,;: ").strip()


def from_unicode(text: str) -> str:
    """Unicode mathematics as LaTeX: superscripts, roots, fractions, signs, spaces."""
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿⁱ]+", lambda m: f"^{{{m[0].translate(_RAISED)}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉₊₋ₙ]+", lambda m: f"_{{{m[0].translate(_LOWERED)}}}", text)
    text = re.sub(r"([√∛∜])\s*([\w.]+)?", lambda m: _ROOTS[m[1]] + (f"{{{m[2]}}}" if m[2] else ""), text)
    return text.translate(_UNICODE)


def _words_to_signs(text: str) -> str:
    r"""Names of functions, scale words, powers, operators and ordinals in signs: 12 million is 12 \times 10^{6}."""

    def function(match: re.Match) -> str:
        name = match[1]
        return match[0] if name is None else "\\" + ("infty" if name[0] in "iIo" else name) + " " * (name != "sqrt")

    def scale(match: re.Match) -> str:
        word = match["word"].strip()
        power = {"k": 3, "mn": 6, "bn": 9}.get(word, POWERS.get(word))
        sign = r"\times 12" if power is None else rf"\times 10^{{{power}}}"
        opened = match["open"] and not match["close"]
        closed = (match["close"] or "") if not match["open"] else ""
        return f"{match['before']} {sign} {match['open'] if opened else ''}{closed}"

    if re.search("[a-zIA-Z]{2}", text):
        text = _FUNCTION.sub(function, text)
        for _ in range(2):  # two hundred thousand
            text = _SCALE.sub(scale, text)
        text = _OPERATOR.sub(lambda m: f" {_OPERATORS[m[1]]} ", text)
        text = _RAISE.sub(lambda m: _POWERS[m[2]], text)
        text = _ORDINAL.sub(r"\1", text)
    return re.sub(r"(?<![\w.,}])1(?=i(?![\w]))", "", text)


def closing_brace(text: str, start: int, limit: int = 2000, pair: str = "{}") -> int:
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


def _close_roots(text: str) -> str:
    r"""\sqrt(2) -> \sqrt{2}: math-verify would read 4\sqrt(2) as 4."""
    while match := re.search(r"\\sqrt(\[[^\[\]]*\])?\s*\(", text):
        end = closing_brace(text, match.end() - 1, pair="()")
        if end < 0:
            break
        text = f"{text[: match.start()]}\\sqrt{match[1] or ''}{{{text[match.end() : end]}}}{text[end + 1 :]}"
    return text
