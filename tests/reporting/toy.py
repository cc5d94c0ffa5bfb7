"""A made-up run directory with every metric a report can show."""

import json
import pathlib

import numpy as np

from jaxrl.runtime.metrics import encode


def write_run(
    root: pathlib.Path, seed: int = 0, loss: str = "grpo", steps: int = 60, gain: float = 0.45
) -> pathlib.Path:
    root.mkdir(parents=True)
    rng = np.random.default_rng([seed, len(loss)])
    config = {"seed": seed, "run_dir": str(root), "steps": steps, "task": {"name": "dial"}}
    config |= {"algorithm": {"loss": loss, "selection": "accuracy+lspo", "advantage": "grpo"}}
    (root / "config.json").write_text(json.dumps(config))
    lines = []
    for step in range(steps + 1):
        rise = 1 - np.exp(-step / 15)
        record = {"step": step}
        if step % 10 == 0:
            a = 0.4 + gain * rise + rng.normal(0, 0.01)
            record |= {"eval/accuracy": a, "eval/accuracy_low": a - 0.04, "eval/accuracy_high": a + 0.04}
        if step:
            lengths = np.clip(rng.lognormal(1.7 + 0.6 * rise, 0.4, 256), 1, 24).round()
            edges, counts = np.unique(lengths, return_counts=True)
            means = np.clip(rng.lognormal(1.7 + 0.6 * rise, 0.3, 48), 2, 22)
            p30, p65, p95 = np.percentile(means, (30, 65, 95))
            kept = (means <= p30) | ((means >= p65) & (means <= p95))
            record |= {
                "reward/mean": 0.4 + gain * rise + rng.normal(0, 0.03),
                "reward/std": 0.5 - 0.1 * rise,
                "reward/correct/mean": 0.4 + gain * rise,
                "reward/length/mean": -0.1 * rise,
                "accuracy": 0.4 + gain * rise + rng.normal(0, 0.03),
                "zero_std_fraction": 0.2 + 0.4 * rise,
                "entropy": 0.5 - 0.4 * rise + rng.normal(0, 0.01),
                "kl": 0.02 * rise,
                "policy/old_kl": 0.002 * rng.random(),
                "clip_fraction/low": 0.004 * rng.random(),
                "clip_fraction/high": 0.01 * rng.random(),
                "response_length/mean": lengths.mean(),
                "response_length/p10": np.percentile(lengths, 10),
                "response_length/p50": np.median(lengths),
                "response_length/p90": np.percentile(lengths, 90),
                "ratio/mean": 1.0,
                "ratio/max": 1.5 + rng.random(),
                "perf/padding_waste": 0.03,
                "perf/padding_waste_unpacked": 0.4,
                "truncated_fraction": 0.01 * rng.random(),
                "grad_norm": 0.3 + 0.1 * rng.random(),
                "logprob_diff/mean": 1e-6,
                "logprob_diff/max": 1e-5,
                "acceptance_rate": 0.5 - 0.1 * rise,
                "tokens_per_second": 9000 + 500 * rng.random(),
                "generated_tokens": int(lengths.sum()) * 3,
                "time/rollout": 0.4,
                "time/grade": 0.02,
                "time/update": 0.3 + 0.05 * rng.random(),
                "time/step": 0.8,
                "perf/slot_utilisation": 0.8,
                "hist/length": [[int(e), int(c)] for e, c in zip(edges, counts, strict=True)],
                "selection/kept_lengths": means[kept].round(2).tolist(),
                "selection/dropped_lengths": means[~kept].round(2).tolist(),
                "selection/dropped_reasons": ["middle" if m < p65 else "longest" for m in means[~kept]],
                "selection/dropped/accuracy/all_correct": int(10 * rise),
                "selection/dropped/lspo/middle": int((~kept).sum()),
            }
        lines.append(encode({k: v.item() if isinstance(v, np.generic) else v for k, v in record.items()}))
    (root / "metrics.jsonl").write_bytes(b"".join(lines))
    (root / "samples").mkdir()
    for step in (1, steps):
        rows = [
            {
                "step": step,
                "id": "p/0",
                "prompt": "dial 7: a+5 b-6 ?",
                "text": " a=9 b=3 => 3.",
                "reward": 1.0,
                "tokens": [" a=", "9", " b=", "3", " => ", "3", "."],
                "logprobs": [-0.1, -0.9, -0.02, -2.5, -0.4, -0.0, -0.01],
                "advantage": 0.9,
                "correct": 1.0,
                "length": 7,
                "finish": "eos",
                "selected": True,
                "reason": "",
            },
            {
                "step": step,
                "id": "p/1",
                "prompt": "is 1 < 2 & 3 > 2?",
                "text": "<b>no</b>",
                "reward": 0.0,
                "tokens": ["<b>", "no", "</b>"],
                "logprobs": [-3.0, -5.0, None],
                "advantage": -1.1,
                "correct": 0.0,
                "length": 3,
                "finish": "length",
                "selected": False,
                "reason": "middle",
            },
        ]
        (root / "samples" / f"step_{step:08d}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return root
