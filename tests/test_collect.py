"""The collector on a sampler and a task made of plain rules: no model, no device."""

import dataclasses
import json
import threading
import types

import numpy as np
import pytest

from jaxrl import collect
from jaxrl.algorithms.hyper import Method
from jaxrl.algorithms.length import LENGTH_REWARDS
from jaxrl.algorithms.selection import SELECTIONS
from jaxrl.batch import sample_rows, trained_completions
from jaxrl.collect import Collector, group_from_json, group_to_json, shape_rewards, with_budget
from jaxrl.errors import UserError
from jaxrl.runtime.config import base_config
from jaxrl.tasks.task import Grade, Task
from jaxrl.types import Completion, Group, Problem
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


def positions(sampler):
    return [[r.key for r in requests] for requests in sampler.requests]


def test_tops_up_until_full_and_reports_what_it_cost():
    collector, sampler = make(even_mixed)
    got = collector.collect(None, 0)
    assert positions(sampler) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    order = [collector.task.train[int(collector.order[p])].id for p in range(8)]
    assert [g.problem.id for g in got.chosen] == order[::2]
    assert [g.problem.id for g in got.sampled] == order
    assert got.reasons == ["", "accuracy/all_correct"] * 4
    rows = sample_rows(got, got.chosen, collector.config, Tokenizer(), 1)
    assert [(r["id"], r["selected"], r["reason"]) for r in rows[::G]] == [
        (order[0], True, ""), (order[1], False, "accuracy/all_correct")]  # fmt: skip
    m = got.metrics
    assert m["selection/generation_batches"] == 2 and m["selection/groups"] == 4
    assert m["selection/dropped/accuracy/all_correct"] == 4
    kept, everything = (sum(int(g.lengths.sum()) for g in gs) for gs in (got.chosen, got.sampled))
    assert everything == kept + 4 * G * 3 == m["generated_tokens"]
    assert m["acceptance_rate"] == kept / everything
    assert m["perf/slot_utilisation"] == 0.5
    assert m["selection/kept_lengths"] == [round(float(g.lengths.mean()), 2) for g in got.chosen]
    assert m["selection/dropped_lengths"] == [3.0] * 4 and m["selection/dropped_reasons"] == ["all_correct"] * 4
    assert m["accuracy"] == 0.75 and m["zero_std_fraction"] == 0.5
    assert m["outcome/correct"] == 8 * G - 8 and m["outcome/wrong"] == 8


@pytest.mark.parametrize("advantage", ["reinforce_pp_baseline", "dler"])  # whose scale is the whole batch's
def test_samples_show_the_advantages_that_are_trained_on(advantage):
    collector, _ = make(even_mixed, {"algorithm.advantage": advantage})
    got = collector.collect(None, 0)
    rows = sample_rows(got, got.chosen, collector.config, Tokenizer(), 1)
    trained = [t.advantage for t in trained_completions(got.chosen, collector.config)]
    assert [r["advantage"] for r in rows[:G]] == pytest.approx(trained[:G], abs=1e-4)
    assert not rows[-1]["selected"] and {r["advantage"] for r in rows[G:]} == {None}


def test_a_rule_that_only_counts_still_tells_kept_from_dropped(monkeypatch):
    monkeypatch.setitem(SELECTIONS, "odd", Method(lambda groups, hyper: (groups[1::2], {"even": 2})))
    got = make(changes={"algorithm.selection": "odd"})[0].collect(None, 0)
    assert got.reasons == ["odd", ""] * 4
    assert got.metrics["selection/dropped/odd/even"] == 4


