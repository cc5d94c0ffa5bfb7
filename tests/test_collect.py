"""The collector on a sampler and a task made of plain rules: no model, no device."""

import dataclasses
import json
import threading
import types

import numpy as np
import pytest

from jaxrl import collect
from jaxrl import rollouts as records
from jaxrl.algorithms.hyper import Method
from jaxrl.algorithms.length import LENGTH_REWARDS, LengthInputs
from jaxrl.algorithms.selection import SELECTIONS
from jaxrl.batch import make_batches, with_advantages
from jaxrl.collect import Collector
from jaxrl.errors import UserError
from jaxrl.rollout_metrics import sample_rows
from jaxrl.rollouts import Prompt, Rollouts
from jaxrl.runtime.config import base_config
from jaxrl.shaping import shape_rewards
from jaxrl.tasks.budgets import with_budget
from jaxrl.tasks.task import Grade, Task
from jaxrl.types import Completion, Problem
from tests.chaos import deterministic_view

WRONG, RIGHT, CRASH = 10, 11, 12  # the first token of a completion says how it will be graded
G, LIMIT = 4, 12


class Tokenizer:
    def decode(self, tokens, skip_special=True):
        return " ".join(map(str, tokens))

    def encode(self, text):
        return [int(t) for t in text.split()]


class RuleSampler:
    """Completion i of the problem at a position: rule(position, i) -> (first token, length). Remembers requests.

    Like the sampler it goes on where a request left off; a background request gets 0 to 3 tokens.
    """

    def __init__(self, rule):
        self.rule, self.requests, self.stats = rule, [], types.SimpleNamespace(slot_steps=0)

    def generate(self, params, requests, *, seed, step, sampling, background):
        self.requests.append(requests)
        out = []
        for index, r in enumerate(requests):
            behind = index >= len(requests) - background
            out.append([self.draw(r, r.first_sample + i, r.key % 4 if behind else None) for i in range(r.samples)])
        self.stats.slot_steps = 2 * sum(c.length for group in out for c in group)
        return out

    def draw(self, r, i, most):
        first, n = self.rule(r.key, i)
        end = min(r.done + r.max_tokens, r.done + (99 if most is None else most), n)
        whole = np.array([first] + [5] * (n - 1), np.int32), np.random.default_rng([r.key, i, n]).normal(size=n)
        finish = "eos" if end == n < LIMIT else "partial" if end < r.done + r.max_tokens else "length"
        assert r.done == 0 or r.prompt[-r.done :].tolist() == whole[0][: r.done].tolist()
        return Completion(whole[0][r.done : end], whole[1][r.done : end].astype(np.float32), finish)


def task_of(count):
    outcome = {WRONG: (0.0, "wrong"), RIGHT: (1.0, "correct"), CRASH: (0.0, "crashed")}

    def grade(problems, texts):
        rows = [outcome[int(t.split()[0])] for t in texts]
        return [Grade(correct, correct, name != "crashed", name) for correct, name in rows]

    problems = [Problem(f"p{i}", f"question {i}", str(i)) for i in range(count)]
    return Task(problems, [], lambda p: [1, 2, p.budget or 3], grade)


def mixed(position, i):
    return (RIGHT if i % 2 else WRONG), 2 + (position + i) % 5


def even_mixed(position, i):
    return mixed(position, i) if position % 2 == 0 else (RIGHT, 3)


def make(rule=mixed, changes=(), problems=50):
    c = base_config()
    c.batch.prompts, c.batch.group_size, c.sampling.max_tokens = 4, G, LIMIT
    c.algorithm.selection = "accuracy"
    c.update_from_flattened_dict(dict(changes))
    sampler = RuleSampler(rule)
    return Collector(c, task_of(problems), Tokenizer(), sampler), sampler


def ids(rollouts):
    return [p.problem.id for p in rollouts.prompts]


def positions(sampler):
    return [[r.key for r in requests] for requests in sampler.requests]


