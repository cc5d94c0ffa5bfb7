"""The table of policy losses. Adding one is a function and a line here.

A loss is `fn(inputs, hyper) -> (token_loss, stats)`; inputs: algorithms.inputs.LossInputs, all arrays [R, T].
token_loss [R, T] is to be MINIMISED after `aggregate`. It is computed in float32 (float64 for float64 input) whatever
the input dtype, is finite for any input but NaN, and depends on no masked position (see `guarded`). stats are sums over
response tokens (`token_stats`), so micro-batches add up: divide by the global token count at the end. hyper must be
complete: see `hyper.resolve`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxrl.algorithms.hyper import Method, Number
from jaxrl.algorithms.losses_clip import bapo_bounds, bapo_loss, clip_loss, dac_loss
from jaxrl.algorithms.losses_cov import clip_cov_choice, clip_cov_loss, kl_cov_choice, kl_cov_loss
from jaxrl.algorithms.losses_sequence import gmpo_loss, gspo_loss, gspo_token_loss
from jaxrl.algorithms.losses_soft import cispo_loss, gpg_loss, sapo_loss
from jaxrl.algorithms.losses_trust import dppo_kl_loss, dppo_tv_loss, dro_loss, vespo_loss
from jaxrl.algorithms.maspo import MASPO, maspo_loss


@dataclasses.dataclass(frozen=True)
class Loss(Method):
    """A policy loss: fn as described above, its constants, and

    aggregation: the method's own. prepare: for constants that depend on the whole mini-batch: fn(inputs, hyper) ->
    hyper, called once with a no-grad score of all its rows, before its micro-batches. needs: what must be computed for
    it beyond the usual: ("ref_logp",) scores the reference model.
    """

    aggregation: str = "token-mean"
    prepare: Callable | None = None
    needs: tuple[str, ...] = ()


def _clip(low: float, high: float, dual: float = 0.0) -> dict:
    return {
        "clip_low": Number(low),
        "clip_high": Number(high),
        "dual_clip": Number(dual, 1, above=True, off=0.0),
        **_CLAMP,
    }


def _clamp(bound: float) -> dict:
    return {"log_ratio_clamp": Number(bound, 0, 80, above=True)}  # exp(80) is finite in float32


_CLAMP = _clamp(20.0)
_GSPO = {"clip_low": Number(3e-4), "clip_high": Number(4e-4), **_clamp(10.0)}
_LUSPO = {"clip_low": Number(2e-3), "clip_high": Number(2.5e-3), **_clamp(10.0)}
_CISPO = {"clip_low": Number(10.0), "clip_high": Number(0.2), "cap": Number(0.0), **_CLAMP}
_SAPO = {"tau_pos": Number(1.0, 0, above=True), "tau_neg": Number(1.05, 0, above=True), **_CLAMP}
_GMPO = {"clip_low": Number(0.4), "clip_high": Number(0.4), **_CLAMP}
_DAC = {"eps_low": Number(0.16), "eps_high": Number(0.2), "ratio_max": Number(10.0, 1)}
_DAC |= {"dual_clip": Number(0.0, 1, above=True, off=0.0), **_CLAMP}
# the search tries every bound between start and maximum: at most 1000 and 99,000 of them
_BAPO = {"low": Number(0.6, 0, 1), "low_max": Number(0.9, 0, 1), "low_step": Number(0.05, 1e-3, off=0.0)}
_BAPO |= {"high": Number(1.2, 1), "high_max": Number(3.0, 1, 100), "high_step": Number(0.05, 1e-3, off=0.0)}
_BAPO |= {"target": Number(0.5, 0, 1), "dual_clip": Number(3.0, 1, above=True, off=0.0), **_CLAMP}

_DPPO = {"ratio_max": Number(20.0, 1), **_CLAMP}
_VESPO = {"k_pos": Number(2.0), "lambda_pos": Number(3.0), "k_neg": Number(3.0), "lambda_neg": Number(2.0), **_CLAMP}
_COV = {"ratio": Number(2e-4, 0, 1), **_CLAMP}
_CLIP_COV = {"clip_low": Number(0.2), "clip_high": Number(0.2), "cov_low": Number(1.0), "cov_high": Number(5.0), **_COV}

LOSSES: dict[str, Loss] = {
    "grpo": Loss(clip_loss, _clip(0.2, 0.2), "seq-mean-token-mean"),
    "dr_grpo": Loss(clip_loss, _clip(0.2, 0.2), "seq-mean-token-sum-norm"),
    "dapo": Loss(clip_loss, _clip(0.2, 0.28), "token-mean"),
    "ppo": Loss(clip_loss, _clip(0.2, 0.2, dual=3.0), "token-mean"),
    "gspo": Loss(gspo_loss, _GSPO, "seq-mean-token-mean"),
    "gspo_token": Loss(gspo_token_loss, _GSPO, "seq-mean-token-mean"),
    "luspo": Loss(gspo_loss, _LUSPO, "seq-mean-token-sum"),
    "maspo": Loss(maspo_loss, MASPO, "token-mean", ordered=[("sigma_base", "sigma_high"), ("risk_low", "risk_high")]),
    "cispo": Loss(cispo_loss, _CISPO, "token-mean"),
    "sapo": Loss(sapo_loss, _SAPO, "seq-mean-token-mean"),
    "gmpo": Loss(gmpo_loss, _GMPO, "seq-mean-token-mean"),
    "gpg": Loss(gpg_loss, _CLAMP, "token-mean"),
    "dac": Loss(dac_loss, _DAC, "seq-mean-token-mean"),
    "bapo": Loss(bapo_loss, _BAPO, "token-mean", bapo_bounds, ordered=[("low", "low_max"), ("high", "high_max")]),
    "dppo_tv": Loss(dppo_tv_loss, {"low": Number(0.15, 0, 1), "high": Number(0.15, 0, 1), **_DPPO}, "token-mean"),
    "dppo_kl": Loss(dppo_kl_loss, {"low": Number(0.05), "high": Number(0.05), **_DPPO}, "token-mean"),
    "vespo": Loss(vespo_loss, _VESPO, "token-mean"),
    "dro": Loss(dro_loss, {"beta": Number(0.1), **_CLAMP}, "token-mean"),
    "clip_cov": Loss(clip_cov_loss, _CLIP_COV, "token-mean", clip_cov_choice, ordered=[("cov_low", "cov_high")]),
    "kl_cov": Loss(kl_cov_loss, {"kl_coef": Number(1.0), **_COV}, "token-mean", kl_cov_choice),
}