def test_groups_beyond_the_batch_are_discarded_or_kept():
    wide = {"batch.generation_prompts": 6}
    collector, sampler = make(changes=wide)
    first = collector.collect(None, 0)
    assert [len(first.chosen), len(first.sampled), first.metrics["selection/surplus"]] == [4, 6, 0]
    assert first.metrics["selection/groups"] == 4
    assert first.metrics["acceptance_rate"] == 1.0  # selected, though not used: the filter let them pass
    collector.collect(None, 1)
    assert positions(sampler) == [[*range(6)], [*range(6, 12)]]

    collector, sampler = make(changes={**wide, "batch.keep_surplus": True})
    steps = [collector.collect(None, s) for s in range(3)]
    assert positions(sampler) == [[*range(6)], [*range(6, 12)]]  # 2 of 6 wait, then 4 of 8: the third needs none
    assert [s.metrics["selection/surplus"] for s in steps] == [2, 4, 0]
    ids = [g.problem.id for s in steps for g in s.chosen]
    assert ids == [collector.task.train[int(collector.order[p])].id for p in range(12)]
    assert steps[2].metrics["generated_tokens"] == 0 and steps[2].sampled == []
    assert steps[2].metrics["selection/generation_batches"] == 0


def test_what_happens_when_the_limit_of_generation_batches_is_reached():
    never = lambda position, i: (WRONG, 3)  # noqa: E731
    limit = {"batch.max_generation_batches": 3}
    collector, sampler = make(never, limit)
    got = collector.collect(None, 0)
    assert got.chosen == [] and len(sampler.requests) == 3 and len(got.sampled) == 12
    assert got.metrics["selection/dropped/accuracy/all_wrong"] == 12 and got.metrics["acceptance_rate"] == 0
    collector, _ = make(even_mixed, {"batch.max_generation_batches": 1})
    assert len(collector.collect(None, 0).chosen) == 2
    collector, _ = make(never, {**limit, "batch.on_short": "error"})
    with pytest.raises(UserError, match="step 7: 0 of 4 groups after 3 batches; raise config.batch.max_gen"):
        collector.collect(None, 7)
    # A limit that is met just in time is no error; no limit at all goes on.
    collector, _ = make(even_mixed, {"batch.max_generation_batches": 2, "batch.on_short": "error"})
    assert len(collector.collect(None, 0).chosen) == 4
    late = lambda position, i: mixed(position, i) if position >= 60 else (WRONG, 2)  # noqa: E731
    collector, sampler = make(late, {"batch.max_generation_batches": 0})
    assert len(collector.collect(None, 0).chosen) == 4 and len(sampler.requests) == 16


def test_a_problem_drawn_twice_is_two_groups():
    collector, _ = make(even_mixed, problems=1)
    got = collector.collect(None, 0)
    assert [not r for r in got.reasons] == [True, False] * 4
    assert len(got.metrics["selection/dropped_lengths"]) == 4


def crashing(share):
    """The first `share` of the G completions of every group cannot be graded."""
    return lambda position, i: (CRASH, 4) if i < share else mixed(position, i)


def test_completions_without_a_grade_take_no_part():
    collector, _ = make(crashing(1))
    got = collector.collect(None, 0)
    for g in got.chosen:
        assert g.valid.tolist() == [False, True, True, True] and g.outcomes[0] == "crashed"
    trained = trained_completions(got.chosen, collector.config)
    assert [t.index for t in trained] == [1, 2, 3] * 4
    assert trained[0].advantage == pytest.approx((1 - 2 / 3) / np.std([1, 0, 1], ddof=1), rel=1e-5)
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
    groups = collector.collect(None, 0).chosen
    assert groups[1].outcomes == ["wrong", "correct", "nonfinite", "correct"]
    assert groups[1].valid.tolist() == [True, True, False, True] and groups[0].valid.all()


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
    for position, (group, request) in enumerate(zip(got.sampled, sampler.requests[0], strict=True)):
        assert (group.problem.budget, group.problem.mode) == (drawn[position].budget, drawn[position].mode)
        assert request.prompt.tolist() == [1, 2, drawn[position].budget]
    lengths = np.concatenate([g.lengths for g in got.sampled])
    budgets = np.repeat([p.budget for p in drawn[:4]], G)
    assert got.metrics["length/deviation"] == pytest.approx(np.mean(np.abs(lengths - budgets) / budgets))
    c.length.mode = "none"
    assert with_budget(problem, c, 0) is problem


