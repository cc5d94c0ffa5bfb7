"""The table of policy losses. Adding one is a function and a line here.

A loss is `fn(inputs, hyper) -> (token_loss, stats)`; inputs: algorithms.inputs.LossInputs, all arrays [R, T].
token_loss [R, T] is to be MINIMISED after `aggregate`. It is computed in float32 (float64 for float64 input) whatever
the input dtype, is finite for any input but NaN, and depends on no masked position (see `guarded`). stats are sums over
response tokens (`token_stats`), so micro-batches add up: divide by the global token count at the end. hyper must be
complete: see `hyper.resolve`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxrl.algorithms.losses_clip import bapo_bounds, bapo_loss, clip_loss, dac_loss
from jaxrl.algorithms.losses_sequence import gmpo_loss, gspo_loss, gspo_token_loss
from jaxrl.algorithms.losses_soft import cispo_loss, gpg_loss, sapo_loss
from jaxrl.algorithms.maspo import MASPO_DEFAULTS, maspo_loss


class Loss(NamedTuple):
    """A policy loss.

    fn: as described above. defaults: its constants. aggregation: the method's own. prepare: for constants that depend
    on the whole mini-batch: fn(inputs, hyper) -> hyper, called once with a no-grad score of all its rows, before its
    micro-batches. needs: what must be computed for it beyond the usual: ("ref_logp",) scores the reference model.
    """

    fn: Callable
    defaults: dict
    aggregation: str
    prepare: Callable | None = None
    needs: tuple[str, ...] = ()


def _clip(low: float, high: float, dual: float = 0.0) -> dict:
    return {"clip_low": low, "clip_high": high, "dual_clip": dual, "log_ratio_clamp": 20.0}


_GSPO = {"clip_low": 3e-4, "clip_high": 4e-4, "log_ratio_clamp": 10.0}
_LUSPO = {"clip_low": 2e-3, "clip_high": 2.5e-3, "log_ratio_clamp": 10.0}
_CISPO = {"clip_low": 10.0, "clip_high": 0.2, "cap": 0.0, "log_ratio_clamp": 20.0}
_SAPO = {"tau_pos": 1.0, "tau_neg": 1.05, "log_ratio_clamp": 20.0}
_GMPO = {"clip_low": 0.4, "clip_high": 0.4, "log_ratio_clamp": 20.0}
_DAC = {"eps_low": 0.16, "eps_high": 0.2, "ratio_max": 10.0, "dual_clip": 0.0, "log_ratio_clamp": 20.0}
_BAPO = {"low": 0.6, "low_max": 0.9, "low_step": 0.05, "high": 1.2, "high_max": 3.0, "high_step": 0.05}
_BAPO |= {"target": 0.5, "dual_clip": 3.0, "log_ratio_clamp": 20.0}

LOSSES: dict[str, Loss] = {
    "grpo": Loss(clip_loss, _clip(0.2, 0.2), "seq-mean-token-mean"),
    "dr_grpo": Loss(clip_loss, _clip(0.2, 0.2), "seq-mean-token-sum-norm"),
    "dapo": Loss(clip_loss, _clip(0.2, 0.28), "token-mean"),
    "ppo": Loss(clip_loss, _clip(0.2, 0.2, dual=3.0), "token-mean"),
    "gspo": Loss(gspo_loss, _GSPO, "seq-mean-token-mean"),
    "gspo_token": Loss(gspo_token_loss, _GSPO, "seq-mean-token-mean"),
    "luspo": Loss(gspo_loss, _LUSPO, "seq-mean-token-sum"),
    "maspo": Loss(maspo_loss, MASPO_DEFAULTS, "token-mean"),
    "cispo": Loss(cispo_loss, _CISPO, "token-mean"),
    "sapo": Loss(sapo_loss, _SAPO, "seq-mean-token-mean"),
    "gmpo": Loss(gmpo_loss, _GMPO, "seq-mean-token-mean"),
    "gpg": Loss(gpg_loss, {"log_ratio_clamp": 20.0}, "token-mean"),
    "dac": Loss(dac_loss, _DAC, "seq-mean-token-mean"),
    "bapo": Loss(bapo_loss, _BAPO, "token-mean", bapo_bounds),
}
