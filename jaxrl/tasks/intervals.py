r"""Inequalities for one variable as intervals: 1<x\le 2 is (1,2], "x<1 or x>2" is (-\infty,1)\cup(2,\infty)."""

from __future__ import annotations

import re

_RELATION = re.compile(r"(\\(?:l|g)(?:eqslant|eq?|t)(?![A-Za-z])|[<>]=?)")
_OR = re.compile(r"\s*(?:,|\bor\b|\\lor(?![A-Za-z])|\\vee(?![A-Za-z])|\\cup(?![A-Za-z]))\s*")
_INTERVALS = re.compile(r"[(\[][^,()\[\]]+,[^,()\[\]]+[)\]](?:\s*\\cup\s*[(\[][^,()\[\]]+,[^,()\[\]]+[)\]])*")


def is_intervals(latex: str) -> bool:
    """Whether an answer is written as an interval or a union of them, whose ends have no brackets of their own."""
    return _INTERVALS.fullmatch(latex.strip()) is not None


def as_intervals(latex: str) -> str:
    """The union of intervals that inequalities for one letter describe; anything else as it is."""
    found = [_interval(part) for part in _OR.split(latex)]
    if None in found or len({name for name, _ in found}) != 1:
        return latex
    return r" \cup ".join(interval for _, interval in found)


def _interval(part: str) -> tuple[str, str] | None:
    """(variable, interval) of one inequality or chain of two, or None."""
    pieces = [piece.strip() for piece in _RELATION.split(part)]
    terms, relations = pieces[::2], pieces[1::2]
    down = [relation.startswith((">", r"\g")) for relation in relations]
    if len(relations) not in (1, 2) or len(set(down)) > 1 or not all(terms):
        return None
    if down[0]:
        terms, relations = terms[::-1], relations[::-1]
    places = [i for i, term in enumerate(terms) if re.fullmatch("[A-Za-z]", term)]
    if len(places) != 1 or (len(terms) == 3 and places != [1]):
        return None
    place, strict = places[0], [relation in ("<", ">", r"\lt", r"\gt") for relation in relations]
    left = ("(" if strict[0] else "[") + terms[0] if place else r"(-\infty"
    right = terms[-1] + (")" if strict[-1] else "]") if place < len(terms) - 1 else r"\infty)"
    return terms[place], f"{left},{right}"
