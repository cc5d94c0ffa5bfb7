"""Any loss x advantage x selection x length reward trains: finite, and in the direction of the advantages.

Everything but the loss happens on the host, so one compiled update per loss serves all combinations: the batches
are padded to one shape. With exactly one update per batch the old policy is the current one, all ratios are 1, and
the first-order effect of a step is known: the sum of advantage times gain in log-probability is positive.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl import build
from jaxrl.algorithms.advantages import ADVANTAGES
from jaxrl.algorithms.length import LENGTH_REWARDS
from jaxrl.algorithms.losses import LOSSES
from jaxrl.algorithms.selection import SELECTIONS, select
from jaxrl.batch import fill_in, make_batches, with_advantages
from jaxrl.errors import UserError
from jaxrl.learner.learner import Learner
from jaxrl.rollouts import Prompt, concat, from_sequences
from jaxrl.runtime.combinations import impossible_methods
from jaxrl.runtime.config import validate
from jaxrl.runtime.mesh import make_mesh
from jaxrl.shaping import shape_rewards
from jaxrl.tasks import dial
from tests.tiny import get_config

GROUPS, G, LONGEST, ROW, MICRO = 8, 6, 12, 128, 8


def config_for(loss="grpo", advantage="grpo", selection="none", length="none"):
    c = get_config()
    c.model.shape.update(dict(hidden_size=16, intermediate_size=32, num_heads=2, num_kv_heads=2, head_dim=8))
    c.algorithm.loss, c.algorithm.advantage, c.algorithm.selection = loss, advantage, selection
    c.algorithm.selection_hyper.pods.keep = c.algorithm.selection_hyper.gfpo.keep = 3
    c.length.reward = length
    c.batch.row_tokens = c.batch.micro_tokens = ROW
    c.sampling.max_tokens = LONGEST
    c.optimizer.learning_rate, c.optimizer.warmup_steps, c.optimizer.grad_clip = 1e-4, 0, 0.0
    return c


@functools.cache
def graded_groups(mode):
    """Groups with every accuracy from none to all correct, ungraded and truncated completions, lengths 1 to 12."""
    rng = np.random.default_rng(11)
    tokenizer = build.tokenizer(config_for())
    parts = []
    for i, problem in enumerate(dial.problems("train", 0, GROUPS, 2, 3, mode=mode)):
        lengths = rng.integers(1, LONGEST + 1, G)
        lengths[0] = LONGEST if i % 2 else 1
        correct = (np.arange(G) < [0, G, 1, 2, 3, 4, 5, 3][i]).astype(np.float32)
        rng.shuffle(correct)
        valid = np.ones(G, bool)
        valid[1] = i != 3
        prompt = np.array(tokenizer.encode(dial.prompt_text(problem)), np.int32)
        group = from_sequences(
            [prompt],
            [rng.integers(1, tokenizer.vocab_size, n) for n in lengths],
            group=[0] * G,
            correct=correct,
            reward=correct,
            valid=valid,
            finish=np.where(lengths == LONGEST, "length", "eos").astype(object),
        )
        parts.append(group.replace(prompts=(Prompt(problem, prompt, G, i),)))
    return concat(parts)


@functools.cache
def batch_for(advantage, selection, length):
    """The one mini-batch of a step, padded to one shape for all; None where selection keeps nothing."""
    c = config_for("grpo", advantage, selection, length)
    rollouts = shape_rewards(graded_groups("exact" if length == "lcpo_exact" else "max"), c)
    keep, _ = select(rollouts, selection, {name: dict(h) for name, h in c.algorithm.selection_hyper.items()})
    kept = rollouts.where(keep)
    made = fill_in(make_batches(kept, c, step=0), with_advantages(kept, c))
    if not made:
        return None
    ((data, packing, index),) = made
    return one_shape(data), packing, with_advantages(kept, c).columns["advantage"][index]


def one_shape(data):
    """The batch with empty micro-batches behind, which are not computed, and the largest capacity."""
    pad = lambda x: np.pad(x, ((0, MICRO - len(x)), (0, 0), (0, 0))) if np.ndim(x) == 3 else x  # noqa: E731
    return jax.tree.map(pad, data).replace(capacity=ROW)


@functools.cache
def learner_for(loss):
    c = config_for(loss)
    return Learner(c, build.decoder_config(c, build.tokenizer(c)), make_mesh(1, 1, 1, jax.devices()[:1]))


@functools.cache
def start():
    c = config_for()
    learner = learner_for("grpo")
    return learner.init(build.params_maker(c, learner.decoder, learner.mesh)())


def score(params, batch):
    return np.asarray(learner_for("grpo").score(params, batch))


def check(loss, advantage, selection, length):
    """One update; whether any advantage was nonzero."""
    made = batch_for(advantage, selection, length)
    before = start()
    state = jax.tree.map(jnp.copy, before)
    if made is None:
        state, metrics = learner_for(loss).update(state, [])
        assert metrics == {} and int(state.step) == 0
        return False
    batch, packing, advantages = made
    state, metrics = learner_for(loss).update(state, [batch])
    assert int(state.step) == 1 and metrics["nonfinite"] == 0 and "nonfinite/updates" not in metrics
    assert all(math.isfinite(v) for v in metrics.values()), metrics
    moved = 0.0
    for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(state.params), strict=True):
        assert jnp.isfinite(b).all()
        moved = max(moved, float(jnp.abs(a - b).max()))
    assert np.isfinite(advantages).all()
    if not advantages.any():
        assert moved == 0 and metrics["grad_norm"] == 0
        return False
    gains = packing.collect(score(state.params, batch) - score(before.params, batch))
    # What a loss raises per completion: the mean over its tokens where it averages them first, else the sum.
    mean = LOSSES[loss].aggregation == "seq-mean-token-mean"
    gains = np.add.reduceat(gains, packing.offsets[:-1]) / (np.diff(packing.offsets) if mean else 1)
    assert (advantages * gains).sum() > 0, (advantages, gains)
    assert 0 < moved < 2e-4
    return True


def fast_cases():
    """Every loss with every advantage, every selection with every length reward; the other pair goes round."""
    losses, advantages, selections, lengths = map(sorted, (LOSSES, ADVANTAGES, SELECTIONS, LENGTH_REWARDS))
    pairs = list(itertools.product(selections, lengths))
    methods = list(itertools.product(losses, advantages))
    count = max(len(pairs), len(methods))
    # Steps that share no factor with the counts, so that both lists are gone through and mix.
    cases = {(*methods[i % len(methods)], *pairs[5 * i % len(pairs)]) for i in range(count)}
    assert {c[:2] for c in cases} == set(methods) and {c[2:] for c in cases} == set(pairs)
    return sorted(cases)


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_each_loss_with_each_advantage_and_each_selection_with_each_length_reward(loss):
    trained = [check(*case) for case in fast_cases() if case[0] == loss]
    assert np.mean(trained) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_combination(loss):
    cases = list(itertools.product([loss], ADVANTAGES, SELECTIONS, LENGTH_REWARDS))
    assert np.mean([check(*case) for case in cases]) > 0.5


@pytest.mark.parametrize("loss", ["grpo", "gspo", "maspo", "dr_grpo"])
def test_completions_with_positive_advantage_become_more_likely(loss):
    """One completion alone has an advantage: it gains with a positive one and loses with a negative one."""
    ((data, packing, _),) = make_batches(graded_groups("max").take_groups([4]), config_for(loss), step=0)
    sign = np.arange(G) == np.diff(packing.offsets).argmax()
    for flip in (1, -1):
        batch = one_shape(data.replace(advantages=packing.spread(flip * sign)))
        state, _ = learner_for(loss).update(jax.tree.map(jnp.copy, start()), [batch])
        gains = packing.collect(score(state.params, batch) - score(start().params, batch))
        assert flip * gains[np.repeat(sign, np.diff(packing.offsets))].sum() > 0


# ---- what validate accepts runs, what would raise is refused; nothing is compiled

MODES = ("none", "exact", "max", "both")
# without a budget there is nothing to keep to, and lcpo_exact scores one mode only
REFUSED = {("lcpo_exact", "none"), ("lcpo_max", "none"), ("lcpo_exact", "max"), ("lcpo_exact", "both")}


def told_apart(config):
    """Whether validate accepts it."""
    try:
        validate(config)
    except UserError as e:
        assert "\n" not in str(e)
        return False
    return True


@pytest.fixture
def math_config(tmp_path):
    c = config_for()
    c.task.name, c.task.data, c.sft.steps = "math", str(tmp_path / "any.jsonl"), 0
    return c


def graded(mode):
    if mode != "both":
        return graded_groups(mode)
    exact, at_most = (graded_groups(m) for m in ("exact", "max"))
    half = np.arange(GROUPS // 2)
    return concat([exact.take_groups(half), at_most.take_groups(half + GROUPS // 2)])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", sorted(LENGTH_REWARDS))
def test_an_accepted_combination_runs_on_the_host_and_a_refused_one_would_not(math_config, length, mode):
    c = math_config
    c.length.reward, c.length.mode = length, mode
    assert told_apart(c) == ((length, mode) not in REFUSED)
    if (length, mode) in REFUSED:
        if mode != "none":
            with pytest.raises(ValueError, match="lcpo_max"):
                shape_rewards(graded(mode), c)
        return
    rollouts = shape_rewards(graded(mode), c)
    for selection in SELECTIONS:
        c.algorithm.selection = selection
        assert told_apart(c)
        keep, _ = select(rollouts, selection, {name: dict(h) for name, h in c.algorithm.selection_hyper.items()})
        kept = rollouts.where(keep)
        for advantage in ADVANTAGES:
            c.algorithm.advantage = advantage
            assert np.isfinite(with_advantages(kept, c).columns["advantage"]).all()


def test_no_loss_advantage_or_selection_makes_another_choice_impossible(math_config):
    c = math_config
    for length, mode in itertools.product(LENGTH_REWARDS, MODES):
        c.length.reward, c.length.mode = length, mode
        for selection, advantage, loss in itertools.product(SELECTIONS, ADVANTAGES, LOSSES):
            c.algorithm.selection, c.algorithm.advantage, c.algorithm.loss = selection, advantage, loss
            assert bool(list(impossible_methods(c))) == ((length, mode) in REFUSED)
