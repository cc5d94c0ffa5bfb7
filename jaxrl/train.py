"""RL with verifiable rewards, top to bottom.

    python -m jaxrl.train --config=configs/quickstart.py --config.algorithm.loss=maspo

One step: prompts -> completions -> grades -> selected groups -> advantages -> packed batch -> updates.
"""

from __future__ import annotations

import contextlib
import logging
import time

import jax

from jaxrl import build, sft
from jaxrl.batch import make_batches, sample_rows
from jaxrl.collect import Collector
from jaxrl.evaluate import evaluate_task
from jaxrl.learner.learner import Learner
from jaxrl.runtime import cli, distributed
from jaxrl.runtime.checkpoint import Checkpointer
from jaxrl.runtime.config import parse_config, validate
from jaxrl.runtime.console import Console, before_after
from jaxrl.runtime.metrics import MetricsWriter, read_metrics
from jaxrl.runtime.rundir import RunDir, open_run_dir
from jaxrl.runtime.signals import StopRequest
from jaxrl.runtime.watchdog import Watchdog

log = logging.getLogger(__name__)


def train(config) -> int:
    """Run (or continue) the training that `config` describes; returns the process's exit code.

    Raises UserError, before anything is compiled, when the configuration cannot run.
    """
    validate(config)
    if config.distributed:
        distributed.initialize()
    if config.compilation_cache:
        cli.use_compilation_cache()
    with contextlib.ExitStack() as stack:
        # ------------------------------------------------------------------ model, task, programs
        mesh = build.mesh(config)
        decoder, tokenizer, make_params = build.model(config, mesh)
        task = stack.enter_context(build.task(config, tokenizer))
        run = open_run_dir(config.run_dir, config.resume) if distributed.is_main() else RunDir(config.run_dir)
        build.save_model_card(run, decoder, tokenizer, config)
        sampler = build.sampler(config, decoder, tokenizer, mesh)
        learner = Learner(config, decoder, mesh)
        collector = Collector(config, task, tokenizer, sampler)

        # ------------------------------------------------------------------ start or resume
        checkpoints = stack.enter_context(build.checkpointer(config, run))
        found = checkpoints.restore(learner.abstract_state())
        host = found.host if found else {}
        writer = stack.enter_context(contextlib.closing(build.writer(config, run, host.get("writer"))))
        console = stack.enter_context(Console(config.steps, host.get("step", 0), enabled=distributed.is_main()))
        stop = stack.enter_context(StopRequest())
        watchdog = stack.enter_context(build.watchdog(config, run))
        evaluate = lambda state, step: evaluate_task(config, sampler, sampler.layout(state.params), tokenizer, task, step)
        if found:
            console.note(f"continuing {run.root} after step {found.step}")
            state, step = found.arrays, found.step
            collector.restore(host["collector"])
            run.drop_samples_after(step)
        else:
            console.note(f"{build.describe(config, decoder, mesh)}; run directory {run.root}")
            state, step = learner.init(make_params()), 0
            state = sft.warm_start(config, learner, state, tokenizer, task, console)
            writer.write(0, evaluate(state, 0))
            checkpoints.save(0, state, {"step": 0, "collector": collector.state(), "writer": writer.state()})
        reference = learner.reference(run, state, fresh=not found)

        # ------------------------------------------------------------------ the loop
        while step < config.steps:
            begin = time.perf_counter()
            collected = collector.collect(sampler.layout(state.params), step)
            batches = make_batches(collected.chosen, config, learner, step)
            start_update = time.perf_counter()
            state, learned = learner.update(state, batches, reference)
            step += 1
            record = {**collected.metrics, **learned, "time/update": time.perf_counter() - start_update}
            record["time/step"] = time.perf_counter() - begin
            record["tokens_per_second"] = record["generated_tokens"] / record["time/step"]
            stopping = stop.agreed(step)
            if step % config.eval.every == 0 or step == config.steps:
                record |= evaluate(state, step)
            writer.write(step, record)
            console.step({"step": step, **record})
            run.write_samples(step, sample_rows(collected, batches, tokenizer, config.log.samples))
            watchdog.beat(step, record)
            if step % config.checkpoint.every == 0 or step == config.steps or stopping:
                host = {"step": step, "collector": collector.state(), "writer": writer.state()}
                checkpoints.save(step, state, host, metrics=record)
            if stopping:
                checkpoints.wait()
                return stop.exit_code
        checkpoints.wait()
    if distributed.is_main():
        report(run)
    return 0


def report(run: RunDir) -> None:
    """Print the table of held-out results before and after, and where everything is."""
    records = [r for r in read_metrics(run.metrics) if "eval/accuracy" in r]
    keys = [k for k in records[-1] if k.startswith("eval/") and isinstance(records[-1][k], int | float)]
    before_after([(k.removeprefix("eval/"), records[0].get(k), records[-1].get(k)) for k in keys])
    print(f"run directory: {run.root}")


def main(argv: list[str]) -> int:
    return train(parse_config(argv))


if __name__ == "__main__":
    cli.run(main)