def test_tops_up_until_full_and_reports_what_it_cost():
    collector, sampler = make(even_mixed)
    got = collector.collect(None, 0)
    assert positions(sampler) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    order = [collector.task.train[int(collector.order[p])].id for p in range(8)]
    assert ids(got.chosen) == order[::2] and ids(got.sampled) == order
    assert got.reason.tolist() == ([""] * G + ["accuracy/all_correct"] * G) * 4
    trained = with_advantages(got.chosen, collector.config)
    rows = sample_rows(got, trained, Tokenizer(), 1)
    assert [(r["id"], r["selected"], r["reason"]) for r in rows[::G]] == [
        (order[0], True, ""), (order[1], False, "accuracy/all_correct")]  # fmt: skip
    m = got.metrics
    assert m["selection/generation_batches"] == 2 and m["selection/groups"] == 4
    assert m["selection/dropped/accuracy/all_correct"] == 4
    kept, everything = len(got.chosen.tokens), len(got.sampled.tokens)
    assert everything == kept + 4 * G * 3 == m["generated_tokens"]
    assert m["acceptance_rate"] == kept / everything
    assert m["perf/slot_utilisation"] == 0.5
    assert m["selection/kept_lengths"] == [round(float(x.mean()), 2) for x in got.chosen.lengths.reshape(4, G)]
    assert m["selection/dropped_lengths"] == [3.0] * 4 and m["selection/dropped_reasons"] == ["all_correct"] * 4
    assert m["accuracy"] == 0.75 and m["zero_std_fraction"] == 0.5
    assert m["outcome/correct"] == 8 * G - 8 and m["outcome/wrong"] == 8


@pytest.mark.parametrize("advantage", ["reinforce_pp_baseline", "dler"])  # whose scale is the whole batch's
def test_samples_show_the_advantages_that_are_trained_on(advantage):
    collector, _ = make(even_mixed, {"algorithm.advantage": advantage})
    got = collector.collect(None, 0)
    trained = with_advantages(got.chosen, collector.config)
    rows = sample_rows(got, trained, Tokenizer(), 1)
    assert [r["advantage"] for r in rows[:G]] == pytest.approx(trained.columns["advantage"][:G], abs=1e-4)
    assert not rows[-1]["selected"] and {r["advantage"] for r in rows[G:]} == {None}


def test_samples_show_advantages_of_tokens_where_there_is_one_a_token():
    collector, _ = make(even_mixed)
    got = collector.collect(None, 0)
    assert "advantages" not in sample_rows(got, with_advantages(got.chosen, collector.config), Tokenizer(), 1)[0]
    values = np.arange(len(got.chosen.tokens), dtype=np.float32) / 8
    rows = sample_rows(got, got.chosen.replace(token_columns={"advantage": values}), Tokenizer(), 1)
    kept = [row for row in rows if row["selected"]]
    assert [a for row in kept for a in row["advantages"]] == values[: sum(row["length"] for row in kept)].tolist()
    assert [row["advantage"] for row in kept] == pytest.approx([np.mean(row["advantages"]) for row in kept], abs=1e-4)
    assert all("advantages" not in row and row["advantage"] is None for row in rows if not row["selected"])
    assert all("".join(row["tokens"]) == row["text"] for row in rows)


def named_task():
    """Right answers earn `user` rewards brief (by length) and tone; some responses lack the latter."""
    plain = task_of(50)

    def grade(problems, texts):
        grades = plain.grade(problems, texts)
        words = [len(t.split()) for t in texts]
        named = [{"brief": 0.5 / n} | ({"tone": 0.1 * n} if n % 2 else {}) for n in words]
        return [g._replace(named=x, reward=sum(x.values())) for g, x in zip(grades, named, strict=True)]

    return plain._replace(grade=grade)


def test_named_rewards_are_summed_with_weights_and_logged_apart():
    changes = {"task.reward": "m:f", "length.reward": "linear", "length.weight": 0.5}
    collector, _ = make(changes=changes | {"rewards.weights": "tone=-2,correct=3,length=4,format=0.25"})
    collector.task = named_task()
    got = collector.collect(None, 0)
    r = got.sampled
    n, right = r.lengths, r.correct
    linear = LengthInputs(right, n, LIMIT, group=r.group)
    parts = {"brief": 0.5 / n, "tone": np.where(n % 2, 0.1 * n, 0), "correct": right, "format": np.ones(len(r)),
             "length": LENGTH_REWARDS["linear"].fn(linear, LENGTH_REWARDS["linear"].defaults) - right}  # fmt: skip
    weights = {"brief": 1, "tone": -2, "correct": 3, "format": 0.25, "length": 4 * 0.5}
    expected = sum(weights[k] * v for k, v in parts.items())
    np.testing.assert_allclose(r.reward, expected, rtol=1e-5, atol=1e-6)
    assert r.reward.dtype == np.float32
    for k, values in parts.items():
        np.testing.assert_allclose(r.columns[f"reward/{k}"], values, rtol=1e-6, atol=1e-7)
        assert (r.columns[f"weight/{k}"] == weights[k]).all()
        assert got.metrics[f"reward/{k}/mean"] == pytest.approx(values.mean(), rel=1e-5)
    rows = sample_rows(got, with_advantages(got.chosen, collector.config), Tokenizer(), 1)
    assert set(rows[0]["rewards"]) == set(parts)
    # they go along into the batch, through a checkpoint, and to GDPO
    collector.config.algorithm.advantage = "gdpo"
    assert np.isfinite(with_advantages(got.chosen, collector.config).columns["advantage"]).all()
    back = Rollouts.from_arrays(got.chosen.to_arrays())
    assert back.columns["reward/tone"].tobytes() == got.chosen.columns["reward/tone"].tobytes()


