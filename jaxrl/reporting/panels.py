"""The table of figures: adding one is a function in figures.py and an entry here."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from jaxrl.reporting import figures as f


class Panel(NamedTuple):
    """name: file name. draw(ax, settings) for compared settings, or draw(ax, run, colour) with `single`: one
    figure per setting.

    unseen: the part of the caption that only holds on a page about one setting. wide: over the full width there.
    """

    name: str
    section: str
    title: str
    caption: str
    draw: Callable[..., bool]
    single: bool = False
    wide: bool = False
    unseen: str = ""


LEARNING, LENGTH, POLICY, SELECTION, COST = "Learning", "Length", "Policy", "Selection", "Cost"
SHARE = dict(percent=True, zero=True)

PANELS: tuple[Panel, ...] = (
    Panel(
        "accuracy", LEARNING, "Accuracy",
        "Share of correct answers on held-out problems. Band: 95 % interval, over problems for one run, over seeds "
        "for several; where it runs out of the figure, there are too few of them.",
        f.accuracy, unseen="Beside it, the same on the prompts sampled for training.",
    ),
    Panel(
        "accuracy_tokens", LEARNING, "Accuracy by tokens generated",
        "Held-out accuracy against everything sampled so far, discarded completions included. Band: over seeds.",
        f.against_tokens,
    ),
    Panel(
        "reward", LEARNING, "Reward",
        "Mean reward of all sampled completions, length terms included.",
        f.metric(("reward/mean", "mean"), ("reward/std", "deviation"), unit="reward"),
        unseen="Below, its standard deviation.",
    ),
    Panel(
        "rewards", LEARNING, "Named rewards",
        "Means of the rewards that the reward is the weighted sum of, before their weights.",
        f.named_rewards, single=True,
    ),
    Panel(
        "zero_std", LEARNING, "Groups without a signal",
        "Share of prompts whose completions all earned the same reward: their advantages are zero.",
        f.metric(("zero_std_fraction", ""), unit="sampled prompts, %", **SHARE),
    ),
    Panel(
        "length_ridges", LENGTH, "Response lengths through training",
        "Distribution of the lengths of all sampled responses, from the first steps at the back to the last in front.",
        f.ridges, single=True, wide=True,
    ),
    Panel(
        "length", LENGTH, "Response length",
        "Of all sampled responses.",
        f.lengths, unseen="Mean, median and 90th percentile; shaded: from the 10th to the 90th percentile.",
    ),
    Panel(
        "truncated", LENGTH, "Truncated responses",
        "Share that ran into the token limit.",
        f.metric(("truncated_fraction", ""), unit="responses, %", **SHARE),
    ),
    Panel(
        "deviation", LENGTH, "Distance from the budget",
        "Mean relative distance between the length asked for and the length given, on held-out problems.",
        f.metric(("eval/mean_deviation", "held-out"), ("length/deviation", "training"), unit="of budget, %", **SHARE),
        unseen="Beside it, in training.",
    ),
    Panel(
        "budgets", LENGTH, "Budget obeyed",
        "Evaluation at fixed budgets. Dotted: length equals budget.",
        f.budgets,
    ),
    Panel(
        "accuracy_budget", LENGTH, "Accuracy by length",
        "Evaluation at fixed budgets, one point each, at the tokens really spent. Band: 95 % interval over problems. "
        "Dotted, where problems were answered several times: the most frequent answer.",
        f.accuracy_by_tokens,
    ),
    Panel(
        "accuracy_parts", LENGTH, "Accuracy of short and of long answers",
        "Evaluation: the answers in four parts of equal number by their length, each at its longest.",
        f.accuracy_by_length,
    ),
    Panel(
        "entropy", POLICY, "Entropy",
        "Mean entropy of the policy over response tokens.",
        f.metric(("entropy", ""), zero=True, unit="entropy, nats"),
    ),
    Panel(
        "kl", POLICY, "KL divergence",
        "Estimated divergence of the policy from its reference.",
        f.metric(("kl", ""), unit="KL, nats per token"),
    ),
    Panel(
        "drift", POLICY, "Drift within a step",
        "Estimated divergence of the policy that is being updated from the one that sampled.",
        f.metric(("policy/old_kl", ""), unit="KL, nats per token"),
    ),
    Panel(
        "clip", POLICY, "Clipped tokens",
        "Share of response tokens whose gradient the upper bound of the trust region cut.",
        f.metric(("clip_fraction/high", "high"), ("clip_fraction/low", "low"), unit="response tokens, %", **SHARE),
        unseen="Beside it, the lower bound.",
    ),
    Panel(
        "ratio", POLICY, "Probability ratio",
        "Policy over sampling policy: the largest ratio of a response token in a step.",
        f.metric(("ratio/max", "max"), ("ratio/mean", "mean"), zero=True, unit="ratio"),
        unseen="Beside it, the mean.",
    ),
    Panel(
        "grad_norm", POLICY, "Gradient norm",
        "Global norm before clipping.",
        f.metric(("grad_norm", ""), zero=True, unit="norm"),
    ),
    Panel(
        "mismatch", POLICY, "Sampler against learner",
        "Absolute difference of their log-probabilities of the same tokens; logarithmic.",
        f.metric(("logprob_diff/max", "max"), ("logprob_diff/mean", "mean"), log=True, unit="difference, nats"),
    ),
    Panel(
        "selection", SELECTION, "What selection kept and dropped",
        "Each point is a sampled prompt at the mean length of its responses.",
        f.selection_scatter, single=True, wide=True,
    ),
    Panel(
        "reasons", SELECTION, "What became of prompts",
        "Share of sampled prompts kept, or dropped and why.",
        f.selection_reasons, single=True,
    ),
    Panel(
        "acceptance", SELECTION, "Acceptance rate",
        "Share of generated tokens that belong to kept prompts.",
        f.acceptance,
    ),
    Panel(
        "time", COST, "Where the time goes",
        "Share of the seconds of a step.",
        f.time_split, single=True,
    ),
    Panel(
        "throughput", COST, "Throughput",
        "Generated tokens per second of the whole step.",
        f.metric(("tokens_per_second", ""), zero=True, unit="tokens per second"),
    ),
    Panel(
        "utilisation", COST, "Decode slots in use",
        "Share of slot-steps of the sampler that produced a token.",
        f.metric(("perf/slot_utilisation", ""), unit="slot-steps, %", **SHARE),
    ),
    Panel(
        "padding", COST, "Padding",
        "Share of the positions of the update's rows that hold no token.",
        f.metric(("perf/padding_waste", "packed"), ("perf/padding_waste_unpacked", "unpacked"), unit="positions, %",
                 **SHARE),
        unseen="And what it would be with one sequence a row, padded to the longest.",
    ),
)  # fmt: skip
