"""The embedded dial task: notation, answers, split, grading, demonstrations."""

import re

import numpy as np
import pytest

from jaxrl.errors import UserError
from jaxrl.tasks import dial
from jaxrl.types import Problem


def tokens(text: str) -> list[str]:
    """Splits text into pieces; fails if it is not made of pieces or could be split in two ways."""
    out = []
    while text:
        hits = [p for p in dial.PIECES if text.startswith(p)]
        assert len(hits) == 1, (text, hits)
        out.append(hits[0])
        text = text[len(hits[0]) :]
    return out


def simulate(prompt: str) -> list[int]:
    """Independent of the module: np.clip over numbers found by a regular expression."""
    start, *steps = (int(x) for x in re.findall(r"[+-]?\d", prompt))
    values = [start]
    for step in steps:
        values.append(int(np.clip(values[-1] + step, 0, 9)))
    return values


def test_pieces_are_distinct_and_prefix_free():
    assert len(set(dial.PIECES)) == len(dial.PIECES)
    assert not [(a, b) for a in dial.PIECES for b in dial.PIECES if a != b and b.startswith(a)]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_problems(split):
    drawn = dial.problems(split, 3, 300, mode="exact")
    assert len({p.id for p in drawn}) == 300
    seen = set()
    for p in drawn:
        values = simulate(p.prompt)
        n = p.info["n"]
        seen.add(n)
        assert len(values) == n and p.answer == str(values[-1]) and p.task == "dial"
        assert dial.is_held_out(p.prompt) == (split == "heldout")
        assert 2 * n + 1 <= p.budget <= 22
        # one token per operand, one for the question mark, one for the budget
        assert len(tokens(dial.prompt_text(p))) == n + 2
    assert seen == set(range(2, 9))
    assert min(p.budget - 2 * p.info["n"] for p in drawn) == 1 and max(p.budget for p in drawn) == 22


def test_problems_are_a_function_of_split_seed_and_index():
    few, many = dial.problems("train", 1, 5), dial.problems("train", 1, 9)
    assert few == many[:5]
    assert dial.problems("train", 2, 5) != few
    trained, held_out = ({p.prompt for p in dial.problems(s, 0, 400)} for s in ("train", "heldout"))
    assert not trained & held_out


def test_about_a_tenth_of_the_prompts_is_held_out():
    rng = np.random.default_rng(0)
    prompts = {f"dial {a}: a{b:+d} b{c:+d} ?" for a, b, c in rng.integers(1, 7, (4000, 3))}
    share = np.mean([dial.is_held_out(p) for p in prompts])
    assert 0.04 < share < 0.18
    short = [f"dial {s}: a{step:+d} ?" for s in range(10) for step in range(-6, 7) if step]
    assert sum(map(dial.is_held_out, short)) == 13  # the split must not move between versions


def test_harder_variant_fits_the_vocabulary():
    drawn = dial.problems("train", 0, 50, n_min=12, n_max=12, mode="max", max_budget=32)
    assert {p.info["n"] for p in drawn} == {12}
    assert all(len(tokens(dial.prompt_text(p))) == 14 for p in drawn)
    assert dial.prompt_text(drawn[0]).startswith(f"[max {drawn[0].budget} tokens] dial ")


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        (" a=9 b=3 c=0 => 0.", "correct"),
        (" => 0.", "correct"),
        (" => 0", "correct"),
        (" .. .. => 0.", "correct"),
        (" => 1.", "wrong"),
        (" => 1 => 0.", "wrong"),
        (" => 0 => 0.", "wrong"),
        (" => 0 ..", "unparsed"),
        (" => 0. .", "unparsed"),
        (" a=9", "unparsed"),
        (" => ", "unparsed"),
        ("", "unparsed"),
        (" => 00.", "unparsed"),
        (" => 0.\n", "unparsed"),
    ],
)
def test_grade(text, outcome):
    assert dial.grade(Problem("x", "dial 7: a+5 b-6 c-4 ?", "0", "dial"), text) == outcome