def test_without_weights_the_reward_is_the_tasks_own_bit_for_bit():
    plain, _ = make(even_mixed)
    got = plain.collect(None, 0).sampled
    assert got.reward.tobytes() == got.correct.tobytes() == got.columns["reward/correct"].tobytes()
    named, _ = make(even_mixed, {"task.reward": "m:f"})
    named.task = named_task()
    r = named.collect(None, 0).sampled
    total = r.columns["reward/brief"] + r.columns["reward/tone"]
    assert r.reward.tobytes() == total.tobytes() and set(r.columns) == {
        "reward/brief", "reward/tone", "weight/brief", "weight/tone"}  # fmt: skip


def test_a_weight_of_no_reward_is_named(caplog):
    collector, _ = make(changes={"task.reward": "m:f", "rewards.weights": "charm=2"})
    collector.collect(None, 0)
    assert "no response of this batch has a reward named 'charm'" in caplog.text


@pytest.mark.parametrize("name", ["leash", "a_dlp"])
def test_an_adaptive_length_reward_goes_on_from_its_state(name):
    """Its multiplier moves once a step, after everything sampled in it; the step's own rewards have the one before."""
    changes = {"length.reward": name, "batch.generation_prompts": 3, "length.hyper.leash.target": 3,
               "length.hyper.a_dlp.rate": 0.01}  # fmt: skip
    whole, _ = make(even_mixed, changes)
    steps = [whole.collect(None, s) for s in range(6)]
    first, _ = make(even_mixed, changes)
    before = [first.collect(None, s) for s in range(3)]
    numbers, arrays = first.state()
    second, _ = make(even_mixed, changes)
    second.restore(json.loads(json.dumps(numbers)), arrays)
    after = [second.collect(None, s) for s in range(3, 6)]
    assert [s.chosen.reward.tolist() for s in steps] == [s.chosen.reward.tolist() for s in before + after]
    seen = [s.metrics.get("length/state/multiplier") for s in steps]
    assert seen[0] is None and len(set(seen)) == 6 and seen[3:] == [
        s.metrics["length/state/multiplier"] for s in after]  # fmt: skip
    hyper = dict(whole.config.length.hyper[name])
    for n, step in enumerate(steps):
        state = {} if n == 0 else {"multiplier": seen[n]}
        r = step.sampled
        inputs = LengthInputs(r.correct, r.lengths, LIMIT, group=r.group, truncated=r.truncated, state=state)
        np.testing.assert_allclose(r.reward, LENGTH_REWARDS[name].fn(inputs, hyper), rtol=1e-6, atol=1e-7)
        following = LENGTH_REWARDS[name].update(inputs, hyper)["multiplier"]
        assert following == pytest.approx(seen[n + 1] if n < 5 else whole.shaping["reward"]["multiplier"])


def test_a_rule_without_reasons_still_tells_kept_from_dropped(monkeypatch):
    odd = lambda rollouts, hyper: (rollouts.group % 2 == 1, np.full(len(rollouts), ""))  # noqa: E731
    monkeypatch.setitem(SELECTIONS, "odd", Method(odd))
    got = make(changes={"algorithm.selection": "odd"})[0].collect(None, 0)
    assert got.reason.tolist() == (["odd"] * G + [""] * G) * 4
    assert got.metrics["selection/dropped/odd"] == 4 and got.metrics["selection/dropped_reasons"] == ["odd"] * 4


def test_groups_beyond_the_batch_are_discarded_or_kept():
    wide = {"batch.generation_prompts": 6}
    collector, sampler = make(changes=wide)
    first = collector.collect(None, 0)
    assert [first.chosen.num_groups, first.sampled.num_groups, first.metrics["selection/surplus"]] == [4, 6, 0]
    assert first.metrics["selection/groups"] == 4
    # two were selected and are thrown away: they do not count
    assert first.metrics["acceptance_rate"] == len(first.chosen.tokens) / len(first.sampled.tokens) < 1
    collector.collect(None, 1)
    assert positions(sampler) == [[*range(6)], [*range(6, 12)]]

    collector, sampler = make(changes={**wide, "batch.keep_surplus": True})
    steps = [collector.collect(None, s) for s in range(3)]
    assert positions(sampler) == [[*range(6)], [*range(6, 12)]]  # 2 of 6 wait, then 4 of 8: the third needs none
    assert [s.metrics["selection/surplus"] for s in steps] == [2, 4, 0]
    assert [s.metrics["acceptance_rate"] for s in steps] == [1, 1, 0]  # none is thrown away; then none was sampled
    order = [collector.task.train[int(collector.order[p])].id for p in range(12)]
    assert sum((ids(s.chosen) for s in steps), []) == order
    assert steps[2].metrics["generated_tokens"] == 0 and len(steps[2].sampled) == 0
    assert steps[2].metrics["selection/generation_batches"] == 0


