"""Every Python block of the README and of docs/ runs, top to bottom of its file, in a namespace of its own; every shell
command there names modules, files, flags and config keys that exist."""

import importlib
import importlib.util
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import pytest

from jaxrl.errors import UserError
from jaxrl.runtime.cli import parse_flags
from jaxrl.runtime.config import SETTINGS, base_config, get, parse_config, validate

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL_PAGES = [*PAGES, ROOT / "tpu_scripts" / "README.md"]
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
    for path in re.findall(r"`((?:jaxrl|models|configs|tests|docs|benchmarks|launchers|tpu_scripts)/[\w/.]+\.(?:py|md|sh))`", text):  # noqa: E501
        if path != "configs/longer.py":  # the reader's own, in docs/extending.md
            assert (ROOT / path).exists(), f"{page.name} names {path}"


# ---- shell commands: they are not run here, but every module, file, flag, config key and extra in them must exist

COMMAND = re.compile(r"(?:^|[`\s])((?:python3? (?:-m [a-z]|[a-z]\w*/)|pip install |tpu_scripts/\w+\.sh)[^`\n]*)")


def commands_of(text: str) -> list[str]:
    """Command lines of a Markdown text, in blocks and in running text, one command each, comments cut off."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    found = [m.group(1) for line in lines for part in line.split("&&") for m in COMMAND.finditer(part)]
    return [re.split(r"\s#|\s*\|", command)[0].strip() for command in found]


def check_command(command: str) -> None:
    """Raises for a command that would fail for a name that does not exist. Upper-case words stand for the reader's."""
    words = shlex.split(command)
    if words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[(\w+)\]", command)
        setup = (ROOT / "setup.py").read_text()
        assert all(f'"{extra}": [' in setup for extra in extras), f"no such extra: {extras}"
        return
    flags = [w for w in words if w.startswith("--")]
    if words[:2] == ["python", "-m"] and words[2].startswith("jaxrl."):
        module = importlib.import_module(words[2])
        argv = words[2:]
        if any(".py" in w for w in flags if w.startswith("--config=")) and words[2] != "jaxrl.study":
            if "configs/longer.py" in command or "FILE" in command:  # the reader's own
                return
            config = parse_config([w for w in argv if not w.startswith("--topology")])
            config.model.path = ""  # where the reader's model is
            config.model.shape.hidden_size = 8
            validate(config)
        elif "FILE" not in command:
            known = getattr(module, "FLAGS", getattr(module, "DEFAULTS", {"out": ""}))
            parse_flags(argv, {k: v for k, v in known.items()}, "")
        return
    if words[0].startswith("python") and words[1] == "-m":
        assert importlib.util.find_spec(words[2]), words[2]
        return
    script = ROOT / (words[1] if words[0].startswith("python") else words[0])
    assert script.is_file(), script
    source = "".join(file.read_text() for file in {script, *script.parent.glob("common.sh")})
    for flag in flags:
        name = flag[2:].partition("=")[0]
        assert name.startswith("config.") or name in source, f"{script.name} knows no --{name}"


@pytest.mark.parametrize("page", SHELL_PAGES, ids=lambda page: page.name)
def test_commands_name_what_exists(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = commands_of(page.read_text(encoding="utf-8"))
    for command in commands:
        try:
            check_command(command)
        except Exception as e:
            raise AssertionError(f"{page.name}: {command}\n{e}") from e
    assert commands or page.name not in ("README.md", "evaluation.md")


@pytest.mark.parametrize("page", SHELL_PAGES, ids=lambda page: page.name)
def test_config_keys_in_the_pages_exist(page):
    config = base_config()
    for key in re.findall(r"config\.((?:\w+\.)*\w+)", FENCE.sub("", page.read_text(encoding="utf-8"))):
        if "NAME" in key or "tempered" in key or key in ("KEY", "py", "json", "md"):  # placeholders, an example, files
            continue
        get(config, key)


def test_wrong_commands_are_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = "```bash\npip install -e . && python -m jaxrl.train --config=FILE \\\n  --config.seed=1  # x\n```"
    assert commands_of(text) == ["pip install -e .", "python -m jaxrl.train --config=FILE --config.seed=1"]
    for wrong in (
        "python -m jaxrl.train --config=configs/quickstart.py --config.nothing=1",
        "python -m jaxrl.train --config=configs/nowhere.py",
        "python -m jaxrl.train --config=configs/quickstart.py --config.algorithm.loss=nothing",
        "python -m jaxrl.evaluate --model=DIR --data=dial --out=x --wrong=1",
        "python -m jaxrl.nothing --x=1",
        "pip install -e '.[nothing]'",
        "python benchmarks/nothing.py",
        "python benchmarks/sampler.py --nothing=1",
    ):
        with pytest.raises((AssertionError, UserError, ImportError)):
            check_command(wrong)


def test_the_page_of_settings_is_up_to_date():
    written = runpy.run_path(str(ROOT / "docs" / "settings.py"))
    assert written["FILE"].read_text(encoding="utf-8") == written["page"](), "python docs/settings.py"
    assert all(meaning for _, meaning in SETTINGS.values())


def test_the_picture_of_the_code_is_up_to_date():
    drawn = runpy.run_path(str(ROOT / "docs" / "architecture.py"))
    file = ROOT / "docs" / "images" / "architecture.svg"
    assert file.read_text(encoding="utf-8") == drawn["draw"](), "python docs/architecture.py"
    assert drawn["arrows"]({("commands", "step"), ("step", "tasks"), ("commands", "tasks"), ("tasks", "step")}) == {
        ("commands", "step"), ("step", "tasks"), ("tasks", "step"),
    }  # fmt: skip
    edges = drawn["imports"]()
    assert not any(a in ("models", "algorithms") for a, _ in edges)  # they know nothing of the rest
