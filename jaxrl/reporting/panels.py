"""The table of figures: adding one is a function in figures.py and an entry here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxrl.reporting import figures as f


class Panel(NamedTuple):
    """name: file name. draw(ax, settings) for compared settings, or draw(ax, run) with `single`.

    wide: across the whole page, when the page is about one setting.
    """

    name: str
    section: str
    title: str
    caption: str
    draw: Callable[..., bool]
    single: bool = False
    wide: bool = False


LEARNING, LENGTH, POLICY, SELECTION, COST = "Learning", "Length", "Policy", "Selection", "Cost"
SHARE = dict(percent=True, zero=True, unit="percent")

PANELS: tuple[Panel, ...] = (
    Panel(
        "accuracy", LEARNING, "Accuracy",
        "Share of correct answers on held-out problems, and on the prompts sampled for training. "
        "Band: 95 % interval, over problems for one run, over seeds for several.",
        f.accuracy,
    ),
    Panel(
        "accuracy_tokens", LEARNING, "Accuracy by tokens generated",
        "The same against everything sampled so far, discarded completions included. Thin lines: seeds.",
        f.against_tokens,
    ),
    Panel(
        "reward", LEARNING, "Reward",
        "Mean reward of all sampled completions, length terms included, and its standard deviation.",
        f.metric(("reward/mean", "mean"), ("reward/std", "deviation")),
    ),
    Panel(
        "zero_std", LEARNING, "Groups without a signal",
        "Share of prompts whose completions all earned the same reward: their advantages are zero.",
        f.metric(("zero_std_fraction", ""), **SHARE),
    ),
    Panel(
        "length_ridges", LENGTH, "How answers grow",
        "Distribution of response lengths at moments of training, from back to front.",
        f.ridges, single=True, wide=True,
    ),
    Panel(
        "length", LENGTH, "Response length",
        "Mean, median and 90th percentile; shaded: from the 10th to the 90th percentile.",
        f.lengths,
    ),
    Panel(
        "truncated", LENGTH, "Truncated responses",
        "Share that ran into the token limit.",
        f.metric(("truncated_fraction", ""), **SHARE),
    ),
    Panel(
        "deviation", LENGTH, "Distance from the budget",
        "Mean relative distance between the length asked for and the length given.",
        f.metric(("eval/mean_deviation", "held-out"), ("length/deviation", "training"), **SHARE),
    ),
    Panel(
        "budgets", LENGTH, "Budget obeyed",
        "Evaluation at fixed budgets. Dotted: length equals budget.",
        f.budgets,
    ),
    Panel(
        "accuracy_budget", LENGTH, "Accuracy by length",
        "Evaluation at fixed budgets, at the tokens really spent. Band: 95 % interval.",
        f.accuracy_by_tokens,
    ),
    Panel(
        "entropy", POLICY, "Entropy",
        "Mean entropy of the policy over response tokens.",
        f.metric(("entropy", ""), zero=True, unit="nats"),
    ),
    Panel(
        "kl", POLICY, "KL divergence",
        "Estimated divergence of the policy from its reference.",
        f.metric(("kl", ""), unit="nats"),
    ),
    Panel(
        "clip", POLICY, "Clipped tokens",
        "Share of response tokens whose gradient the trust region cut, by bound.",
        f.metric(("clip_fraction/high", "high"), ("clip_fraction/low", "low"), **SHARE),
    ),
    Panel(
        "ratio", POLICY, "Probability ratio",
        "Policy over sampling policy, of response tokens: mean and largest.",
        f.metric(("ratio/max", "max"), ("ratio/mean", "mean"), zero=True),
    ),
    Panel(
        "grad_norm", POLICY, "Gradient norm",
        "Global norm before clipping.",
        f.metric(("grad_norm", ""), zero=True),
    ),
    Panel(
        "mismatch", POLICY, "Sampler against learner",
        "Absolute difference of the two log-probabilities of the same tokens.",
        f.metric(("logprob_diff/mean", "mean"), ("logprob_diff/max", "max"), zero=True, unit="nats"),
    ),
    Panel(
        "selection", SELECTION, "What selection kept",
        "Each point is a sampled prompt at the mean length of its responses.",
        f.selection_scatter, single=True,
    ),
    Panel(
        "reasons", SELECTION, "What became of prompts",
        "Share of sampled prompts kept, or dropped and why.",
        f.selection_reasons, single=True,
    ),
    Panel(
        "acceptance", SELECTION, "Acceptance rate",
        "Share of generated tokens that belong to kept prompts.",
        f.metric(("acceptance_rate", ""), **SHARE),
    ),
    Panel(
        "time", COST, "Where the time goes",
        "Share of the seconds of a step.",
        f.time_split, single=True,
    ),
    Panel(
        "throughput", COST, "Throughput",
        "Generated tokens per second of the whole step.",
        f.metric(("tokens_per_second", ""), zero=True, unit="tokens/s"),
    ),
    Panel(
        "utilisation", COST, "Decode slots in use",
        "Share of slot-steps of the sampler that produced a token.",
        f.metric(("perf/slot_utilisation", ""), **SHARE),
    ),
    Panel(
        "padding", COST, "Padding",
        "Share of the positions of the update's rows that hold no token; and what it would be with one "
        "sequence a row, padded to the longest.",
        f.metric(("perf/padding_waste", "packed"), ("perf/padding_waste_unpacked", "unpacked"), **SHARE),
    ),
)  # fmt: skip
