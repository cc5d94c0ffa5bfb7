"""From the configuration to the learner's objective and optimizer, and from the records of updates to one record."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl.algorithms.hyper import Number
from jaxrl.algorithms.inputs import guarded, token_ratio, token_stats
from jaxrl.algorithms.losses import LOSSES, Loss
from jaxrl.errors import UserError
from jaxrl.learner.learner import Learner, combine, needs_reference, objective, optimizer
from jaxrl.learner.packing import PackSettings, pack
from jaxrl.rollouts import from_sequences
from jaxrl.runtime.config import base_config
from jaxrl.runtime.mesh import make_mesh
from models.config import DecoderConfig
from models.decoder import init_params


@pytest.mark.parametrize(("updates", "epochs", "on_policy"), [(1, 1, True), (2, 1, False), (1, 2, False)])
def test_old_log_probs_are_the_current_ones_only_if_there_is_one_update(updates, epochs, on_policy):
    config = base_config()
    config.batch.updates, config.batch.epochs = updates, epochs
    assert objective(config).on_policy is on_policy


def test_an_attention_kernel_of_another_chip_is_refused_before_anything_is_compiled():
    config = base_config()
    decoder = DecoderConfig(11, 8, 12, 1, 2, 1, 4, model_type="llama")
    config.model.attention = "triton"
    with pytest.raises(UserError, match="^config.model.attention='triton' does not run on cpu: choose auto, xla$"):
        Learner(config, decoder, make_mesh(devices=jax.devices()[:1]))


def test_what_is_minimised_is_what_the_configuration_says():
    config = base_config()
    a = config.algorithm
    a.loss, a.loss_hyper.maspo.alpha, a.kl_coef, a.kl_kind, a.entropy_coef = "maspo", 0.5, 0.1, "k2", 0.01
    a.correction, a.correction_hyper.token_tis.cap = "token_tis", 3.0
    a.kl_value_clamp, a.kl_unbiased = 0.0, True
    config.sampling.temperature, config.sampling.max_tokens = 0.7, 99
    found = objective(config)
    assert (found.loss, found.loss_hyper["alpha"], found.loss_hyper["sigma_base"]) == ("maspo", 0.5, 1.0)
    assert (found.correction, found.correction_hyper["cap"]) == ("token_tis", 3.0)
    assert (found.kl_coef, found.kl_kind, found.entropy_coef, found.temperature) == (0.1, "k2", 0.01, 0.7)
    assert (found.kl_value_clamp, found.kl_unbiased) == (0.0, True)
    assert (found.aggregation, found.norm_length, found.entropy_advantage) == ("", 99.0, None)
    a.kl_in_reward, a.entropy_advantage, a.norm_length, a.aggregation = True, True, 3000, "seq-mean-token-sum-norm"
    found = objective(config)
    assert found.kl_coef == 0  # it is in the reward already
    assert (found.aggregation, found.norm_length, found.entropy_advantage) == (a.aggregation, 3000.0, (0.4, 2.0))


def test_a_decaying_schedule_ends_with_the_last_update_of_the_run():
    config = base_config()
    config.steps, config.batch.updates, config.batch.epochs, config.optimizer.schedule = 5, 3, 2, "linear"
    config.optimizer.learning_rate = 1.0
    schedule = optimizer(config).schedule
    assert [float(schedule(n)) for n in (0, 15, 29, 30)] == pytest.approx([1, 0.5, 1 / 30, 0])


def test_records_of_updates_become_means_maxima_and_a_count():
    records = [{"loss": 1.0, "ratio/max": 5.0, "nonfinite": 1.0}, {"loss": 2.0, "ratio/max": 3.0, "nonfinite": 1.0}]
    assert combine(records) == {"loss": 1.5, "ratio/max": 5.0, "nonfinite": 2.0} and combine([]) == {}


def distance_loss(inputs, hyper):
    """Looks at all a loss may look at."""
    tokens = guarded(inputs)
    reference, drift = ((tokens.logp - x) ** 2 for x in (tokens.ref_logp, tokens.old_logp))
    sums = token_stats(tokens, token_ratio(tokens, hyper), reference=reference, drift=drift)
    return jax.lax.stop_gradient(tokens.entropy) * (tokens.logp - tokens.ref_logp - 1) ** 2, sums


def test_a_loss_gets_the_reference_it_asks_for_and_nothing_else_gets_one(monkeypatch):
    """Over two steps of two updates: the reference is the model at the beginning of the run, old log-probs are those
    at the beginning of the step, and a loss that does not say what it needs fails at once instead of seeing zeros."""
    entry = Loss(distance_loss, {"log_ratio_clamp": Number(20.0)}, "token-mean", needs=("ref_logp",))
    monkeypatch.setitem(LOSSES, "distance", entry)
    config = base_config()
    assert not needs_reference(config)
    config.algorithm.loss, config.optimizer.learning_rate, config.batch.updates = "distance", 1e-2, 2
    assert needs_reference(config)
    decoder, mesh = DecoderConfig(11, 8, 12, 1, 2, 1, 4, model_type="llama"), make_mesh(devices=jax.devices()[:1])
    learner, first = Learner(config, decoder, mesh), init_params(decoder, jax.random.key(0))
    prompt, answers = np.array([1, 2]), [np.array([3, 4, 5]), np.array([6, 7])]
    rollouts = from_sequences([prompt] * 2, answers, [np.full(len(a), -2.4) for a in answers])
    batch, _ = pack(rollouts, np.array([1.0, -1.0]), PackSettings(8, 8))
    state, found, sums = learner.init(jax.tree.map(jnp.copy, first)), [], []
    for _ in range(2):
        scores = learner.score(learner.weights(state), batch) - learner.score(first, batch)
        found.append(float((scores**2).sum() / batch.num_tokens))
        state, metrics = learner.update(state, [batch, batch], first)
        sums.append(metrics)
    assert found[0] == 0 < found[1] and all(m["policy/drift"] > 0 for m in sums)
    # the mean over a step's two updates: where it began, and where the first update had moved it
    assert sums[0]["policy/reference"] == pytest.approx(sums[0]["policy/drift"])
    assert sums[1]["policy/reference"] > found[1] / 2
    monkeypatch.setitem(LOSSES, "distance", dataclasses.replace(entry, needs=()))
    config.algorithm.loss_hyper.distance.log_ratio_clamp = 19.0  # another objective, so other programs
    with pytest.raises(TypeError):
        Learner(config, decoder, mesh).programs.update.lower(state, batch)
