r"""Faults that people reported of graders, by kind, through the whole grader. A text without a box is marked by @."""

import pytest

from jaxrl.tasks.grader import Grader

RIGHT, WRONG = True, False
LAST = [  # the last answer counts
    (r"@\boxed{13}? No, I forgot a term; the answer is \boxed{12}.", "12", RIGHT),
    (r"@\boxed{6}, so all of it is \boxed{12}", "12", RIGHT),
    (r"@\boxed{1,000}. Thus, \boxed{1000}", "1000", RIGHT),
    (r"@\boxed{1} and \boxed{2}", "1, 2", RIGHT),
    (r"@\boxed{1} and \boxed{2}", "2", WRONG),
    (r"@\boxed{1}, \boxed{2}", "2,1", RIGHT),
    (r"@$\boxed{1}$, $\boxed{2}$, and $\boxed{3}$", "1,2,3", RIGHT),
    (r"@\boxed{1} or maybe \boxed{2}", "2", RIGHT),
    (r"@$\boxed{1} \text{ and } \boxed{2}$", "1,2", RIGHT),
    (r"@\boxed{1,000}, \boxed{1000}", "1000", RIGHT),
    (r"@\boxed{13}. Wait, the answer is 12.", "12", RIGHT),
    (r"@\boxed{12}. The answer is written in 2 parts", "12", RIGHT),
    ("@The answer is 12, not 13.", "12", RIGHT),
    ("@The answer is 13? No, 12.", "12", RIGHT),
    (r"@\boxed{5} \boxed{6}", "6", WRONG),
    ("@\\boxed{13}\n#### 12", "12", RIGHT),
]
UNITS = [  # units, scale words, bounds, order
    (r"12 \text{ million}", "12", WRONG),
    (r"12 \text{ million}", "12000000", RIGHT),
    ("12000000", r"12 \text{ million}", RIGHT),
    ("12", r"12 \text{ million}", WRONG),
    (r"12 \text{ million dollars}", "12000000", RIGHT),
    ("@The answer is 12 million people.", "12", WRONG),
    ("@The answer is 12 million people.", "12000000", RIGHT),
    ("@so it is 12 million people in all", "12", WRONG),
    ("@so it is 12 million people in all", "12000000", RIGHT),
    (r"3 \text{ dozen}", "36", RIGHT),
    (r"3 \text{ dozen}", "3", WRONG),
    ("2.5 billion", "2500000000", RIGHT),
    (r"12 \text{ thousand}", "12000", RIGHT),
    (r"12 \text{ thousand}", "12", WRONG),
    (r"\frac{1}{2} \text{ million}", "500000", RIGHT),
    (r"12\pi \text{ million}", r"12\pi", WRONG),
    (r"12\pi \text{ million}", r"12000000\pi", RIGHT),
    (r"\$12 \text{ million}", "12", WRONG),
    (r"5 \text{ cents}", r"5 \text{ dollars}", WRONG),
    (r"5 \text{ cents}", r"\$5", WRONG),
    ("@It costs $5", "5 cents", WRONG),
    ("@It costs $5", "5", RIGHT),
    (r"5 \text{ dollars}", r"\$5", RIGHT),
    (r"500 \text{ cents}", r"5 \text{ dollars}", RIGHT),
    (r"5 \text{ months}", r"5 \text{ years}", WRONG),
    (r"5 \text{ inches}", r"5 \text{ feet}", WRONG),
    (r"5 \text{ in}", r"5 \text{ ft}", WRONG),
    (r"5 \text{ kg}", r"5 \text{ pounds}", WRONG),
    (r"5 \text{ L}", r"5 \text{ mL}", WRONG),
    (r"5 \text{ mL}", r"5 \text{ ml}", RIGHT),
    (r"5 \text{ liters}", r"5 \text{ L}", RIGHT),
    (r"5 \text{ km/h}", r"5 \text{ m/s}", WRONG),
    (r"5 \text{ km/h}", r"5 \text{ kilometers per hour}", RIGHT),
    (r"5 \text{ mph}", r"5 \text{ miles per hour}", RIGHT),
    (r"5 \text{ cm}^2", r"5 \text{ m}^2", WRONG),
    (r"5 \text{ square meters}", r"5 \text{ m}^2", RIGHT),
    (r"5 \text{ cm}^2", r"5 \text{ cm}^3", WRONG),
    (r"10\sqrt{2} \text{ km}", r"10\sqrt{2} \text{ miles}", WRONG),
    (r"10\sqrt{2} \text{ km}", r"10\sqrt{2}", RIGHT),
    (r"12 \text{ or more}", "12", WRONG),
    (r"12 \text{ squared}", "12", WRONG),
    (r"12 \text{ squared}", "144", RIGHT),
    ("@The answer is 12 or more.", "12", WRONG),
    ("@The answer is 12 squared.", "12", WRONG),
    ("@It is 12 or more", "12", WRONG),
    ("@It is 12 squared", "12", WRONG),
    (r"12 \text{ or fewer}", "12", WRONG),
    (r"\text{at least } 12", "12", WRONG),
    (r"\text{more than } 12", "12", WRONG),
    ("@The answer is at least 12.", "12", WRONG),
    (r"12 \text{ cubed}", "12", WRONG),
    ("12 plus 3", "12", WRONG),
    ("(5,2)", "x=2, y=5", WRONG),
    ("(2,5)", "x=2, y=5", RIGHT),
    ("5, 2", "x=2, y=5", WRONG),
    ("x=2, y=5", "(2,5)", RIGHT),
    ("x=5, y=2", "(2,5)", WRONG),
    ("y=5, x=2", "x=2, y=5", RIGHT),
    (r"\{2,5\}", "(2,5)", WRONG),
    (r"\{5,2\}", r"\{2,5\}", RIGHT),
    ("(2,5)", r"\{2,5\}", WRONG),
    ("(5,2)", "(2,5)", WRONG),
    ("(5,2,1)", "x=2, y=5, z=1", WRONG),
    ("2, 5", "(2,5)", RIGHT),
    ("12 apples", "12", RIGHT),
    (r"12 \text{ hours}", "12", RIGHT),
    (r"60 \text{ minutes}", r"1 \text{ hour}", RIGHT),
    (r"12 \text{ percent}", r"12\%", RIGHT),
    (r"90 \text{ degrees}", r"90^\circ", RIGHT),
    (r"90 \text{ radians}", r"90^\circ", WRONG),
    ("@He walks 12 km in total", "12 m", WRONG),
    ("@He walks 12 km in total", "12 km", RIGHT),
]
PLACES = [  # where the answer stands
    (r"@<think>3 \boxed{4}</think><answer>12</answer>", "12", RIGHT),
    (r"@<think>so 12 \boxed{12}", "12", WRONG),
    ("@<think>so 12", "12", WRONG),
    (r"@<think>a</think>\boxed{5}<think>hm</think>", "5", RIGHT),
    ("@<answer>12</answer>", "12", RIGHT),
    (r"@<answer>\boxed{12}</answer>", "12", RIGHT),
    (r"@<answer> 13 </answer> no: \boxed{12}", "12", RIGHT),
    (r"@\boxed{12} <answer>13</answer>", "13", RIGHT),
    ("@<answer>The answer is 12.</answer>", "12", RIGHT),
    ("@<thinking>7</thinking> 12", "12", RIGHT),
]
NOTATION = [  # notation
    ("x²+1", "x^2+1", RIGHT),
    ("√3", r"\sqrt{3}", RIGHT),
    ("2√3", r"2\sqrt{3}", RIGHT),
    ("√(x+1)", r"\sqrt{x+1}", RIGHT),
    ("½", r"\frac{1}{2}", RIGHT),
    ("2½", r"\frac{5}{2}", RIGHT),
    ("(-∞, 3]", r"(-\infty, 3]", RIGHT),
    ("(-∞, 3)", r"(-\infty, 3]", WRONG),
    ("1\u200b2", "12", RIGHT),
    ("1 234", "1234", RIGHT),
    ("12", "12", RIGHT),
    (r"\approx 3.14", "3.14", RIGHT),
    ("≈ 3.14", "3.14", RIGHT),
    (r"\approx 3.14", r"\pi", WRONG),
    ("5th", "5", RIGHT),
    (r"5^{\text{th}}", "5", RIGHT),
    ("pi/3", r"\frac{\pi}{3}", RIGHT),
    ("pi/3", r"\frac{\pi}{4}", WRONG),
    ("12 km/h", "12", RIGHT),
    (r"12 \text{ km/h}", "12", RIGHT),
    ("2 1/3", r"\frac{7}{3}", RIGHT),
    ("2 1/3", "7", WRONG),
    ("@so it is 2 1/3", "7/3", RIGHT),
    ("@so it is 2 1/3", "1/3", WRONG),
    (r"e^{i\pi}", "-1", RIGHT),
    (r"e^{i\pi}", "1", WRONG),
    (r"\sin 30^\circ", r"\frac{1}{2}", RIGHT),
    (r"\sin 30", r"\frac{1}{2}", WRONG),
    (r"\cos(60^\circ)", "0.5", RIGHT),
    (r"\text{The answer is } 12", "12", RIGHT),
    (r"\text{The answer is } 12", "13", WRONG),
    ("-3*pi", r"-3\pi", RIGHT),
    ("-3*pi", r"3\pi", WRONG),
    ("5-1i", "5-i", RIGHT),
    ("5-1i", "5+i", WRONG),
    ("x ≤ 5", r"x \le 5", RIGHT),
    ("3 × 10⁸", "300000000", RIGHT),
    ("１２", "12", RIGHT),
    ("sqrt(3)/2", r"\frac{\sqrt{3}}{2}", RIGHT),
    ("2*sqrt(3)", r"2\sqrt{3}", RIGHT),
    ("2sqrt3", r"2\sqrt{3}", RIGHT),
    (r"\nicefrac{1}{2}", "0.5", RIGHT),
    ("30°", "30", RIGHT),
    (r"\tan 45^{\circ}", "1", RIGHT),
    (r"\sin^2 30^\circ", r"\frac14", RIGHT),
    ("x_1", "x₁", RIGHT),
    ("x⁻¹", r"\frac{1}{x}", RIGHT),
    ("{1, 2} ∪ {3}", r"\{1,2,3\}", RIGHT),
    ("infinity", r"\infty", RIGHT),
    ("-oo", r"-\infty", RIGHT),
]