def test_what_happens_when_the_limit_of_generation_batches_is_reached():
    never = lambda position, i: (WRONG, 3)  # noqa: E731
    limit = {"batch.max_generation_batches": 3}
    collector, sampler = make(never, limit)
    got = collector.collect(None, 0)
    assert len(got.chosen) == 0 and len(sampler.requests) == 3 and got.sampled.num_groups == 12
    assert got.metrics["selection/dropped/accuracy/all_wrong"] == 12 and got.metrics["acceptance_rate"] == 0
    collector, _ = make(even_mixed, {"batch.max_generation_batches": 1})
    assert collector.collect(None, 0).chosen.num_groups == 2
    collector, _ = make(never, {**limit, "batch.on_short": "error"})
    with pytest.raises(UserError, match="step 7: 0 of 4 groups after 3 batches; raise config.batch.max_gen"):
        collector.collect(None, 7)
    # A limit that is met just in time is no error; no limit at all goes on.
    collector, _ = make(even_mixed, {"batch.max_generation_batches": 2, "batch.on_short": "error"})
    assert collector.collect(None, 0).chosen.num_groups == 4
    late = lambda position, i: mixed(position, i) if position >= 60 else (WRONG, 2)  # noqa: E731
    collector, sampler = make(late, {"batch.max_generation_batches": 0})
    assert collector.collect(None, 0).chosen.num_groups == 4 and len(sampler.requests) == 16


def test_a_problem_drawn_twice_is_two_groups():
    collector, _ = make(even_mixed, problems=1)
    got = collector.collect(None, 0)
    assert [not r for r in got.reason[::G]] == [True, False] * 4
    assert len(got.metrics["selection/dropped_lengths"]) == 4


def crashing(share):
    """The first `share` of the G completions of every group cannot be graded."""
    return lambda position, i: (CRASH, 4) if i < share else mixed(position, i)


def test_completions_without_a_grade_take_no_part():
    collector, _ = make(crashing(1))
    got = collector.collect(None, 0)
    assert got.chosen.valid.tolist() == [False, True, True, True] * 4
    assert got.chosen.outcome[::G].tolist() == ["crashed"] * 4
    advantage = with_advantages(got.chosen, collector.config).columns["advantage"]
    assert advantage[0] == 0 and advantage[1] == pytest.approx((1 - 2 / 3) / np.std([1, 0, 1], ddof=1), rel=1e-5)
    (batch,) = make_batches(got.chosen, collector.config, 0)
    assert sorted(batch.index) == np.flatnonzero(got.chosen.valid).tolist()
    assert got.metrics["accuracy"] == pytest.approx(2 / 3) and got.metrics["reward/mean"] == pytest.approx(2 / 3)
    assert got.metrics["outcome/crashed"] == 4


def test_too_many_failures_stop_the_run():
    collector, _ = make(crashing(2))
    collector.collect(None, 0)  # half of them: as many as max_failures allows
    collector, _ = make(crashing(3), {"algorithm.selection": "none"})
    with pytest.raises(UserError, match=r"step 5: 12 of 16 completions could not be graded .*'crashed': 12.*0.5"):
        collector.collect(None, 5)


def test_nonfinite_log_probs_of_the_sampler_are_not_trained_on():
    collector, sampler = make()
    sampled = sampler.generate
    def broken(*args, **kwargs):
        out = sampled(*args, **kwargs)
        out[1][2].logprobs[-1] = np.nan
        return out
    sampler.generate = broken
    chosen = collector.collect(None, 0).chosen
    assert chosen.outcome[G : 2 * G].tolist() == ["wrong", "correct", "nonfinite", "correct"]
    assert chosen.valid[: 2 * G].tolist() == [True] * (G + 2) + [False, True]


@pytest.mark.parametrize("reward", [1e39, -1e39, float("nan"), float("inf")])
def test_rewards_that_float32_cannot_hold_are_not_trained_on(reward):
    """Whatever gave them: reward functions are checked where they run, a task's own grades here."""
    collector, _ = make()
    grade = collector.task.grade

    def overflowing(problems, texts):
        grades = grade(problems, texts)
        return [g._replace(reward=reward) if i == G + 2 else g for i, g in enumerate(grades)]

    collector.task = collector.task._replace(grade=overflowing)
    chosen = collector.collect(None, 0).chosen
    assert chosen.outcome[G + 2] == "nonfinite" and np.isfinite(chosen.reward).all()
    assert chosen.valid[: 2 * G].tolist() == [True] * (G + 2) + [False, True]