def random_groups(rng, count, mode="exact"):
    """Groups of G with everything that can vary: lengths, truncation, ungraded completions, budgets or none."""
    groups = []
    for i in range(count):
        lengths = np.minimum(rng.integers(1, 17, G), 12)
        budget, kind = (int(rng.integers(4, 12)), (mode, "exact")[i % 3 - 1]) if i % 3 else (None, "none")
        problem = Problem(f"p{i}", "q", "1", budget=budget, mode=kind, info={"source": ["x", {"y": 0.1}]})
        correct = (rng.random(G) < 0.6).astype(np.float32)
        valid = rng.random(G) < 0.8
        groups.append(
            Group(
                problem=problem,
                prompt_tokens=rng.integers(0, 9, 3).astype(np.int32),
                completions=[
                    Completion(
                        rng.integers(0, 9, n).astype(np.int32),
                        rng.normal(size=n).astype(np.float32),
                        "length" if n == 12 else "eos",
                    )
                    for n in lengths
                ],
                texts=[f"täxt {n}" for n in lengths],
                correct=correct,
                rewards=correct.copy(),
                valid=valid,
                outcomes=["correct" if x else "wrong" for x in correct],
            )
        )
    return groups


@pytest.mark.parametrize("name", sorted(set(LENGTH_REWARDS) - {"none"}))
def test_length_rewards_are_computed_over_what_was_graded(name):
    c = base_config()
    c.length.reward, c.sampling.max_tokens = name, 12
    mode = "exact" if name == "lcpo_exact" else "max"  # lcpo_max takes both
    groups = random_groups(np.random.default_rng(3), 6, mode)
    flat = [(i, g, j) for i, g in enumerate(groups) for j in range(G) if g.valid[j]]
    assert 0 < len(flat) < 6 * G and len({g.problem.mode for g in groups}) >= 2
    assert any(g.correct[j] and g.truncated[j] for _, g, j in flat)
    expected = LENGTH_REWARDS[name].fn(
        np.array([g.correct[j] for _, g, j in flat]),
        np.array([g.completions[j].length for _, g, j in flat]),
        np.array([g.problem.budget or 0 for _, g, j in flat]),
        np.array([i for i, _, _ in flat]),
        np.array([g.completions[j].finish == "length" for _, g, j in flat]),
        12,
        np.array([g.problem.mode for _, g, j in flat]),
        LENGTH_REWARDS[name].defaults,
    )
    shaped = shape_rewards(groups, c)
    np.testing.assert_allclose([shaped[i].rewards[j] for i, _, j in flat], expected, rtol=1e-6, atol=1e-6)
    for before, after in zip(groups, shaped, strict=True):
        assert np.array_equal(after.rewards[~before.valid], before.rewards[~before.valid])
        assert after.rewards.dtype == np.float32 and after.prompt_tokens is before.prompt_tokens
    # A user's reward of another scale keeps its value; the length term comes on top.
    partial = [dataclasses.replace(g, rewards=g.rewards * 3 + 1) for g in groups]
    for a, b, g in zip(shape_rewards(partial, c), shaped, groups, strict=True):
        np.testing.assert_allclose(a.rewards - (g.rewards * 3 + 1), b.rewards - g.rewards, atol=1e-6)


def test_thinking_counts_up_to_the_end_of_thinking():
    group = dataclasses.replace(
        random_groups(np.random.default_rng(0), 1)[0], texts=["1 2 3 </think> 4 5", "1 2 3 4", "</think> 1", "1"]
    )
    group.completions[:] = [Completion(np.zeros(6, np.int32), np.zeros(6, np.float32), "eos")] * G
    counted = collect.counted_lengths(group, "thinking", Tokenizer())
    assert counted.tolist() == [3, 4, 0, 1] and collect.counted_lengths(group, "response", None).tolist() == [6] * G


def test_groups_survive_json_exactly():
    groups = random_groups(np.random.default_rng(5), 4, "max")
    extremes = np.array([1e-45, -3.4028235e38, np.float32(0.1), -0.0, np.nan, -np.inf, 1 / 3], np.float32)
    groups[0].completions[0] = Completion(np.arange(7, dtype=np.int32), extremes, "eos")
    for before in groups:
        after = group_from_json(json.loads(json.dumps(group_to_json(before))))
        assert after.problem == before.problem and after.texts == before.texts and after.outcomes == before.outcomes
        for name in ("prompt_tokens", "correct", "rewards", "valid", "lengths", "truncated"):
            a, b = getattr(after, name), getattr(before, name)
            assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), name
        for a, b in zip(after.completions, before.completions, strict=True):
            assert a.finish == b.finish and a.tokens.dtype == np.int32 and a.logprobs.dtype == np.float32
            assert a.tokens.tobytes() == b.tokens.tobytes() and a.logprobs.tobytes() == b.logprobs.tobytes()


