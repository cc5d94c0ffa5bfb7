r"""The whole grader: the shared cases, algebra with its guards, hostile answers."""

import json
import subprocess
import sys
import threading

import pytest

from jaxrl.tasks.grader import GRADER_VERSION, OUTCOMES, Grader
from tests.shared import shared_path

LONG = 120.0  # seconds; nothing here should come near


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1, timeout=LONG) as g:
        yield g


def boxed(*rows):
    return [(rf"so \boxed{{{answer}}}", gold) for gold, answer in rows]


def test_shared_cases(grader):
    with open(shared_path("data", "grading_cases.jsonl"), encoding="utf-8") as f:
        cases = [json.loads(line) for line in f]
    assert len(cases) >= 61
    outcomes = grader.grade([(c["prediction"], c["gold"]) for c in cases])
    bad = [
        (outcome, c["prediction"][:80], c["gold"][:80], c.get("note"))
        for outcome, c in zip(outcomes, cases, strict=True)
        if (outcome == "correct") != c["expected"] or outcome in ("timeout", "crashed")
    ]
    assert bad == []


EQUAL = [
    ("x^2+2x+1", "(x+1)^2"),
    (r"\sqrt{18}", r"3\sqrt{2}"),
    (r"2\pi", r"2\pi \text{ cm}"),
    (r"10\sqrt{2} miles", r"10\sqrt{2}"),
    (r"4\sqrt{2}", r"4\sqrt(2)"),
    ("x^{2n}", "x^(2n)"),
    ("2x^2", "2x**2"),
    (r"\frac{1}{\sqrt{n}}", r"\sqrt{1/n}"),
    (r"\frac{-4 \pm \sqrt{31}}{15}", r"\frac{-4+\sqrt{31}}{15}, \frac{-4-\sqrt{31}}{15}"),
    ("3, -3", r"\pm 3"),
    ("5,4", r"\{4, 5\}"),
    (r"5 \text{ or } 3", r"3 \text{ OR } 5"),
    ("y=7", "y=3+4=7"),
    ("3.33", r"x=\frac{10}{3}=3.33"),
    (r"\frac{10}{3}", r"x=\frac{10}{3} \approx 3.33"),
    ("x=1, y=2", "y=2, x=1"),
    ("f(x)=x^2", "f(t)=t^2"),
    (r"(-\infty, 5]", r"x \in (-\infty, 5]"),
    (r"x \ge 5", r"[5, \infty)"),
    (r"1+\frac{1}{\mathrm{e}}", "1+e^{-1}"),
    (r"\frac{1}{21000}x", r"\frac{1}{21,000}x"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix} 1 \\ 2 \end{bmatrix}"),
    (r"\text{Clara}, 5", "Clara, 5"),
    (r"\varnothing", r"\emptyset"),
    ("1000", r"1\,000"),
    ("1000", "1e3"),
    ("2516_8", "2516_8"),
    (r"1-\frac1e", "1-e^{-1}"),
]
DIFFERENT = [
    (r"1-\frac{1}{\mathrm{e}}", r"1+\frac{1}{\mathrm{e}}"),
    ("1-1/e", "1+1/e"),
    (r"\frac{1}{\text{total}}", r"\frac{1}{\text{count}}"),
    ("4", r"4\sqrt(2)"),
    ("7", "y=6=7"),
    ("6", "y=6=7"),
    ("y=7", "y=6=7"),
    ("7", "x=3+3=7"),
    ("Clara, 5", "Carla, 5"),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    ("10^{-30}", "2 - 2"),
    (r"1, 2, \ldots, n", r"1, 3, 5, \ldots, 2n-1"),
    ("1, 2, 3", r"1, 2, 3, \ldots"),
    ("2+3c", "2+3d"),
    ("3", "3t"),
    ("x", "|x|"),
    ("3x-y+13=0", "3x+4y+14=0"),
    (r"\sqrt{18}", "4.24"),
    (r"\pi", "3.14"),
    ("(3,4)", "(4,3)"),
    ("[0,1)", "(0,1)"),
    ("3", r"3 \text{ or } 5"),
    ("x", "5"),
    ("even", "neve"),
    ("2516_8", "2516_{10}"),
    ("2516_8", "2516_7"),
    (r"\varnothing", "0"),
]


def test_algebra_and_its_guards(grader):
    outcomes = grader.grade(boxed(*EQUAL, *DIFFERENT))
    expected = ["correct"] * len(EQUAL) + ["wrong"] * len(DIFFERENT)
    rows = zip(outcomes, expected, EQUAL + DIFFERENT, strict=True)
    assert [(o, pair) for o, e, pair in rows if o != e] == []


def test_what_is_no_formula_is_unparsed(grader):
    assert grader.grade(boxed(("5", r"\forall x>0: \&"), ("5", r"\frac{"))) == ["unparsed"] * 2
    assert grader.grade([("I do not know", "5"), (r"\boxed{5", "5")]) == ["unparsed"] * 2


def test_hedging_is_wrong(grader):
    texts = ["I think 41 or 42", "41, 42", r"\boxed{41} or \boxed{42}", r"\boxed{41, 42}", "maybe 42 and 41"]
    assert grader.grade([(t, "42") for t in texts]) == ["wrong"] * len(texts)


