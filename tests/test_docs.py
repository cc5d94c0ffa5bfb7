"""Every Python block of the README and of docs/ runs, top to bottom of its file, in a namespace of its own."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^(\s*)```(\S*)[^\n]*\n(.*?)^\1```\s*$", re.S | re.M)


def code_of(text: str) -> str:
    """The Python blocks of a Markdown text, each at its own line number so that tracebacks point into the page."""
    out, line = [], 1
    for match in FENCE.finditer(text):
        indent, language, block = match.groups()
        if language != "python":
            continue
        start = text.count("\n", 0, match.start(3)) + 1
        lines = [row.removeprefix(indent) for row in block.splitlines(keepends=True)]
        out += ["\n" * (start - line), *lines]
        line = start + len(lines)
    return "".join(out)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path):
    code = code_of(page.read_text(encoding="utf-8"))
    if not code:
        pytest.skip(f"no Python block in {page.name}")
    # a process of its own: the pages add methods to the tables, which no other test should see
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nexec(compile({code!r}, {str(page)!r}, 'exec'), {{}})"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_blocks_are_found_with_their_line_numbers():
    text = "a\n```python\nx = 1\n```\n```bash\nrm\n```\n  ```python\n  y = x\n  raise KeyError\n  ```\n"
    code = code_of(text)
    assert code.splitlines()[2] == "x = 1" and code.splitlines()[9] == "raise KeyError" and "rm" not in code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_in_the_pages_exist(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for path in re.findall(r"`((?:jaxrl|models|configs|tests|docs|benchmarks|tpu_scripts)/[\w/.]+\.(?:py|md|sh))`", text):  # noqa: E501
        if path != "configs/longer.py":  # the reader's own, in docs/extending.md
            assert (ROOT / path).exists(), f"{page.name} names {path}"