@pytest.mark.parametrize("kind", ["LAST", "UNITS", "PLACES", "NOTATION"])
def test_reported_faults(kind):
    rows = globals()[kind]
    pairs = [(text[1:] if text[0] == "@" else rf"so \boxed{{{text}}}", gold) for text, gold, _ in rows]
    with Grader(workers=1, timeout=120.0) as grader:
        outcomes = grader.grade(pairs)
    assert [(o, row) for o, row in zip(outcomes, rows, strict=True) if (o == "correct") != row[2]] == []


def test_a_reference_is_equal_to_itself_in_every_notation():
    rows = [row for row in UNITS + NOTATION if row[0][0] != "@"]
    with Grader(workers=1, timeout=120.0) as grader:
        outcomes = grader.grade([(rf"\boxed{{{gold}}}", gold) for _, gold, _ in rows])
    assert [row for o, row in zip(outcomes, rows, strict=True) if o != "correct"] == []


def test_identity_names_the_policies():
    with Grader() as plain, Grader(need_marker=True, unfinished="graded") as other:
        assert other.version == plain.version + " need_marker unfinished=graded"
        texts = ["<think>so 12", "<think>the answer is 12", "<think>x</think> it is 12"]
        assert plain.grade([(text, "12") for text in texts]) == ["unparsed", "unparsed", "correct"]
        assert other.grade([(text, "12") for text in texts]) == ["unparsed", "correct", "unparsed"]