def test_longest_first_next_time():
    collector, sampler = make(lambda p, i: (i % 2 + WRONG, 2 + p), problems=4)
    collector.collect(None, 0)
    collector.collect(None, 1)
    first, second = sampler.requests
    assert [r.expected for r in first] == [0] * 4
    ids = [int(collector.order[p]) for p in range(8)]
    assert [r.expected for r in second] == [2.0 + ids[:4].index(i) for i in ids[4:]]


def test_budgets_depend_on_seed_and_position_only():
    changes = {"length.mode": "both", "length.low": 10, "length.high": 20, "length.reward": "lcpo_max"}
    collector, sampler = make(changes=changes)
    c, problem = collector.config, Problem("a", "q", "1")
    drawn = [with_budget(problem, c, p) for p in range(200)]
    assert drawn == [with_budget(problem, c, p) for p in range(200)]
    assert {p.budget for p in drawn} == set(range(10, 21)) and {p.mode for p in drawn} == {"exact", "max"}
    other = c.copy_and_resolve_references()
    other.seed = 1
    assert [p.budget for p in drawn] != [with_budget(problem, other, p).budget for p in range(200)]
    own = dataclasses.replace(problem, budget=3, mode="max")
    assert with_budget(own, c, 0) is own
    got = collector.collect(None, 0)
    for position, (prompt, request) in enumerate(zip(got.sampled.prompts, sampler.requests[0], strict=True)):
        assert (prompt.problem.budget, prompt.problem.mode) == (drawn[position].budget, drawn[position].mode)
        assert request.prompt.tolist() == [1, 2, drawn[position].budget]
    lengths = got.sampled.lengths
    budgets = np.repeat([p.budget for p in drawn[:4]], G)
    assert got.metrics["length/deviation"] == pytest.approx(np.mean(np.abs(lengths - budgets) / budgets))
    c.length.mode = "none"
    assert with_budget(problem, c, 0) is problem


def random_rollouts(rng, count, mode="exact"):
    """Groups of G with everything that can vary: lengths, truncation, ungraded responses, budgets or none."""
    prompts = []
    for i in range(count):
        budget, kind = (int(rng.integers(4, 12)), (mode, "exact")[i % 3 - 1]) if i % 3 else (None, "none")
        problem = Problem(f"p{i}", "q", "1", budget=budget, mode=kind, info={"source": ["x", {"y": 0.1}]})
        prompts.append(Prompt(problem, rng.integers(0, 9, 3).astype(np.int32), G, 10 + i, i))
    n = count * G
    lengths = np.minimum(rng.integers(1, 17, n), 12)
    total, correct = int(lengths.sum()), (rng.random(n) < 0.6).astype(np.float32)
    return Rollouts(
        prompts=tuple(prompts),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        group=np.repeat(np.arange(count), G),
        tokens=rng.integers(0, 9, total).astype(np.int32),
        logprobs=rng.normal(size=total).astype(np.float32),
        sampled=rng.random(total) < 0.9,
        version=np.sort(rng.integers(0, 4, total)).astype(np.int32),
        sample=np.tile(np.arange(G, dtype=np.int32), count),
        correct=correct,
        reward=correct.copy(),
        valid=rng.random(n) < 0.8,
        finish=np.where(lengths == 12, "length", "eos").astype(object),
        outcome=np.where(correct > 0, "correct", "wrong").astype(object),
        columns={"waits": rng.integers(0, 3, n)},
        token_columns={"entropy": rng.random(total)},
    )


