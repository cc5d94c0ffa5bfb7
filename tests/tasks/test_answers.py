"""Where the final answer of a text is."""

import pytest

from jaxrl.tasks.answers import extract, is_word, reference, spoken

FOUND = [
    # boxes
    (r"so \boxed{5}", "5"),
    (r"first \boxed{3}. " + "Then a long way of correcting this result until we find " + r"\boxed{5}", "5"),
    (r"\boxed{\frac{1}{2}} and so on", r"\frac{1}{2}"),
    (r"$\boxed{5}$ or $\boxed{6}$", "5, 6"),
    (r"\boxed{5}, \boxed{6}", "5, 6"),
    (r"\boxed{5} ... I mean, \boxed{5}", "5"),
    (r"\boxed{\text{so } \boxed{5}}", "5"),
    (r"\boxed{5} or rather, hmm, \boxed{6}, and so, finally, \boxed{6}", "6"),
    (r"\boxed{" * 400 + "5" + "}" * 400, "5"),
    (r"\fbox{7}", "7"),
    (r"\boxed 42", "42"),
    (r"\boxed{28} percent", r"28\%"),
    (r"$\boxed{28}\%$", r"28\%"),
    # the last one counts
    (r"\boxed{13}? No, I forgot a term; the answer is \boxed{12}.", "12"),
    (r"\boxed{6}, so all of it is \boxed{12}", "12"),
    (r"\boxed{1,000}. Thus, \boxed{1000}", "1000"),
    (r"\boxed{1,000}, \boxed{1000}", "1000"),
    (r"\boxed{1} or rather \boxed{2}", "2"),
    (r"\boxed{1}. \boxed{2}", "2"),
    (r"\boxed{1}$ and $\boxed{2}$, \text{ and } $\boxed{3}", "1, 2, 3"),
    (r"$x = \boxed{1}$ and $y = \boxed{2}$", "1, 2"),
    (r"\(\boxed{1}\) \(\boxed{2}\)", "1, 2"),
    (r"\boxed{13}. Wait, the answer is 12.", "12"),
    (r"\boxed{13}" + "\n#### 12", "12"),
    (r"\boxed{12}. The answer is written in 2 parts", "12"),
    ("The answer is 12, not 13.", "12"),
    ("The answer is 13? No, 12.", "12"),
    # tags
    ("<answer>12</answer>", "12"),
    (r"<think>3 \boxed{4}</think><answer>12</answer>", "12"),
    (r"<answer>\boxed{12}</answer>", "12"),
    (r"<answer>13</answer> no: \boxed{12}", "12"),
    (r"\boxed{12} <answer>13</answer>", "13"),
    ("<answer>The answer is $12$.</answer>", "12"),
    # what belongs to a number
    ("so it is 12 million people in all", "12 million"),
    ("he walks 12 km in all", "12 km"),
    ("it costs $5", "$5"),
    ("it is at least 12", "at least 12"),
    ("it is 12 or more", "12 or more"),
    ("it is 12 squared", "12 squared"),
    ("it is 2 1/3 of them", "2 1/3"),
    ("he has 12 in total", "12"),
    # thinking
    (r"<think>\boxed{3}</think> \boxed{5}", "5"),
    (r"<think>maybe \boxed{3}</think> The answer is 5.", "5"),
    # a final answer after the boxes of intermediate results
    (r"interest \boxed{255}. Final Answer: The final answer is $10455$. I hope it is correct.", "10455"),
    (r"\boxed{5}. So the final answer is positive.", "5"),
    # markers
    ("6 * 7 = 42\n#### 42", "42"),
    ("#### 1,234\n", "1,234"),
    ("The answer is 42.", "42"),
    ("The answer is: 42", "42"),
    ("Answer: **42**", "42"),
    ("**Final Answer**: 3/4", "3/4"),
    ("The answer is $5$ because $x=3$.", "5"),
    ("The answer is $1$, $2$ and $3$.", "1, 2, 3"),
    ("The answer is 12 apples. He had 15 before.", "12 apples"),
    ("Final Answer: The largest $n$ is 34.", "34"),
    ("The answer is Clara.", "Clara"),
    ("First the answer is 3. No: the answer is 4.", "4"),
    ("Answer:\n$$\n9\n$$", "\n9\n"),
    # neither
    (r"hence $x \ge 5$.", r"x \ge 5"),
    (r"so \[ 9 \]", " 9 "),
    ("3x + 4y + 14 = 0", "3x + 4y + 14 = 0"),
    ("-\\frac{10}{9}", "-\\frac{10}{9}"),
    ("it is 41 or 42", "41, 42"),
    ("the number is not 10 which is 1,000.99 euros", "1,000.99 euros"),
    ("first 3, then 4\nso he has 7 left", "7"),
    ("$x$ is 42", "42"),
]


