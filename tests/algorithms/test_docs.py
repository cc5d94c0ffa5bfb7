"""docs/algorithms.md names every method and states its true default constants."""

import pathlib
import re

import pytest

from jaxrl.algorithms.advantages import ADVANTAGES
from jaxrl.algorithms.correction import CORRECTIONS
from jaxrl.algorithms.length import LENGTH_REWARDS
from jaxrl.algorithms.losses import LOSSES
from jaxrl.algorithms.selection import SELECTIONS

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "algorithms.md").read_text()
SECTIONS = {
    "## Policy losses": LOSSES,
    "### Correction of sampler and learner mismatch": CORRECTIONS,
    "## Advantages": ADVANTAGES,
    "## Selection": SELECTIONS,
    "## Length control": LENGTH_REWARDS,
}


def _section(title):
    level = title.split(" ", 1)[0]
    body = PAGE.split(f"\n{title}\n", 1)[1]
    return re.split(rf"\n#{{2,{len(level)}}} ", body)[0]


@pytest.mark.parametrize("title", SECTIONS)
def test_every_method_is_listed_with_its_constants(title):
    body, table, listed = _section(title), SECTIONS[title], set()
    for row in (line for line in body.splitlines() if line.startswith("| `")):
        names = [n for n in re.findall(r"`(\w+)`", row.split("|")[1]) if n in table]
        listed |= set(names)
        stated = dict(re.findall(r"(\w+)=([\w.+-]+)", row.rsplit("|", 3)[-2] + row.rsplit("|", 3)[-3]))
        for name in names:
            for key, value in stated.items():
                default = table[name].defaults[key]
                assert str(default) == value or float(default) == float(value), f"{name}: {key}"
    assert listed == set(table)
    for name, entry in table.items():
        for key in entry.defaults:
            assert re.search(rf"\b{key}\b", body), f"{title}: {name}'s {key} is not mentioned"


def test_the_page_on_length_has_every_length_reward():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "length.md").read_text()
    rows = [line.split("|")[1].strip() for line in page.split("\n## ")[1].splitlines() if line.startswith("| `")]
    assert rows == [f"`{name}`" for name in LENGTH_REWARDS]


def test_losses_state_their_aggregation_and_maspo_its_constants():
    body = _section("## Policy losses")
    for name, entry in LOSSES.items():
        row = next(line for line in body.splitlines() if line.startswith(f"| `{name}` "))
        assert row.rsplit("|", 2)[1].strip() == entry.aggregation, name
    paragraph = re.search(r"\*\*MASPO\.\*\*(.*?)\n\n", body, re.S)[1]
    stated = dict(re.findall(r"(\w+)=([\w.]+)", paragraph))
    assert {k: str(v) if isinstance(v, bool) else float(v) for k, v in LOSSES["maspo"].defaults.items()} == {
        k: v if v in ("True", "False") else float(v)
        for k, v in stated.items()
        if k in LOSSES["maspo"].defaults
    }


def test_the_code_on_the_page_runs():
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/algorithms.md", "exec"), {})
