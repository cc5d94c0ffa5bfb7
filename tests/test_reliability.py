"""docs/reliability.md promises only what a test keeps: every test that it names exists and is as slow as it says."""

import pathlib
import re

TESTS = pathlib.Path(__file__).parent
PAGE = (TESTS.parent / "docs/reliability.md").read_text()
NAMED = re.findall(r"`([\w/]+\.py)::(test_\w+)`( \(slow\))?", PAGE)


def test_every_named_test_exists():
    assert len(NAMED) > 40
    for file, name, slow in NAMED:
        text = (TESTS / file).read_text()
        found = re.search(rf"((?:^@.*\n(?:[ )\]}}].*\n)*)*)^def {name}\(", text, re.M)
        assert found, f"{file} has no {name}"
        whole = re.search(r"^pytestmark = pytest.mark.slow", text, re.M)
        marked = bool(whole or re.search(r"^@pytest.mark.slow", found.group(1), re.M))
        assert marked == bool(slow), f"{file}::{name}: marked slow is {marked}, the page says otherwise"


def test_every_row_of_a_promise_names_a_test():
    rows = [line for line in PAGE.split("## Exact resume")[1].split("## Figures")[0].splitlines()
            if line.startswith("| ") and not line.startswith("| promise")]
    assert rows and all("::test_" in row for row in rows)
