"""Summaries against an independent computation, and the properties that make an evaluation repeatable."""

import itertools
import types

import numpy as np
import pytest

from jaxrl.evaluation.scoring import evaluate_problems, sample_counts, summarize
from jaxrl.tasks.task import Grade
from jaxrl.types import Completion, Problem


def record(corrects, tokens=None, votes=None, valid=None, finish=None, outcome=None):
    n = len(corrects)
    tokens, votes, valid = tokens or [5] * n, votes or [None] * n, valid or [True] * n
    finish, outcome = finish or ["eos"] * n, outcome or ["correct" if c else "wrong" for c in corrects]
    samples = [
        dict(text="", tokens=t, finish=f, outcome=o, correct=float(c), valid=v, vote=vote)
        for c, t, vote, v, f, o in zip(corrects, tokens, votes, valid, finish, outcome, strict=True)
    ]
    return {"id": "x", "answer": "1", "budget": None, "mode": "none", "prompt_tokens": 3, "samples": samples}


def brute_pass(corrects, k):
    return np.mean([any(s) for s in itertools.combinations(corrects, k)])


def brute_majority(votes, corrects, k):
    scores = []
    for subset in itertools.combinations(range(len(votes)), k):
        counts = {}
        for i in subset:
            if votes[i] is not None:
                counts.setdefault(votes[i], []).append(corrects[i])
        best = max((len(v) for v in counts.values()), default=0)
        winners = [v[0] for v in counts.values() if len(v) == best]
        scores.append(np.mean(winners) if winners else 0.0)
    return np.mean(scores)


def test_accuracy_pass_and_majority_by_enumeration():
    rng = np.random.default_rng(0)
    groups = []
    for _ in range(7):
        corrects = rng.integers(0, 2, 4).tolist()
        votes = ["correct" if c else rng.choice(["= 1", "= 2", None]) for c in corrects]
        groups.append((corrects, votes))
    out = summarize([record(c, votes=v) for c, v in groups])
    assert out["accuracy"] == pytest.approx(np.mean([np.mean(c) for c, _ in groups]))
    for k in (2, 4):
        assert out[f"pass@{k}"] == pytest.approx(np.mean([brute_pass(c, k) for c, _ in groups]))
        assert out[f"maj@{k}"] == pytest.approx(np.mean([brute_majority(v, c, k) for c, v in groups]))
    assert out["accuracy_low"] < out["accuracy"] < out["accuracy_high"]
    assert (out["problems"], out["samples"]) == (7, 4)


def test_interval_of_single_samples_is_wilsons():
    out = summarize([record([c]) for c in [1] * 30 + [0] * 70])
    z, p, n = 1.959963985, 0.3, 100  # roots of (p - x)^2 = z^2 x (1 - x) / n
    roots = np.roots([1 + z**2 / n, -(2 * p + z**2 / n), p**2])
    assert sorted(roots) == pytest.approx([out["accuracy_low"], out["accuracy_high"]], abs=1e-6)
    assert "pass@2" not in out and "maj@2" not in out


def test_no_certainty_from_unanimous_problems():
    out = summarize([record([0, 0])] * 10)
    assert out["accuracy"] == 0 and 0.2 < out["accuracy_high"] < 0.35  # a bootstrap would say 0


def test_ungraded_samples_are_masked_not_wrong():
    rows = [
        record([1, 0, 1], valid=[True, False, True], outcome=["correct", "timeout", "correct"]),
        record([0, 0, 0]),
    ]
    rows.append(record([0, 0, 0], valid=[False] * 3, outcome=["crashed"] * 3))
    out = summarize(rows)
    assert out["accuracy"] == pytest.approx(0.5)  # (2/2 + 0/3) / 2: the third problem has no graded sample
    assert out["ungraded"] == pytest.approx(4 / 9)
    assert out["pass@3"] == 0.0  # only the second problem has three


def test_lengths_and_fractions():
    rows = [record([1, 0], tokens=[2, 9], finish=["eos", "length"], outcome=["correct", "unparsed"])]
    rows.append(record([0, 0], tokens=[4, 5], finish=["no room", "eos"]))
    out = summarize(rows)
    expected = dict(mean_tokens=5.0, median_tokens=4.5, truncated=0.5, unparsed=0.25, ungraded=0.0)
    assert {k: out[k] for k in expected} == expected
    assert summarize([]) == {}


def test_sample_counts():
    assert [sample_counts(n) for n in (1, 2, 6, 16)] == [[], [2], [2, 4, 6], [2, 4, 8, 16]]


class FakeSampler:
    """Writes tokens made of the request's key and sample index, one per allowed token up to three."""

    max_prompt, max_tokens = 6, 10
    config = types.SimpleNamespace(max_position_embeddings=8)

    def generate(self, params, requests, *, seed, step, sampling):
        self.requests = requests
        return [
            [
                Completion(
                    np.full(min(3, r.max_tokens), (r.key + i) % 5, np.int32), np.zeros(1, np.float32), "eos"
                )
                for i in range(r.samples)
            ]
            for r in requests
        ]


TOKENIZER = types.SimpleNamespace(decode=lambda ids: "".join(map(str, ids)))


def grade(problems, texts):
    rights = [float(t[:1] == p.answer) for p, t in zip(problems, texts, strict=True)]
    return [Grade(r, r, True, "correct" if r else "wrong") for r in rights]


def run(problems, prompts, **options):
    sampler = FakeSampler()
    records = evaluate_problems(sampler, None, TOKENIZER, problems, prompts, grade=grade, **options)
    return sampler, records, summarize(records)


def test_records_are_graded_in_order_and_votes_of_correct_samples_agree():
    problems = [Problem(f"p{i}", "q", str(i % 5)) for i in range(9)]
    _, records, summary = run(problems, [[1, 2]] * 9, samples=5, vote=lambda p, text: text[-1])
    assert [r["id"] for r in records] == [p.id for p in problems]
    for problem, r in zip(problems, records, strict=True):
        assert [s["text"][0] for s in r["samples"]] != [problem.answer] * 5
        assert sum(s["correct"] for s in r["samples"]) == 1  # five residues, one of them right
        for s in r["samples"]:
            assert s["correct"] == float(s["text"][0] == problem.answer)
            assert s["vote"] == ("correct" if s["correct"] else f"= {s['text'][-1]}")
    assert summary["accuracy"] == pytest.approx(0.2) and summary["pass@5"] == 1.0


def test_completions_do_not_depend_on_the_company():
    problems = [Problem(f"p{i}", "q", "1") for i in range(6)]
    sampler, together, _ = run(problems, [[1]] * 6, samples=2)
    assert len({r.key for r in sampler.requests}) == 6
    _, alone, _ = run(problems[4:5], [[1]], samples=2)
    assert together[4] == alone[0]


def test_prompts_near_the_end_of_the_context():
    problems = [Problem(f"p{i}", "q", "1") for i in range(4)]
    prompts = [[1] * n for n in (2, 6, 7, 9)]  # context 8; the sampler takes prompts of up to 6
    sampler, records, summary = run(problems, prompts, samples=2, max_tokens=4)
    assert [r.max_tokens for r in sampler.requests] == [4, 2]
    assert [r["samples"][0]["finish"] for r in records] == ["eos", "eos", "no room", "no room"]
    assert summary["problems"] == 4 and summary["truncated"] == 0.5