@pytest.mark.parametrize("name", sorted(set(LENGTH_REWARDS) - {"none"}))
def test_length_rewards_are_computed_over_what_was_graded(name):
    c = base_config()
    c.length.reward, c.sampling.max_tokens = name, 12
    mode = "exact" if name == "lcpo_exact" else "max"  # lcpo_max takes both
    r = random_rollouts(np.random.default_rng(3), 6, mode)
    graded = [i for i in range(len(r)) if r.valid[i]]
    assert 0 < len(graded) < 6 * G and len(set(r.modes)) >= 2
    assert any(r.correct[i] and r.finish[i] == "length" for i in graded)
    problems = [r.prompts[i // G].problem for i in graded]
    inputs = LengthInputs(
        [r.correct[i] for i in graded],
        [r.offsets[i + 1] - r.offsets[i] for i in graded],
        12,
        [p.budget or 0 for p in problems],
        [p.mode for p in problems],
        [i // G for i in graded],
        [r.finish[i] == "length" for i in graded],
    )
    expected = LENGTH_REWARDS[name].fn(inputs, LENGTH_REWARDS[name].defaults)
    shaped = shape_rewards(r, c)
    np.testing.assert_allclose(shaped.reward[graded], expected, rtol=1e-6, atol=1e-6)
    assert np.array_equal(shaped.reward[~r.valid], r.reward[~r.valid]) and shaped.reward.dtype == np.float32
    # A user's reward of another scale keeps its value; the length term comes on top.
    other = shape_rewards(r.replace(reward=r.reward * 3 + 1), c)
    np.testing.assert_allclose(other.reward - (r.reward * 3 + 1), shaped.reward - r.reward, atol=1e-6)


@pytest.mark.parametrize("end", ["</think>", "</Reasoning>", "[/THINK]", "<|end_of_thought|>"])
def test_thinking_counts_up_to_the_end_of_thinking(end):
    class Words(Tokenizer):
        def decode(self, tokens, skip_special=True):
            return super().decode(tokens).replace("13", end)

    whole = [[RIGHT, 2, 3, 13, 4, 5], [WRONG, 2, 3, 4], [RIGHT, 13, 1], [WRONG]]
    collector, sampler = make(changes={"batch.prompts": 1, "length.count": "thinking", "length.reward": "laser"})
    collector.tokenizer = Words()
    sampler.draw = lambda r, i, most: Completion(
        np.array(whole[i], np.int32), np.zeros(len(whole[i]), np.float32), "eos"
    )
    chosen = collector.collect(None, 0).chosen
    assert chosen.lengths.tolist() == [6, 4, 3, 1] and chosen.columns["thinking_tokens"].tolist() == [3, 4, 1, 1]


def test_ungraded_responses_are_not_counted_as_trained_on():
    collector, _ = make(lambda position, i: ((CRASH if i == 0 else RIGHT if i % 2 else WRONG), 3),
                        {"batch.prompts": 2, "task.max_failures": 1.0})
    assert collector.collect(None, 0).metrics["acceptance_rate"] == pytest.approx(1 - 1 / G)


def test_greso_explores_less_only_after_the_first_pass_and_once_a_step():
    changes = {"batch.greso": True, "batch.prompts": 4, "batch.generation_prompts": 2, "algorithm.selection": "none"}
    collector, _ = make(lambda position, i: (RIGHT, 3), changes, problems=8)
    explored = []
    for step in range(4):
        collector.collect(None, step)
        explored.append(collector.greso["explore"]["easy"])
    assert explored == pytest.approx([0.5, 0.5, 0.49, 0.48])


def test_a_length_reward_changed_on_resume_starts_afresh():
    changes = {"length.reward": "leash", "batch.prompts": 2}
    first, _ = make(changes=changes)
    first.collect(None, 0)
    numbers, arrays = first.state()
    assert numbers["shaping"]["reward"]["multiplier"] >= 0
    same, other = make(changes=changes)[0], make(changes=changes | {"length.reward": "a_dlp"})[0]
    for collector in (same, other):
        collector.restore(json.loads(json.dumps(numbers)), arrays)
    assert same.shaping == numbers["shaping"] and "reward" not in other.shaping


BOTH = {"sampling.carry_over": 2, "sampling.prefetch": True}


def ragged(position, i):
    """Long-tailed lengths, 1 to the limit."""
    n = np.exp(np.random.default_rng([position, i]).normal(1.2, 0.9))
    return (RIGHT if i % 2 else WRONG), int(np.clip(n, 1, LIMIT))


def content(rollouts):
    """(id, tokens, log-probs, finish) of every response."""
    rows = rollouts.group, rollouts.split_tokens(), rollouts.split_tokens(rollouts.logprobs), rollouts.finish
    return [(ids(rollouts)[g], t.tolist(), x.tolist(), f) for g, t, x, f in zip(*rows, strict=True)]


@pytest.mark.parametrize("changes", [{"sampling.carry_over": 3}, {"sampling.carry_over": 1}, BOTH], ids=str)
def test_carrying_over_loses_no_response_and_changes_none(changes):
    changes = {"algorithm.selection": "none", "batch.keep_surplus": True, "batch.max_generation_batches": 4} | changes
    collector, sampler = make(ragged, changes, problems=1000)
    steps = [collector.collect(None, s) for s in range(25)]
    budget = changes["sampling.carry_over"]
    assert all(np.max(r.max_tokens) <= budget for requests in sampler.requests for r in requests)
    order = [collector.task.train[int(collector.order[p])].id for p in range(collector.position)]
    finished = records.concat([*(s.chosen for s in steps), collector.surplus])
    begun = ids(collector.pending) + ids(collector.ahead)
    assert sorted(ids(finished) + begun) == sorted(order)  # each once, none lost
    assert finished.num_groups > 60 and len(begun) < 30
    for (name, tokens, logprobs, finish), i in zip(content(finished), finished.sample, strict=True):
        first, n = ragged(order.index(name), int(i))
        assert tokens == [first] + [5] * (n - 1) and len(logprobs) == n
        assert finish == ("length" if n == LIMIT else "eos")
    # No length bias: what waits at the end is what was begun last, so all but the newest are there.
    newest = min(order.index(i) for i in begun)
    assert newest > collector.position - 40
    assert set(ids(finished)) >= set(order[:newest])


def stale(collected, step):
    """Tokens of each response to train on that older parameters drew."""
    return collected.chosen.token_sum(collected.chosen.version < step).astype(int).tolist()


def test_stale_tokens_are_those_of_earlier_steps():
    lengths = {0: 2, 1: 3, 2: 7, 3: 12}
    changes = {"algorithm.selection": "none", "batch.keep_surplus": True, "batch.prompts": 1,
               "batch.max_generation_batches": 1, "sampling.carry_over": 3}  # fmt: skip
    collector, sampler = make(lambda position, i: (RIGHT, lengths[i]), changes)
    steps = [collector.collect(None, s) for s in range(5)]
    assert [s.chosen.num_groups for s in steps] == [0, 0, 0, 1, 1]  # 12 tokens take four steps
    assert stale(steps[3], 3) == [2, 3, 7, 9] and steps[3].chosen.lengths.tolist() == [2, 3, 7, 12]
    assert steps[3].chosen.version.tolist() == [0, 0] + [0] * 3 + [0] * 3 + [1] * 3 + [2] + [n // 3 for n in range(12)]
    assert steps[3].metrics["selection/stale_tokens"] == 21 / 24
    rows = sample_rows(steps[3], with_advantages(steps[3].chosen, collector.config), Tokenizer(), 1)
    assert [row["versions"] for row in rows] == [
        [[0, 2]], [[0, 3]], [[0, 3], [1, 3], [2, 1]], [[0, 3], [1, 3], [2, 3], [3, 3]]]  # fmt: skip
    assert [row["stale"] for row in rows] == [2, 3, 7, 9]
    assert [[(r.key, r.step, r.first_sample, r.done, r.max_tokens) for r in rs if r.key == 0]
            for rs in sampler.requests[:4]] == [
        [(0, 0, 0, 0, 3)], [(0, 0, 2, 3, 3), (0, 0, 3, 3, 3)], [(0, 0, 2, 6, 3), (0, 0, 3, 6, 3)], [(0, 0, 3, 9, 3)],
    ]  # fmt: skip
    assert 0 < stale(steps[4], 4)[3] < 12
    # Surplus groups are stale as a whole, fresh ones not at all.
    collector, _ = make(changes={"batch.generation_prompts": 6, "batch.keep_surplus": True})
    for s, old in ((0, 0), (1, 2)):
        got = collector.collect(None, s)
        assert stale(got, s) == got.chosen.lengths[: old * G].tolist() + [0] * (4 - old) * G


def test_prefetch_trains_on_the_same_groups():
    plain, _ = make(even_mixed)
    ahead, sampler = make(even_mixed, {"sampling.prefetch": True})
    found = []
    for s in range(6):
        a, b = plain.collect(None, s), ahead.collect(None, s)
        assert content(a.chosen) == content(b.chosen) and content(a.sampled) == content(b.sampled)
        assert a.reason.tolist() == b.reason.tolist() and a.metrics["accuracy"] == b.metrics["accuracy"]
        found.append(b.metrics["selection/stale_tokens"])
        assert b.metrics["selection/pending"] == 4 and a.metrics["selection/pending"] == 0
    assert found[0] == 0 and all(0 < x < 1 for x in found[1:])
    begun = [r for requests in sampler.requests[1:] for r in requests if r.done]
    assert begun and all(1 <= r.done <= 3 for r in begun)


@pytest.mark.parametrize("changes", [{"sampling.carry_over": 3}, BOTH], ids=str)
def test_two_hosts_hold_the_same_and_carry_over_is_that_of_one(changes, monkeypatch):
    changes = {"batch.keep_surplus": True, "algorithm.selection": "none", **changes}
    one, _ = make(ragged, changes)
    alone = [one.collect(None, s) for s in range(5)]
    here, barrier, slots, results = threading.local(), threading.Barrier(2), [None, None], [None, None]

    def allgather_bytes(mine):
        barrier.wait(30)
        slots[here.index] = mine
        barrier.wait(30)
        return list(slots)

    monkeypatch.setattr(collect.jax, "process_count", lambda: 2)
    monkeypatch.setattr(collect.jax, "process_index", lambda: here.index)
    monkeypatch.setattr(collect.distributed, "allgather_bytes", allgather_bytes)

    def host(index):
        here.index = index
        collector, _ = make(ragged, changes)
        results[index] = [collector.collect(None, s) for s in range(5)], collector.state()

    threads = [threading.Thread(target=host, args=(i,), daemon=True) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    (first, state), (second, other) = results
    assert same_state(state, other) and [content(s.chosen) for s in first] == [content(s.chosen) for s in second]
    if changes.get("sampling.prefetch") is None:
        assert [content(s.chosen) for s in first] == [content(s.chosen) for s in alone]
        assert same_state(state, one.state())


def hard_or_easy(position, i):
    return [(WRONG, 3), (RIGHT, 2), mixed(position, i)][position % 3]


def same_state(a, b):
    """The same numbers, and the same arrays bit for bit."""
    arrays = [{k: (v.dtype, v.shape, v.tobytes()) for k, v in state[1].items()} for state in (a, b)]
    return json.dumps(a[0]) == json.dumps(b[0]) and arrays[0] == arrays[1]


def views(collected):
    return [
        (repr(sorted(deterministic_view(c.metrics).items())), content(c.chosen), c.chosen.version.tolist(),
         c.reason.tolist())
        for c in collected
    ]  # fmt: skip


@pytest.mark.parametrize("partial", [{}, {"sampling.carry_over": 2}, {"sampling.prefetch": True}, BOTH], ids=str)
def test_goes_on_from_its_state_as_if_nothing_had_happened(partial):
    changes = {"batch.generation_prompts": 7, "batch.keep_surplus": True, "batch.greso": True, **partial}
    collector, sampler = make(hard_or_easy, changes, problems=20)
    whole, waiting, unfinished = [collector.collect(None, s) for s in range(8)], 0, 0
    for split in (2, 5) if partial else range(1, 8):
        first, first_sampler = make(hard_or_easy, changes, problems=20)
        before = [first.collect(None, s) for s in range(split)]
        state, arrays = first.state()
        state = json.loads(json.dumps(state))
        assert state["greso"]["streaks"] and state["mean_lengths"]
        waiting += first.surplus.num_groups
        unfinished += first.pending.num_groups + first.ahead.num_groups
        second, second_sampler = make(hard_or_easy, changes, problems=20)
        second.restore(state, arrays)
        after = [second.collect(None, s) for s in range(split, 8)]
        assert views(whole) == views(before + after)
        requests = first_sampler.requests + second_sampler.requests
        assert [[vars(r) | {"prompt": r.prompt.tolist()} for r in rs] for rs in requests] == [
            [vars(r) | {"prompt": r.prompt.tolist()} for r in rs] for rs in sampler.requests
        ]
    assert waiting and bool(unfinished) == bool(partial)
    drawn = [r.key for requests in sampler.requests for r in requests if r.samples == G and r.step == r.step]
    assert len(set(drawn)) < collector.position  # GRESO skipped some
    assert partial or len(set(drawn)) == len(drawn)  # none came twice


def test_the_shares_of_two_hosts_come_together_in_order_at_under_twelve_bytes_a_token(monkeypatch):
    """What a host makes of its share goes to the others without its prompts, and comes back bit for bit."""
    rng, sent = np.random.default_rng(1), []
    r = random_rollouts(rng, 40)
    lengths = rng.integers(100, 900, len(r))
    n = int(lengths.sum())
    r = r.replace(
        offsets=np.concatenate([[0], np.cumsum(lengths)]), tokens=rng.integers(0, 150000, n).astype(np.int32),
        logprobs=rng.normal(size=n).astype(np.float32), sampled=rng.random(n) < 0.9, token_columns={},
        version=np.sort(rng.integers(0, 4, n)).astype(np.int32),
    )  # fmt: skip
    monkeypatch.setattr(collect.jax, "process_count", lambda: 2)
    shares = [r.take_groups(collect.share(r, host)) for host in range(2)]

    def allgather_arrays(mine):
        sent.append(sum(v.nbytes for v in mine.values()))
        return [share.to_arrays(prompts=False) for share in shares]

    monkeypatch.setattr(collect.distributed, "allgather_arrays", allgather_arrays)
    assert same_state(({}, collect.gather(shares[0], r).to_arrays()), ({}, r.to_arrays()))
    assert sent[0] < 9 * len(shares[0].tokens)


def test_a_checkpoint_of_another_version_is_one_line():
    collector, _ = make()
    numbers, arrays = collector.state()
    with pytest.raises(UserError, match="waiting rollouts are of version 1, this program reads 2: go on with") as e:
        collector.restore({k: v for k, v in numbers.items() if k != "version"}, arrays)
    assert "\n" not in str(e.value)
