"""`python -m jaxrl.generate`: streamed text of a trained model, and one-line errors."""

import json

import pytest

from jaxrl import generate
from jaxrl.errors import UserError
from jaxrl.rollout.paged import PagedCache
from tests.shared import shared_path


@pytest.fixture
def cache_left_alone(monkeypatch):
    monkeypatch.setattr("jaxrl.runtime.cli.use_compilation_cache", lambda: None)


def test_streams_the_published_text(capsys, cache_left_alone):
    root = shared_path("data", "models", "stories260K")
    text = json.loads((root / "reference.json").read_text())["text"].strip()
    start = "Once upon a time, there was a little girl"
    flags = ["--temperature=0", "--max_new_tokens=60", "--samples=2"]
    assert generate.main(["generate", f"--model={root}", *flags, start]) == 0
    out = capsys.readouterr()
    first, second = out.out.split("\n" + "-" * 40 + "\n")
    assert text.startswith(start + first) and len(first) > 100 and first == second
    assert "60 tokens, length" in out.err


def test_pages_are_honoured_and_give_the_same_text(capsys, cache_left_alone, monkeypatch):
    model, made = f"--model={shared_path('data', 'models', 'stories260K')}", []
    begin = PagedCache.__init__
    monkeypatch.setattr(PagedCache, "__init__", lambda self, *a, **k: made.append(k) or begin(self, *a, **k))
    texts = []
    for pages in ("--pages=-1", "--pages=16"):
        assert generate.main(["generate", model, pages, "--max_new_tokens=40", "Once upon a time"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and [sizes["page"] for sizes in made] == [16]


def test_log_probs_of_the_prompt(capsys, cache_left_alone):
    model = f"--model={shared_path('data', 'models', 'stories260K')}"
    assert generate.main(["generate", model, "--prompt_logprobs", "--max_new_tokens=1", "Once upon a time"]) == 0
    *lines, total, _, _ = capsys.readouterr().err.splitlines()
    values = [float(line.split()[0]) for line in lines]
    assert "time" in lines[-1] and f"log-prob {sum(values):.1f}]" in total and f"prompt of {len(lines) + 1}" in total
    assert max(values) <= 0 and sum(values) > -10  # the most frequent opening of the stories it was trained on


@pytest.mark.parametrize(
    "args, match",
    [
        ([], "one prompt"),
        (["a", "b"], "one prompt"),
        (["--top_p=0", "a"], "--top_p='0'"),
        (["--dtype=int3", "a"], "--dtype"),
        (["--max_new_tokens=0", "a"], "--max_new_tokens='0'"),
        (["--chat=flase", "a"], "--chat='flase': must be True or False"),
        (["--temperature=nan", "a"], "--temperature='nan'"),
        (["a"], "no such directory"),
    ],
)
def test_errors_are_one_line(args, match, cache_left_alone):
    with pytest.raises(UserError, match=match) as e:
        generate.main(["generate", "--model=/nonexistent/model", *args])
    assert "\n" not in str(e.value)
