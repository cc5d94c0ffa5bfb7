"""The policies of equality that need no algebra: numbers, units, percent signs, words, bases."""

import signal
from fractions import Fraction

import pytest

from jaxrl.tasks.answers import Answer
from jaxrl.tasks.equality import clean, decide, plain_number, too_costly


@pytest.mark.parametrize(
    ("latex", "value"),
    [
        ("42", 42),
        (r"\text{12.5}", Fraction("12.5")),
        (r"\textbf{1,000}", 1000),
        ("-42", -42),
        ("+42", 42),
        ("007", 7),
        ("1,000", 1000),
        (r"1\,000", 1000),
        (r"1\ 000\ 000", 1000000),
        ("1{,}000", 1000),
        ("1 000", 1000),
        (r"11,\! 111,\! 111,\! 100", 11111111100),
        (r"\$1,000.50", Fraction("1000.5")),
        (".5", Fraction(1, 2)),
        ("5.", 5),
        ("1e3", 1000),
        ("1.5e-3", Fraction(3, 2000)),
        ("2E5", 200000),
        (r"1 \times 10^{3}", 1000),
        (r"1.2\cdot 10^{-2}", Fraction(3, 250)),
        (r"\frac{1}{2}", Fraction(1, 2)),
        (r"-\dfrac{1}{2}", Fraction(-1, 2)),
        (r"\frac{-1}{2}", Fraction(-1, 2)),
        (r"\frac13", Fraction(1, 3)),
        (r"\frac{2}3", Fraction(2, 3)),
        (r"\frac 3 4", Fraction(3, 4)),
        ("3/4", Fraction(3, 4)),
        (r"1\frac{1}{2}", Fraction(3, 2)),
        (r"-1\frac{1}{2}", Fraction(-3, 2)),
        (r"0.\overline{3}", Fraction(1, 3)),
        (r"136.1\overline{6}", Fraction(817, 6)),
        (r"90^\circ", 90),
        (r"90^{\circ}", 90),
        ("90°", 90),
        (r"5\text{ cm}", 5),
        (r"5\mbox{ cm}^2", 5),
        ("5 m", 5),
        ("12 apples", 12),
        (r"7.25 \text{ dollars}", Fraction("7.25")),
        (r"\left(5\right)", 5),
        ("{5}", 5),
        ("−5", -5),
        ("**42**", 42),
    ],
)
def test_plain_numbers(latex, value):
    assert plain_number(clean(latex)).value == value


@pytest.mark.parametrize(
    "latex",
    [
        "",
        "x",
        "2x",
        "5m",
        "2^3",
        "3!",
        r"2\pi",
        r"\sqrt{2}",
        "1,2",
        "32, 349",
        "1,00",
        "1 2",
        "3:4",
        "1+1",
        "--1",
    ]
    + ["1/0", r"\frac{1}{0}", "1e9999", "12,34,567", "5 x", "3 and 4", "1.2.3", r"\frac{1}{x}", "9" * 500],
)
def test_not_plain_numbers(latex):
    assert plain_number(clean(latex)) is None


@pytest.mark.parametrize(
    "latex",
    [
        "5 chocolate chip cookies for every child in the whole class, and then 3 are left over",
        "5" + "a" * 380 + "!",
        "5" + " " * 380 + "!",
        "5" + "cm " * 120 + "1",
    ],
)
def test_a_number_before_many_words_is_given_up_at_once(latex):
    """Backtracking over the letters of a unit would take longer than the training run."""

    def give_up(*_):
        raise AssertionError("still at it after half a minute")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(30)
    try:
        assert plain_number(latex) is None
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_decimal_commas_only_in_plain_text():
    assert plain_number("1,5", bare=True).value == Fraction(3, 2)
    assert plain_number("0,111", bare=True).value == Fraction("0.111")
    assert plain_number("1,500", bare=True).value == 1500
    assert plain_number("1,5") is None