def test_full_demonstrations_are_right():
    lengths = []
    for prompt, completion in dial.demonstrations("full", 0, 300):
        bare = prompt.split("] ")[-1]
        assert not dial.is_held_out(bare)
        values = simulate(bare)
        assert [int(x) for x in re.findall(r"=(\d)", completion)] == values[1:]
        assert completion.endswith(f" => {values[-1]}")
        lengths.append(len(tokens(completion + dial.END)))
        assert lengths[-1] >= 2 * len(values) + 1
        if "[" not in prompt:
            assert lengths[-1] == 2 * len(values) + 1
    assert max(lengths) <= 24


def test_sloppy_demonstrations_have_the_recipe_s_shares():
    rows = list(dial.demonstrations("sloppy", 1, 4000))
    plain = [(p, c) for p, c in rows if not p.startswith("[")]
    assert abs(len(plain) / len(rows) - 0.5) < 0.03
    long = [(p, c) for p, c in plain if len(simulate(p)) >= 6]  # where skipping all turns by chance is rare
    direct = np.mean([c.count("=") == 1 for _, c in long])
    full = np.mean([c.count("=") == len(simulate(p)) for p, c in long])
    assert abs(direct - 0.56) < 0.04 and abs(full - 0.11) < 0.03
    assert abs(np.mean([".." in c for _, c in plain]) - 0.2) < 0.03
    written = wrong = 0
    for p, c in rows:
        values = dict(zip(dial.LABELS, simulate(p.split("] ")[-1])[1:], strict=False))
        shown = re.findall(r"([a-k])=(\d)", c)
        if shown:
            written += 1
            wrong += values[shown[0][0]] != int(shown[0][1])
        assert len(tokens(c + dial.END)) <= 24
    assert abs(wrong / written - 0.05) < 0.02


def test_budgets_are_obeyed_sloppily():
    rows = list(dial.demonstrations("sloppy", 2, 3000, modes=("exact", "max")))
    rows = [(p, c) for p, c in rows if p.startswith("[")]
    assert {p.startswith("[max") for p, _ in rows} == {True, False}
    budgets = np.array([int(re.search(r"\d+", p)[0]) for p, _ in rows])
    lengths = np.array([len(tokens(c + dial.END)) for _, c in rows])
    assert 0.3 < np.corrcoef(budgets, lengths)[0, 1] < 0.85
    assert budgets.min() == 4 and budgets.max() == 22
    assert not any(p.startswith("[") for p, _ in dial.demonstrations("full", 0, 50, modes=()))


def test_a_share_of_the_budgets_is_ignored():
    longer = []
    for prompt, completion in dial.demonstrations("full", 3, 3000):
        if prompt.startswith("["):
            budget, bare = int(prompt[1:].split()[0]), prompt.split("] ")[1]
            natural = 2 * len(simulate(bare)) + 1
            if budget > 2 * natural + 1:  # where obeying, however sloppily, takes fillers
                longer.append(len(tokens(completion + dial.END)) > natural)
    assert len(longer) > 200 and abs(np.mean(longer) - 0.7) < 0.07


@pytest.mark.parametrize(
    "call",
    [
        lambda: dial.problems("test", 0, 1),
        lambda: dial.problems("train", 0, 1, n_max=13),
        lambda: dial.problems("train", 0, 1, n_min=1),
        lambda: dial.problems("train", 0, 1, n_min=5, n_max=4),
        lambda: dial.problems("train", 0, 1, n_min=12, n_max=12, mode="exact"),
        lambda: dial.problems("train", 0, 1, mode="about"),
        lambda: dial.problems("train", 0, 99, mode="exact", max_budget=40),
        lambda: list(dial.demonstrations("half", 0, 1)),
        lambda: list(dial.demonstrations("full", 0, 1, n_max=12)),
        lambda: dial.solve("dial 7: a+9 ?"),
    ],
)
def test_bad_arguments_are_user_errors(call):
    with pytest.raises(UserError, match="dial: "):
        call()