def test_a_reference_that_cannot_be_parsed_matches_itself_only(grader):
    gold = r"\forall x>0: \& f"
    assert grader.grade(boxed((gold, gold), (gold, "5"), (gold, "x+1"))) == ["correct", "wrong", "wrong"]


HOSTILE = [
    r"\boxed{9**9**9}",
    r"\boxed{9^{9^{9^{9}}}}",
    r"\boxed{1000000000!}",
    r"\boxed{" * 100_000 + "5",
    r"\boxed{" + "(" * 1000 + "5" + ")" * 1000 + "}",
    r"\boxed{" + "1 " * 500_000,
    r"\boxed{" + "9" * 1_000_000 + "}",
    "(" * 1_000_000,
    "$" * 1_000_000,
    "\\[" * 500_000,
    "answer is " * 100_000,
    "#### " * 200_000,
    "1," * 500_000,
    "1 or " * 200_000,
    "\\boxed" * 170_000,
    r"\boxed{x} and " * 70_000,
    "</think>" * 100_000,
    r"\boxed{" + r"\frac{" * 60 + "x" + "}{2}" * 60 + "}",
    r"\boxed{\text{" + "a " * 900 + "}}",
    r"\boxed{" + "-" * 1900 + "5}",
    r"\boxed{" + "^" * 1900 + "}",
    r"\boxed{" + r"\sqrt(" * 300 + "}",
    r"\boxed{1" + ",000" * 450 + "x}",
    r"\boxed{__import__('os').system('false')}",
    "\x00\ud800\u202e\\boxed{\x00}",
]


def test_hostile_texts_are_dealt_with_without_algebra_or_quickly(grader):
    outcomes = grader.grade([(text, "5") for text in HOSTILE])
    assert [
        (o, t[:40]) for o, t in zip(outcomes, HOSTILE, strict=True) if o not in ("wrong", "unparsed")
    ] == []


def test_nested_boxes_are_one_box(grader):
    assert grader.grade([(r"\boxed{" * 20_000 + "5" + "}" * 20_000, "5")]) == ["correct"]


def test_answers_that_never_end_time_out_and_do_not_stop_the_others():
    slow = [rf"\boxed{{\binom{{10^9}}{{5 \cdot 10^8}} + {i}}}" for i in range(100)]
    with Grader(workers=2, timeout=1.0) as g:
        assert g.grade([(s, "5") for s in slow[:3]]) == ["timeout"] * 3
        g._pool.timeout = LONG
        assert g.grade([(r"\boxed{x+1}", "1+x")]) == ["correct"]
        g._pool.timeout, g.batch_timeout = 1.0, 2.0
        pairs = [*((s, "5") for s in slow), (r"\boxed{5}", "5")]
        assert g.grade(pairs) == ["timeout"] * 100 + ["correct"]


def test_memory_bombs_end_the_worker_at_most(tmp_path):
    with Grader(workers=1, timeout=LONG, memory_mb=300) as g:
        outcomes = g.grade([(r"\boxed{(x+y+z+w)^{600} \cdot (a+b)^{900} - 1}", "a"), (r"\boxed{x+1}", "1+x")])
    assert outcomes[0] in ("wrong", "unparsed", "crashed") and outcomes[1] == "correct"


def test_equal_questions_are_asked_once(grader, monkeypatch):
    asked = []
    real = grader._pool.map
    monkeypatch.setattr(grader._pool, "map", lambda jobs, within: asked.extend(jobs) or real(jobs, within))
    pairs = boxed(("x+1", "1+x")) * 5 + boxed(("x+1", "x+2")) * 3 + boxed(("5", "5"))
    assert grader.grade(pairs) == ["correct"] * 5 + ["wrong"] * 3 + ["correct"]
    assert len(asked) == 2


def test_a_marker_can_be_required():
    with Grader(need_marker=True) as g:
        assert g.grade([("it is 5", "5"), ("The answer is 5", "5")]) == ["unparsed", "correct"]


def test_numbers_need_no_process():
    with Grader() as g:
        pairs = [(f"#### {i}", str(i + i % 2)) for i in range(500)]
        assert g.grade(pairs) == ["correct", "wrong"] * 250
        assert all(member.process is None for member in g._pool._members)


def test_from_a_thread(grader):
    out = []
    thread = threading.Thread(target=lambda: out.extend(grader.grade(boxed(("x+2", "2+x")))))
    thread.start()
    thread.join()
    assert out == ["correct"]


def test_nothing_of_the_algebra_system_is_imported_in_the_caller():
    code = (
        "import sys\nfrom jaxrl.tasks.grader import Grader\n"
        r"with Grader() as g: print(g.grade([(r'\boxed{x+1}', '1+x')]))" + "\n"
        "print(sorted({'sympy', 'math_verify', 'jax', 'latex2sympy2_extended'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "['correct']\n[]\n"


def test_no_accelerator_library_in_the_worker():
    code = (
        "import sys\nfrom jaxrl.tasks.grader_worker import compare\nassert compare('x+1', '1+x') == 'correct'\n"
        "print(sorted({'jax', 'torch', 'numpy', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_version_and_outcomes_are_fixed():
    assert GRADER_VERSION == "6"
    assert OUTCOMES == ("correct", "wrong", "unparsed", "timeout", "crashed")
