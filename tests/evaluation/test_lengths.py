"""Length control against the definitions written out by hand."""

import math
import re

import numpy as np
import pytest

from jaxrl.errors import UserError
from jaxrl.evaluation import lengths
from jaxrl.evaluation.benchmarks import text_delimiters
from jaxrl.evaluation.lengths import (
    generation_cap,
    length_metrics,
    length_profile,
    log_linear_slope,
    sweep_metrics,
)
from jaxrl.rollout.budget_forcing import Delimiters, Forced


def records(*rows):
    return [{"budget": b, "samples": [{"tokens": n} for n in lengths]} for b, lengths in rows]


def test_length_metrics_by_hand():
    out = length_metrics(records((10, [10, 12]), (20, [10]), (None, [999])), tolerance=1)
    deviations = [0.0, 0.2, -0.5]
    assert out["mean_error"] == pytest.approx(-0.1)
    assert out["mean_deviation"] == pytest.approx(0.7 / 3)
    assert out["rmse"] == pytest.approx(math.sqrt(sum(d * d for d in deviations) / 3))
    assert out["hard_violation"] == pytest.approx(1 / 3)
    assert out["soft_violation"] == pytest.approx(1 / 3)
    assert length_metrics(records((10, [12])), tolerance=2)["soft_violation"] == 0
    assert length_metrics(records((None, [3]))) == {}


def test_caps_are_l1s():
    cases = [(512, "exact"), (512, "max"), (512, "max", 9), (512, "none"), (512, "forced"), (512, "forced", 9)]
    assert [generation_cap(*case) for case in cases] == [1024, 8192, 9, 8192, 512, 512]


def test_a_forced_budget_covers_the_whole_response(monkeypatch):
    seen = []

    def fake(sampler, params, requests, delimiters, **options):
        seen.append(options)
        forced = Forced(np.arange(5), np.zeros(5, np.float32), "eos", thinking=3, waits=1, cut=True)
        return [[forced] for _ in requests]

    monkeypatch.setattr(lengths, "generate_forced", fake)
    d = Delimiters((1, 2), (3, 4, 5), newline=(6,))
    generate = lengths.forced_generate(None, 30, d, answer_tokens=10, waits=2)
    (out,), _ = generate("params", ["a", "b"], seed=1, step=2, sampling=None)
    # 30 tokens less newline (1), end of thinking (2), "final answer" (3) and the answer (10)
    assert seen[0] == dict(max_thinking=14, max_answer=10, ignore=2, seed=1, step=2, sampling=None)
    assert (out.tokens.tolist(), out.finish, out.length) == ([0, 1, 2, 3, 4], "eos", 5)
    with pytest.raises(UserError, match="needs more than 16 tokens"):
        lengths.forced_generate(None, 16, d, answer_tokens=10, waits=0)


def test_log_linear_slope_recovers_a_line():
    tokens = np.array([512, 1024, 2048, 3600])
    assert log_linear_slope(tokens, 0.1 + 0.24 * np.log(tokens)) == pytest.approx(0.24)
    noisy = [0.2, 0.35, 0.3, 0.5]
    assert log_linear_slope(tokens, noisy) == pytest.approx(np.polyfit(np.log(tokens), noisy, 1)[0])
    assert math.isnan(log_linear_slope([5, 5], [0.1, 0.2])) and math.isnan(log_linear_slope([5], [0.1]))


def test_sweep_metrics_are_s1s_three_and_l1s_error():
    rows = [
        dict(budget=100, mean_tokens=90, accuracy=0.2, mean_error=-0.1),
        dict(budget=200, mean_tokens=220, accuracy=0.5, mean_error=0.1),
        dict(budget=400, mean_tokens=400, accuracy=0.4, mean_error=0.0),
    ]
    out = sweep_metrics(rows)
    slopes = [0.3 / 130, 0.2 / 310, -0.1 / 180]
    assert out["scaling"] == pytest.approx(1000 * np.mean(slopes))
    assert out["control"] == pytest.approx(2 / 3)
    assert (out["performance"], out["mean_error"]) == (0.5, pytest.approx(0.2 / 3))


def test_length_profile_is_accuracy_by_parts_of_the_lengths():
    rng = np.random.default_rng(0)
    lengths, right = rng.integers(1, 60, 400), rng.integers(0, 2, 400)
    samples = [{"tokens": int(n), "correct": float(c), "valid": True} for n, c in zip(lengths, right, strict=True)]
    samples.append({"tokens": 1000, "correct": 0.0, "valid": False})  # not graded: in no part
    found = length_profile([{"samples": samples[:150]}, {"samples": samples[150:]}])
    assert found["tokens_correct"] == pytest.approx(lengths[right == 1].mean())
    low = 0
    for part in found["by_length"]:
        inside = (lengths > low) & (lengths <= part["up_to"])
        assert part["samples"] == inside.sum() and part["accuracy"] == pytest.approx(right[inside].mean())
        assert 0.15 < part["samples"] / 400 < 0.35
        low = part["up_to"]
    assert low == lengths.max() and sum(part["samples"] for part in found["by_length"]) == 400
    same = length_profile([{"samples": [{"tokens": 5, "correct": 1.0, "valid": True}] * 3}])
    assert same == {"tokens_correct": 5.0, "tokens_wrong": None,
                    "by_length": [{"up_to": 5, "accuracy": 1.0, "samples": 3}]}  # fmt: skip
    assert length_profile([]) == {}


class Characters:
    """A tokenizer of characters, and of pairs that it merges."""

    def __init__(self, merged):
        self.pattern = re.compile(f"{merged}|(?s:.)")

    def encode(self, text):
        return [sum(ord(c) << 8 * i for i, c in enumerate(token)) for token in self.pattern.findall(text)]


@pytest.mark.parametrize("merged, example", [(">\\n", r"'a</think>\n'"), (r"\.<", "'a.</think>'"), ("ab", None)])
def test_a_warning_where_the_end_of_thinking_is_not_always_the_same_tokens(merged, example, caplog):
    tokenizer = Characters(merged)
    for _ in range(2):
        assert text_delimiters(tokenizer, "</think>").end_thinking == tuple(map(ord, "</think>"))
    assert [r.getMessage().split("as in ")[1].split(":")[0] for r in caplog.records] == [example] * bool(example)
