"""Selection rules: what is kept, what is dropped and why, and the edges (none, one, ties, equal lengths,
ungraded).
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl.algorithms.greso import GRESO, greso_init, greso_keep, greso_update
from jaxrl.algorithms.hyper import Method
from jaxrl.algorithms.selection import (
    SELECTIONS,
    STATISTICS,
    group_reasons,
    max_variance_subset,
    mean_accuracy,
    mean_length,
    parse_chain,
    thresholds,
)
from jaxrl.algorithms.selection import dropped as count_dropped
from jaxrl.algorithms.selection import select as select_columns
from jaxrl.errors import UserError
from jaxrl.rollouts import concat
from tests.algorithms.harness import make_group

quick = settings(max_examples=25, deadline=None, derandomize=True)
LSPO_LIKE = ["lspo", "lspo_middle", "lspo_shortest", "lspo_longest", "lspo_value", "lspo_accuracy"]


def _mixed(lengths):
    """One group of two completions, one of them right, per mean length."""
    return [make_group([n, n], [1, 0], name=str(i)) for i, n in enumerate(lengths)]


def select(groups, chain, hyper=None):
    """(rollouts that are kept, {reason: count}) of a list of groups."""
    rollouts = concat(groups)
    keep, reason = select_columns(rollouts, chain, hyper)
    return rollouts.where(keep), count_dropped(rollouts, reason)


def _names(rollouts):
    return [int(p.problem.id) for p in rollouts.prompts]


def test_accuracy_keeps_spread_and_says_why_it_drops():
    groups = [
        make_group([3, 3], [1, 0], name="0"),
        make_group([3, 3], [1, 1], name="1"),
        make_group([3, 3], [0, 0], name="2"),
        make_group([3, 3], [0.5, 0.5], name="3"),
        make_group([3], [1], name="4"),
        make_group([3, 3, 3], [1, 1, 0], valid=[True, True, False], name="5"),
        make_group([3, 3], [1, 0], valid=[False, False], name="6"),
    ]
    kept, dropped = select(groups, "accuracy")
    assert _names(kept) == [0, 4]
    assert dropped == {
        "accuracy/all_correct": 2,
        "accuracy/all_wrong": 1,
        "accuracy/all_equal": 1,
        "accuracy/ungraded": 1,
    }
    shaped = [make_group([3, 3], [1, 1], rewards=[1.0, 0.9]), make_group([3, 3], [1, 0], rewards=[0.5, 0.5])]
    kept, dropped = select(shaped, "accuracy", {"accuracy": {"metric": "rewards"}})
    assert kept.reward.tolist() == [1.0, np.float32(0.9)] and dropped == {"accuracy/all_equal": 1}
    kept, dropped = select(groups, "none")
    assert _names(kept) == [*range(7)] and len(kept) == 14 and dropped == {}


def test_lspo_keeps_both_ends_and_drops_the_longest():
    """Means 1..21: linear percentiles fall on 7, 14 and 20, comparisons are inclusive."""
    kept, dropped = select(_mixed(range(1, 22)), "lspo")
    assert [i + 1 for i in _names(kept)] == [*range(1, 8), *range(14, 21)]
    assert dropped == {"lspo/middle": 6, "lspo/longest": 1}
    script = {"lspo": {"high": 0.60, "max": 0.90}}
    assert [i + 1 for i in _names(select(_mixed(range(1, 22)), "lspo", script)[0])] == [
        *range(1, 8),
        *range(13, 20),
    ]


def test_the_two_quantiles_differ_on_small_batches():
    values = [10.0, 20.0, 30.0, 40.0]
    assert thresholds(values, (0.3, 0.65, 0.95), "linear") == pytest.approx([19.0, 29.5, 38.5])
    assert thresholds(values, (0.3, 0.65, 0.95), "inf") == [20.0, 30.0, 40.0]
    assert thresholds(values, (0.25, 0.5, 1.0), "inf") == [10.0, 20.0, 40.0]  # F(t) >= a is met with equality
    assert thresholds(np.arange(1, 26), (0.28, 0.56), "inf") == [7.0, 14.0]  # though 0.28 x 25 is 7.000000000000001
    assert _names(select(_mixed(values_int := [10, 20, 30, 40]), "lspo")[0]) == [0, 2]
    assert _names(select(_mixed(values_int), "lspo", {"lspo": {"quantile": "inf"}})[0]) == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="quantile='nearest' must be one of linear, inf"):
        select([], "lspo", {"lspo": {"quantile": "nearest"}})


@pytest.mark.parametrize("name", LSPO_LIKE)
def test_lspo_and_its_ablations_at_the_edges(name):
    solved = [make_group([4, 4], [1, 1]), make_group([4, 4], [0, 0])]
    kept, dropped = select([], name)
    assert len(kept) == 0 and dropped == {}
    kept, dropped = select(solved, name)
    assert len(kept) == 0 and dropped == {f"{name}/all_correct": 1, f"{name}/all_wrong": 1}
    assert select(solved + _mixed([7]), name)[0].lengths.tolist() == [7, 7]
    kept, dropped = select(_mixed([5] * 6), name)
    assert _names(kept) == [*range(6)] and dropped == {}
    single = [make_group([n], [c], name=str(n)) for n, c in ((3, 1), (5, 0), (9, 1))]
    assert 0 < len(select(single, name)[0]) <= 3


def test_ablations_keep_what_they_say():
    groups = _mixed(range(0, 101, 5))  # 21 means from 0 to 100
    means = {i: 5 * i for i in range(21)}
    kept = lambda name, **h: [means[i] for i in _names(select(groups, name, {name: h})[0])]  # noqa: E731
    assert kept("lspo_middle") == [*range(30, 70, 5)]
    assert kept("lspo_shortest") == [*range(0, 61, 5)]
    assert kept("lspo_longest") == [*range(40, 101, 5)]
    assert kept("lspo_longest", fraction=0.2) == [80, 85, 90, 95, 100]
    assert kept("lspo_longest", fraction=0.7, quantile="linear") == [*range(30, 101, 5)]  # 1 - 0.7 > 0.3 in binary
    shifted = _mixed(range(100, 201, 5))
    value = lambda **h: [100 + means[i] for i in _names(select(shifted, "lspo_value", {"lspo_value": h})[0])]  # noqa: E731
    assert value() == [*range(100, 131, 5), *range(170, 196, 5)]  # 0.98 * 200 = 196
    assert value(max=0.9) == [*range(100, 131, 5), *range(170, 181, 5)]  # 0.9 * 200 = 180
    assert value(max=0.9, upper="range") == [*range(100, 131, 5), *range(170, 191, 5)]  # 100 + 0.9 * 100
    _, dropped = select(shifted, "lspo_value")
    assert dropped == {"lspo_value/middle": 7, "lspo_value/longest": 1}
    _, dropped = select(groups, "lspo_middle")
    assert dropped == {"lspo_middle/shortest": 6, "lspo_middle/longest": 7}


def test_accuracy_percentiles():
    groups = [make_group([5] * 20, [1] * c + [0] * (20 - c), name=str(c)) for c in range(1, 20)]
    kept, dropped = select(groups, "lspo_accuracy")
    low, high, top = np.percentile(np.arange(1, 20), [30, 65, 95])
    assert _names(kept) == [c for c in range(1, 20) if c <= low or high <= c <= top]
    assert set(dropped) == {"lspo_accuracy/middle_accuracy", "lspo_accuracy/top_accuracy"}


@quick
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(0, 4)), max_size=25),
    st.sampled_from(sorted(SELECTIONS)),
)
def test_selections_partition_keep_order_and_touch_nothing(spec, name):
    """Kept and dropped groups add up, order is kept, the input is not changed, and the rule does not see
    the order.
    """
    groups = [make_group([n] * 4, [1] * c + [0] * (4 - c), name=str(i)) for i, (n, c) in enumerate(spec)]
    before = concat(groups)
    kept, dropped = select(groups, name)
    whole = sum(n for reason, n in dropped.items() if not reason.endswith("completions"))
    assert kept.num_groups + whole == len(groups)
    assert _names(kept) == sorted(_names(kept))
    after = concat(groups)
    assert all(np.array_equal(getattr(before, k), getattr(after, k)) for k in ("valid", "reward", "offsets"))
    backwards, _ = select(groups[::-1], name)
    assert sorted(_names(backwards)) == _names(kept)


def test_chains_run_from_left_to_right():
    groups = _mixed(range(1, 22)) + [make_group([1000, 1000], [1, 1], name="99")]
    chained, dropped = select(groups, "accuracy+lspo", {"lspo": {"max": 1.0}})
    assert 20 in _names(chained) and dropped == {"accuracy/all_correct": 1, "lspo/middle": 6}
    assert _names(select(groups, ["lspo", "lspo"])[0]) != _names(select(groups, "lspo")[0])
    assert parse_chain(" overlong + lspo ") == ["overlong", "lspo"]
    for bad in ("lspo+", "lsp", ""):
        with pytest.raises(ValueError, match="unknown selection .*; valid: .*lspo"):
            select(groups, bad)
    with pytest.raises(ValueError, match="unknown constant 'hi' of selection 'lspo'; valid: high, low, max"):
        select(groups, "lspo", {"lspo": {"hi": 0.6}})
    with pytest.raises(ValueError, match="low=0.3 must not be above high=0.2"):
        select(groups, "lspo", {"lspo": {"high": 0.2}})


def test_ungraded_completions_have_no_say():
    """A crash on a very long answer must not make its group the longest."""
    groups = _mixed(range(10, 31))
    odd = make_group([10, 10, 9000], [1, 0, 1], valid=[True, True, False], name="0")
    assert mean_length(odd) == [10] and mean_accuracy(odd) == [0.5]
    assert np.isnan(mean_length(make_group([3], [1], valid=[False]))).all()
    assert _names(select([odd, *groups[1:]], "lspo")[0]) == _names(select(groups, "lspo")[0])


def test_overlong_masks_truncated_completions():
    groups = [
        make_group([9, 4, 4], [0, 1, 0], truncated=[1, 0, 0], name="0"),
        make_group([9, 9], [0, 0], truncated=[1, 1], name="1"),
        make_group([4, 4], [1, 0], name="2"),
        make_group([9, 9, 4], [0, 0, 1], truncated=[1, 1, 0], valid=[True, False, True], name="3"),
    ]
    kept, dropped = select(groups, "overlong")
    assert _names(kept) == [0, 2, 3] and dropped == {
        "overlong/overlong_completions": 2,
        "overlong/overlong": 1,
    }
    # of group 0 the truncated one is gone, of group 3 as well; what was ungraded stays, without a gradient
    assert kept.group.tolist() == [0, 0, 1, 1, 2, 2] and kept.valid.tolist() == [True] * 4 + [False, True]
    kept, dropped = select(groups, "overlong", {"overlong": {"max_truncated": 0.5}})
    assert _names(kept) == [0, 2] and dropped == {"overlong/overlong_completions": 1, "overlong/overlong": 2}
    half = make_group([9, 4], [0, 1], truncated=[1, 0], name="0")  # at the limit, not above it
    assert _names(select([half], "overlong", {"overlong": {"max_truncated": 0.5}})[0]) == [0]


@quick
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.25, 1.0]), min_size=2, max_size=9), st.integers(1, 8))
def test_pods_finds_the_largest_variance(rewards, keep):
    keep = min(keep, len(rewards))
    found = np.asarray(rewards)[max_variance_subset(rewards, keep)]
    best = max(np.var(s) for s in itertools.combinations(rewards, keep))
    assert len(found) == keep and np.var(found) == pytest.approx(best, abs=1e-12)


def test_pods_and_gfpo_reduce_groups():
    group = make_group([8, 3, 5, 6, 2], [1, 1, 0, 1, 0], rewards=[1, 0.9, 0, 1, -1], valid=[1, 1, 1, 1, 0])
    pods, dropped = select([group], "pods", {"pods": {"keep": 2}})
    assert pods.sample.tolist() == [2, 3] and pods.reward.tolist() == [0, 1] and len(pods) == 2
    assert dropped == {"pods/unselected_completions": 3}
    gfpo, _ = select([group], "gfpo", {"gfpo": {"keep": 2}})
    assert gfpo.sample.tolist() == [1, 2] and gfpo.lengths.tolist() == [3, 5]
    assert gfpo.outcome.tolist() == ["correct", "wrong"]
    gfpo, _ = select([group], "gfpo", {"gfpo": {"keep": 2, "metric": "efficiency"}})
    assert gfpo.sample.tolist() == [1, 3]
    for name in ("pods", "gfpo"):
        kept, dropped = select([group], name, {name: {"keep": 4}})
        assert kept.sample.tolist() == [*range(5)] and dropped == {}
        with pytest.raises(ValueError, match="keep=0 must be an integer of at least 1"):
            select([group], name, {name: {"keep": 0}})


CONSTANTS = {name: constant.default for name, constant in GRESO.items()}


def _greso(state, groups):
    rollouts = concat(groups)
    return greso_update(state, [p.problem.id for p in rollouts.prompts], mean_accuracy(rollouts), CONSTANTS)


def test_greso_streaks_and_adaptation():
    state = greso_init(CONSTANTS)
    easy, hard, mixed = (
        make_group([2, 2], c, name=n) for n, c in (("e", [1, 1]), ("h", [0, 0]), ("m", [1, 0]))
    )
    crashed = make_group([2, 2], [0, 0], valid=[False, False], name="c")
    one = _greso(state, [easy, hard, mixed, crashed])
    assert state == greso_init(CONSTANTS)  # not changed in place
    assert one["streaks"] == {"e": ["easy", 1], "h": ["hard", 1]}
    # Each kind has 1/3 of the graded groups: above 1/12 and 1/6, so both explore less.
    assert one["explore"] == pytest.approx({"easy": 0.49, "hard": 0.49})
    two = _greso(one, [easy, make_group([2, 2], [1, 1], name="h"), *[mixed] * 20])
    assert two["streaks"] == {"e": ["easy", 2], "h": ["easy", 1]}
    assert two["explore"] == pytest.approx({"easy": 0.48, "hard": 0.50})  # 2/22 >= 1/12, 0 < 1/6
    assert _greso(two, [make_group([2, 2], [1, 0], name="e")])["streaks"] == {"h": ["easy", 1]}
    just = _greso(state, [easy, *[mixed] * 11])  # a share of exactly the target, 1/12, is enough
    assert just["explore"] == pytest.approx({"easy": 0.49, "hard": 0.51})
    low = {"explore": {"easy": 0.05, "hard": 0.95}, "streaks": {}}
    assert _greso(low, [easy])["explore"] == pytest.approx({"easy": 0.05, "hard": 0.95})
    assert _greso(state, [crashed]) == state
    new = greso_update(state, ["a", "b", "c"], [1.0, 0.0, 0.5], CONSTANTS, [False, False, True])
    assert new["explore"] == pytest.approx({"easy": 0.51, "hard": 0.51}) and new["streaks"].keys() == {"a", "b"}


def test_greso_samples_streaks_with_probability_p_to_the_n():
    state = {
        "explore": {"easy": 0.5, "hard": 0.8},
        "streaks": {"e": ["easy", 3], "h": ["hard", 1], "x": ["easy", 50]},
    }
    rng = np.random.default_rng(0)
    ids = ["new", "e", "h", "x"] * 4000
    kept = greso_keep(state, ids, rng, CONSTANTS).reshape(-1, 4).mean(0)
    np.testing.assert_allclose(kept, [1.0, 0.125, 0.8, CONSTANTS["floor"]], atol=0.015)
    again = greso_keep(greso_init(CONSTANTS), ids, np.random.default_rng(0), CONSTANTS)
    assert again.all() and rng.random() == _after(16000)


def _after(n):
    rng = np.random.default_rng(0)
    rng.random(n)
    return rng.random()


def test_reasons_of_groups_and_of_single_responses():
    """A chain names the rule that dropped a response; a group counts as dropped only where nothing of it is left."""
    groups = [
        make_group([9, 4, 4], [0, 1, 0], truncated=[1, 0, 0], name="0"),
        make_group([4, 4], [1, 1], name="1"),
        make_group([9, 4], [0, 1], truncated=[1, 0], name="2"),  # one is cut, the other has nothing to compare with
    ]
    rollouts = concat(groups)
    keep, reason = select_columns(rollouts, "overlong+accuracy")
    assert reason.tolist() == ["overlong/overlong_completions", "", "", "accuracy/all_correct", "accuracy/all_correct",
                               "overlong/overlong_completions", "accuracy/all_correct"]  # fmt: skip
    assert keep.tolist() == [why == "" for why in reason]
    assert count_dropped(rollouts, reason) == {"accuracy/all_correct": 2, "overlong/overlong_completions": 2}
    assert group_reasons(rollouts, reason).tolist() == ["", "accuracy/all_correct", "accuracy/all_correct"]


def old_form(correct, lengths, hyper):
    """A method as the first edition called it."""


def test_a_rule_must_return_keep_and_reason(monkeypatch):
    groups = _mixed([3, 5])
    for wrong in (lambda r, h: (r, {}), lambda r, h: (r.valid[:1], r.valid[:1]), lambda r, h: (r.reward, r.finish)):
        monkeypatch.setitem(SELECTIONS, "wrong", Method(wrong))
        with pytest.raises(ValueError, match=r"selection 'wrong' must return \(keep, reason\)"):
            select(groups, "wrong")
    with pytest.raises(ValueError, match=r"fn\(inputs, hyper\) .* not old_form\(correct, lengths, hyper\); docs/ext"):
        Method(old_form)
    monkeypatch.setitem(SELECTIONS, "old", Method(lambda groups, hyper: ([g for g in groups], {})))
    with pytest.raises(UserError, match="not a list of groups: a selection rule is fn"):
        select(groups, "old")


def test_lspo_on_a_statistic_of_ones_own(monkeypatch):
    groups = concat(_mixed([5] * 21))
    rollouts = groups.replace(columns={"entropy": np.repeat(np.arange(21.0), 2)})
    monkeypatch.setitem(STATISTICS, "entropy", lambda rollouts: rollouts.group_mean(rollouts.columns["entropy"]))
    keep, reason = select_columns(rollouts, "lspo", {"lspo": {"statistic": "entropy"}})
    assert _names(rollouts.where(keep)) == [*range(7), *range(13, 20)]
    assert set(reason) == {"", "lspo/middle_entropy", "lspo/top_entropy"}
    with pytest.raises(ValueError, match="statistic='surprise' must be one of length, accuracy, entropy"):
        select_columns(rollouts, "lspo", {"lspo": {"statistic": "surprise"}})