@pytest.mark.parametrize(("text", "latex"), FOUND)
def test_found(text, latex):
    assert extract(text).latex == latex


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I do not know",
        r"\boxed{}",
        r"\boxed{5",
        r"\boxed{5} but wait, \boxed{6",
        r"\boxed{" + "1 " * 5000,
        r"\boxed{" + "x" * 5000 + "}",
        r"<think>\boxed{5}</think> I give up",
        "Answer $ \n 9 \n $",
        "AZYUK2A",
        "the code x2y7z",
        "#### ",
        "<answer>12",
        "<answer></answer>",
        r"<think>so \boxed{5}",
        r"a</think>\boxed{5}<think>or",
    ],
)
def test_no_answer(text):
    assert extract(text) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [("so it is 5", False), ("so $5$", False), (r"\boxed{5}", True), ("#### 5", True), ("answer: 5", True)],
)
def test_marker_can_be_required(text, found):
    assert (extract(text, need_marker=True) is not None) == found
    assert extract(text).latex == "5"


def test_plain_text_is_told_from_formulas():
    assert extract("it is 1,5").bare and not extract("it is $1,5$").bare and not extract(r"\boxed{1,5}").bare


@pytest.mark.parametrize(
    ("gold", "latex"),
    [
        ("42", "42"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        ("$10$", "10"),
        ("$125$ miles", r"125 \text{ miles }"),
        ("$1$ and $2$", r"1 \text{ and } 2"),
        (r"\(\boxed{1}\) and \(\boxed{-2}\).", "1, -2"),
        (r"A long solution. Because of this and of that and of more, we have $x=3$ and \boxed{7}", "7"),
        ("Because of this and of that and of still more we have $x=3$", "x=3"),
        (r"\boxed{5", "5"),
        ("Carla.", "Carla"),
    ],
)
def test_reference(gold, latex):
    assert reference(gold).latex == latex


def test_words():
    assert all(map(is_word, ["Clara", "odd", "Yes", "act", "even"]))
    assert not any(map(is_word, ["ab", "abc", "xyz", "sin", "log", "PQRS".lower(), "pi"]))


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("a", "a"),
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),
        ("a<think>b</think>c<think>d</think>e", "a c e"),
        ("[THINK]a[/THINK]b", "b"),
        ("<|begin_of_thought|>a<|end_of_thought|>b", "b"),
        ("<Thinking>a</thinking>b</think>c", "b c"),
        ("<think>a", None),
        ("a</think>b<think>c", None),
    ],
)
def test_spoken(text, rest):
    found = spoken(text)
    assert (None if found is None else " ".join(found.split())) == rest
    assert spoken(text, "graded") is not None


def test_unfinished_thinking_is_a_choice():
    for text in (r"<think>so \boxed{5}", "<think>so it is 5", "<think> the answer is 5"):
        assert extract(text) is None and extract(text, unfinished="graded").latex == "5"
    with pytest.raises(ValueError, match="valid: wrong, graded"):
        extract("5", unfinished="right")
