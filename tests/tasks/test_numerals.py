"""Numbers in words: every whole number and fraction comes back, and what is no amount stays as it is."""

import gzip
import json
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.tasks.answers import Answer
from jaxrl.tasks.equality import normal_form, plain_number
from jaxrl.tasks.notation import clean
from jaxrl.tasks.numerals import MOST, in_digits
from tests.shared import shared_path

SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
)
TENS = "_ _ twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = "a an and half of two dozen hundred thirds point six million the twenty - minus per apples quarter 3 percent"
PARTS = "_ _ half third quarter fifth sixth seventh eighth ninth tenth"


def spell(n: int, link: str) -> str:
    """A number below a trillion in words. link: "-" or " " between tens and ones."""
    for scale, word in ((10**9, "billion"), (10**6, "million"), (1000, "thousand")):
        if n >= scale:
            rest = n % scale
            behind = f" {'and ' * (rest < 100)}{spell(rest, link)}" if rest else ""
            return f"{spell(n // scale, link)} {word}{behind}"
    if n >= 100:
        return f"{spell(n // 100, link)} hundred" + (f" and {spell(n % 100, link)}" if n % 100 else "")
    if n < 20:
        return SMALL.split()[n]
    return TENS.split()[n // 10] + (link + SMALL.split()[n % 10] if n % 10 else "")


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 10**12 - 1) | st.integers(0, 2000), st.sampled_from("- "), st.sampled_from(["", " km", " eggs"]))
def test_every_whole_number_comes_back(n, link, behind):
    words = spell(n, link)
    if len(words + behind) <= MOST - 10:
        assert in_digits(words + behind) == f"{n}{behind}"
        assert in_digits(rf"\text{{{words.capitalize()}}}{behind}") == f"{n}{behind}"
        assert in_digits("minus " + words) == f"-{n}"


@given(st.integers(1, 99), st.integers(2, 10), st.integers(1, 9), st.sampled_from("- "))
def test_every_fraction_comes_back(whole, bottom, top, link):
    part = PARTS.split()[bottom]
    part = f"{spell(top, ' ')}{link}{part}s".replace("halfs", "halves") if top > 1 else f"one{link}{part}"
    assert plain_number(in_digits(part)).value == Fraction(top, bottom)
    assert plain_number(in_digits(f"{part} of a million")).value == Fraction(top * 10**6, bottom)
    if top < bottom:
        assert plain_number(in_digits(f"{spell(whole, link)} and {part}")).value == whole + Fraction(top, bottom)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(WORDS.split()), max_size=9), st.sampled_from([" ", "-", ", "]))
def test_what_is_read_is_a_number_and_reading_again_changes_nothing(words, space):
    text = space.join(words)
    found = in_digits(text)
    assert in_digits(found) == found
    if found != text and "," not in found:
        assert plain_number(found) is not None, (text, found)


def test_votes_for_a_number_count_together_however_it_is_written():
    forms = {normal_form(Answer(text, True)) for text in ("24", "two dozen", "twenty-four eggs", r"\text{Twenty four}")}
    assert forms == {"24"}


@pytest.mark.parametrize("name", ["math_train.jsonl.gz", "deepscaler.jsonl.gz"])
def test_few_references_of_data_sets_are_numbers_in_words(name):
    with gzip.open(shared_path("data", name), "rt", encoding="utf-8") as lines:
        golds = {clean(str(json.loads(line)["answer"])) for line in lines}
    read = {in_digits(gold) for gold in golds if in_digits(gold) != gold}
    assert read <= {"2 lines", "4"} and len(golds) > 2000