BOTH = {"sampling.carry_over": 2, "sampling.prefetch": True}


def ragged(position, i):
    """Long-tailed lengths, 1 to the limit."""
    n = np.exp(np.random.default_rng([position, i]).normal(1.2, 0.9))
    return (RIGHT if i % 2 else WRONG), int(np.clip(n, 1, LIMIT))


def content(groups):
    """(id, tokens, log-probs, finish) of every completion."""
    return [(g.problem.id, c.tokens.tolist(), c.logprobs.tolist(), c.finish) for g in groups for c in g.completions]


@pytest.mark.parametrize("changes", [{"sampling.carry_over": 3}, {"sampling.carry_over": 1}, BOTH], ids=str)
def test_carrying_over_loses_no_completion_and_changes_none(changes):
    changes = {"algorithm.selection": "none", "batch.keep_surplus": True, "batch.max_generation_batches": 4} | changes
    collector, sampler = make(ragged, changes, problems=1000)
    steps = [collector.collect(None, s) for s in range(25)]
    budget = changes["sampling.carry_over"]
    assert all(np.max(r.max_tokens) <= budget for requests in sampler.requests for r in requests)
    order = [collector.task.train[int(collector.order[p])].id for p in range(collector.position)]
    finished = [g for s in steps for g in s.chosen] + collector.surplus
    begun = [p.problem.id for p in collector.pending + collector.ahead]
    assert sorted([g.problem.id for g in finished] + begun) == sorted(order)  # each once, none lost
    assert len(finished) > 60 and len(begun) < 30
    for g in finished:
        for i, c in enumerate(g.completions):
            first, n = ragged(order.index(g.problem.id), i)
            assert c.tokens.tolist() == [first] + [5] * (n - 1) and len(c.logprobs) == n
            assert c.finish == ("length" if n == LIMIT else "eos")
    # No length bias: what waits at the end is what was begun last, so all but the newest are there.
    newest = min(order.index(i) for i in begun)
    assert newest > collector.position - 40
    assert {g.problem.id for g in finished} >= set(order[:newest])


def test_stale_tokens_are_those_of_earlier_steps():
    lengths = {0: 2, 1: 3, 2: 7, 3: 12}
    changes = {"algorithm.selection": "none", "batch.keep_surplus": True, "batch.prompts": 1,
               "batch.max_generation_batches": 1, "sampling.carry_over": 3}  # fmt: skip
    collector, sampler = make(lambda position, i: (RIGHT, lengths[i]), changes)
    steps = [collector.collect(None, s) for s in range(5)]
    assert [len(s.chosen) for s in steps] == [0, 0, 0, 1, 1]  # 12 tokens take four steps
    first = steps[3].chosen[0]
    assert [c.stale for c in first.completions] == [2, 3, 7, 9] and first.lengths.tolist() == [2, 3, 7, 12]
    assert steps[3].metrics["selection/stale_tokens"] == 21 / 24
    assert [[(r.key, r.step, r.first_sample, r.done, r.max_tokens) for r in rs if r.key == 0]
            for rs in sampler.requests[:4]] == [
        [(0, 0, 0, 0, 3)], [(0, 0, 2, 3, 3), (0, 0, 3, 3, 3)], [(0, 0, 2, 6, 3), (0, 0, 3, 6, 3)], [(0, 0, 3, 9, 3)],
    ]  # fmt: skip
    assert all(0 < g.completions[3].stale < 12 for g in steps[4].chosen)
    # Surplus groups are stale as a whole, fresh ones not at all.
    collector, _ = make(changes={"batch.generation_prompts": 6, "batch.keep_surplus": True})
    for s, old in ((0, 0), (1, 2)):
        got = collector.collect(None, s)
        for k, g in enumerate(got.chosen):
            assert [c.stale for c in g.completions] == (g.lengths.tolist() if k < old else [0] * G)