@pytest.mark.parametrize(
    ("gold", "answer", "equal"),
    [
        # exactness
        ("42", "42.0", True),
        ("42", "42.003", False),
        ("42", "42.0000001", False),
        (r"\frac{1}{3}", "0.333333", True),
        (r"\frac{1}{3}", "0.3333", False),
        ("33.3", r"\frac{100}{3}", False),
        ("0.75", r"\frac{3}{4}", True),
        ("0", "0.0000001", False),
        ("0.0000001", "0.0000002", False),
        ("0.0000001", "0", False),
        # fractions
        (r"\frac{1}{2}", r"\frac{2}{4}", False),
        (r"\frac{1}{2}", r"\frac{1}{2}", True),
        ("1", r"\frac{3}{3}", True),
        ("0.5", r"\frac{2}{4}", True),
        (r"\frac{2}{4}", r"\frac{1}{2}", True),
        (r"\frac{2}{4}", r"\frac{2}{4}", True),
        (r"-\frac{1}{2}", r"\frac{-1}{2}", True),
        # percent
        (r"28\%", "28", True),
        (r"28\%", r"28\%", True),
        (r"28\%", "0.28", True),
        (r"28\%", r"28 \text{ percent}", True),
        ("28", r"28\%", True),
        ("0.28", r"28\%", True),
        ("0.28", "28", False),
        ("0.28", r"0.28\%", False),
        ("28", "0.28", False),
        ("42", "4200", False),
        # units
        (r"5\text{ cm}", "5", True),
        ("5", r"5\text{ cm}", True),
        (r"5\text{ cm}", r"5\text{ m}", False),
        (r"5\text{ cm}", r"5\text{ centimeters}", True),
        (r"3\text{ hours}", r"3\text{ minutes}", False),
        ("90", r"90^\circ", True),
        # words
        ("Carla", "Clara", False),
        ("Carla", r"\text{Carla}", True),
        ("Carla", "carla.", True),
        ("even", "neve", False),
        ("even", "odd", False),
        (r"\text{no solution}", "No solution", True),
        ("Ann and Bob", r"\text{Bob, Ann}", True),
        ("Ann, Bob", "Ann", False),
        ("the hexagon", "hexagon", True),
        ("E", r"\text{(E)}", True),
        ("D", r"\text{(D) } 5", True),
        ("D", "E", False),
        ("cat", "act", False),
        # bases
        ("2516_8", "2516_{8}", True),
        ("2516_8", r"2516_{\text{eight}}", True),
        ("2516_8", "2516", True),
        ("2516_8", "2516_{10}", False),
        ("2516_8", "1358", False),
        ("2516_8", r"2516^\circ", False),
        ("2516", "2516_8", False),
        ("1358", "2516_8", True),
        ("32_{(8)}", "32_8", True),
        ("A1_{16}", "a1_{16}", True),
        # times and ratios
        ("12:00", "12:00", True),
        ("12:00", "1:00", False),
        ("0:30", "0:45", False),
        ("3:4", "6:8", True),
        # assignments
        ("7", "x = 7", True),
        # the same text
        (r"x^{2} + 1", r"x^{2}+1", True),
        # not for here
        ("x+1", "1+x", None),
        ("ab", "ba", None),
        ("7", "y=6=7", None),
        ("(1,2)", "[1,2]", None),
        ("Carla", "5", None),
    ],
)
def test_decide(gold, answer, equal):
    assert decide(Answer(gold, False), Answer(answer, False)) is equal


@pytest.mark.parametrize(
    ("latex", "reason"),
    [
        ("x" * 3000, "long"),
        ("(" * 40 + ")" * 40, "deep"),
        ("x+" + "9" * 500, "digits"),
        ("9^{9^{9^{9}}}", "magnitude"),
        ("9**9**9**9", "magnitude"),
        ("2^{10000000000}", "magnitude"),
        ("(x+1)^{99999}", "magnitude"),
        ("1000000000!", "magnitude"),
        ("((5!)!)!", ""),
        ("5!!!", "magnitude"),
        (r"10^{(5^{5^{5^{5^{5}}} \cdot \log_{10}(5)} - 4)}", "magnitude"),
        ("2^{2005}", ""),
        ("2^{2^{3}}", ""),
        ("(2^3)(3^4)(5^7)", ""),
        (r"\frac{1}{2004!}", ""),
        (r"x^{2}y^{3}z^{4}w^{5}", ""),
        ("e^{-x^{2}}", ""),
    ],
)
def test_bounds(latex, reason):
    assert too_costly(latex) == reason
