"""From the configuration to the learner's objective and optimizer, and from the records of updates to one record."""

import pytest

from jaxrl.learner.learner import combine, objective, optimizer
from jaxrl.runtime.config import base_config


@pytest.mark.parametrize(("updates", "epochs", "on_policy"), [(1, 1, True), (2, 1, False), (1, 2, False)])
def test_old_log_probs_are_the_current_ones_only_if_there_is_one_update(updates, epochs, on_policy):
    config = base_config()
    config.batch.updates, config.batch.epochs = updates, epochs
    assert objective(config).on_policy is on_policy


def test_what_is_minimised_is_what_the_configuration_says():
    config = base_config()
    a = config.algorithm
    a.loss, a.loss_hyper.maspo.alpha, a.kl_coef, a.kl_kind, a.entropy_coef = "maspo", 0.5, 0.1, "k2", 0.01
    a.correction, a.correction_hyper.token_tis.cap = "token_tis", 3.0
    config.sampling.temperature, config.sampling.max_tokens = 0.7, 99
    found = objective(config)
    assert (found.loss, found.loss_hyper["alpha"], found.loss_hyper["sigma_base"]) == ("maspo", 0.5, 1.0)
    assert (found.correction, found.correction_hyper["cap"]) == ("token_tis", 3.0)
    assert (found.kl_coef, found.kl_kind, found.entropy_coef, found.temperature) == (0.1, "k2", 0.01, 0.7)
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