def test_prefetch_trains_on_the_same_groups():
    plain, _ = make(even_mixed)
    ahead, sampler = make(even_mixed, {"sampling.prefetch": True})
    stale = []
    for s in range(6):
        a, b = plain.collect(None, s), ahead.collect(None, s)
        assert content(a.chosen) == content(b.chosen) and content(a.sampled) == content(b.sampled)
        assert a.reasons == b.reasons and a.metrics["accuracy"] == b.metrics["accuracy"]
        stale.append(b.metrics["selection/stale_tokens"])
        assert b.metrics["selection/pending"] == 4 and a.metrics["selection/pending"] == 0
    assert stale[0] == 0 and all(0 < x < 1 for x in stale[1:])
    begun = [r for requests in sampler.requests[1:] for r in requests if r.done]
    assert begun and all(1 <= r.done <= 3 for r in begun)


@pytest.mark.parametrize("changes", [{"sampling.carry_over": 3}, BOTH], ids=str)
def test_two_hosts_hold_the_same_and_carry_over_is_that_of_one(changes, monkeypatch):
    changes = {"batch.keep_surplus": True, "algorithm.selection": "none", **changes}
    one, _ = make(ragged, changes)
    alone = [one.collect(None, s) for s in range(5)]
    here, barrier, slots, results = threading.local(), threading.Barrier(2), [None, None], [None, None]

    def allgather(mine):
        barrier.wait(30)
        slots[here.index] = json.loads(json.dumps(mine))
        barrier.wait(30)
        return list(slots)

    monkeypatch.setattr(collect.jax, "process_count", lambda: 2)
    monkeypatch.setattr(collect.jax, "process_index", lambda: here.index)
    monkeypatch.setattr(collect.distributed, "allgather", allgather)

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
    assert state == other and [content(s.chosen) for s in first] == [content(s.chosen) for s in second]
    if changes.get("sampling.prefetch") is None:
        assert [content(s.chosen) for s in first] == [content(s.chosen) for s in alone]
        assert state == json.loads(json.dumps(one.state()))


def hard_or_easy(position, i):
    return [(WRONG, 3), (RIGHT, 2), mixed(position, i)][position % 3]


def views(collected):
    return [
        (repr(sorted(deterministic_view(c.metrics).items())), [group_to_json(g) for g in c.chosen], c.reasons)
        for c in collected
    ]


@pytest.mark.parametrize("partial", [{}, {"sampling.carry_over": 2}, {"sampling.prefetch": True}, BOTH], ids=str)
def test_goes_on_from_its_state_as_if_nothing_had_happened(partial):
    changes = {"batch.generation_prompts": 7, "batch.keep_surplus": True, "batch.greso": True, **partial}
    collector, sampler = make(hard_or_easy, changes, problems=20)
    whole, waiting, unfinished = [collector.collect(None, s) for s in range(8)], 0, 0
    for split in (2, 5) if partial else range(1, 8):
        first, first_sampler = make(hard_or_easy, changes, problems=20)
        before = [first.collect(None, s) for s in range(split)]
        state = json.loads(json.dumps(first.state()))
        assert state["greso"]["streaks"] and state["mean_lengths"]
        waiting += len(state["surplus"])
        unfinished += len(state["pending"]) + len(state["ahead"])
        second, second_sampler = make(hard_or_easy, changes, problems=20)
        second.restore(state)
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


def test_the_shares_of_two_hosts_come_together_in_order(monkeypatch):
    groups = random_groups(np.random.default_rng(1), 5)
    shares = [groups[0::2], groups[1::2]]
    monkeypatch.setattr(collect.jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        collect.distributed, "allgather", lambda mine: [[group_to_json(g) for g in share] for share in shares]
    )
    gathered = collect.gather(shares[0])
    assert [g.problem.id for g in gathered] == [g.problem.id for g in groups]
    assert [g.lengths.tolist() for g in gathered] == [g.lengths.tolist() for g in groups]
