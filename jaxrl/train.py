"""RL with verifiable rewards, top to bottom.

    python -m jaxrl.train --config=configs/quickstart.py --config.algorithm.loss=maspo

One step: prompts -> rollouts -> grades -> selection -> packed mini-batches, advantages -> updates.
"""

from __future__ import annotations

import contextlib
import time

from jaxrl import build, sft
from jaxrl.batch import fill_in, make_batches, with_advantages, with_kl_penalty
from jaxrl.collect import Collector, sampling_settings
from jaxrl.errors import UserError
from jaxrl.evaluate import evaluate_task
from jaxrl.learner.learner import Learner
from jaxrl.learner.performance import performance
from jaxrl.rollout.requests import SamplingParams
from jaxrl.rollout_metrics import sample_rows
from jaxrl.runtime import cli, distributed, nonfinite
from jaxrl.runtime.compiles import Compiles
from jaxrl.runtime.config import mismatch_warning, parse_config, validate
from jaxrl.runtime.console import Console, before_after
from jaxrl.runtime.mesh import num_batch_shards
from jaxrl.runtime.metrics import read_metrics
from jaxrl.runtime.rundir import RunDir
from jaxrl.runtime.signals import EXIT_UNSAVED, StopRequest
from jaxrl.tasks.data import digest
from jaxrl.tasks.load import open_task


def train(config) -> int:
    """Run (or continue) the training that `config` describes; returns the exit code of the process.

    Raises UserError, before anything is compiled, when the configuration cannot run.
    """
    validate(config)
    build.start_backend(config)
    main = distributed.is_main()
    with contextlib.ExitStack() as stack:
        # ---- the parts
        mesh, tokenizer = build.mesh(config), build.tokenizer(config)
        decoder = build.decoder_config(config, tokenizer)
        task = stack.enter_context(open_task(config, tokenizer))
        sampler = build.sampler(config, decoder, tokenizer, mesh)
        learner = Learner(config, decoder, mesh)
        collector = Collector(config, task, tokenizer, sampler)
        data = {"task.data": digest(task.train), "task.eval_data": digest(task.held_out)}

        # ---- the run directory: a new run, or the newest checkpoint of this one
        run = build.run_dir(config)
        if run.lock:
            stack.callback(run.close)
        checkpoints = stack.enter_context(build.checkpointer(config, run))
        found = checkpoints.restore(learner.abstract_state())
        step, host = (found.step, found.host) if found else (0, {})
        changed = build.describe_run(run, config, decoder, tokenizer, step)
        rollbacks = host.get("rollbacks", 0)
        writer = stack.enter_context(contextlib.closing(build.writer(config, run, host.get("writer"))))
        console = stack.enter_context(Console(config.steps, step, enabled=main))
        compiles = stack.enter_context(contextlib.closing(Compiles(console.note)))
        stop = stack.enter_context(StopRequest(config.watchdog.grace))
        watchdog = stack.enter_context(build.watchdog(config, run))
        sampler.on_progress = watchdog.beat

        def note(text):
            console.note(text)
            watchdog.beat()

        def evaluate(state):
            return evaluate_task(config, sampler, sampler.layout(learner.weights(state)), tokenizer, task)

        def save(state, step, record):
            numbers, waiting = collector.state()
            host = {"collector": numbers, "writer": writer.state() if main else {}, "rollbacks": rollbacks,
                    "base": base, "data": data}
            checkpoints.save(step, state, distributed.broadcast(host), metrics=record, blobs=waiting)

        console.note(mismatch_warning(config))
        if found:
            others = [k for k, v in host.get("data", {}).items() if v != data[k]]
            changed += [f"config.{k}: its rows are others than before" for k in others]
            console.note("\n".join([f"continuing {run.root} after step {step}", *changed]))
            state = found.arrays
            collector.restore(host["collector"], found.blobs)
            base = host.get("base", "")
            build.find_base(config, run, learner, decoder, mesh, base)
            reference = build.reference(config, run, learner, None)
        else:
            console.note(f"{build.describe(config, decoder, mesh)}\nrun directory: {run.root}")
            params = build.params_maker(config, decoder, mesh)()
            state = learner.init(sft.warm_start(config, decoder, mesh, params, tokenizer, note))
            # before the save: a restart needs them
            base = build.keep_base(config, run, learner)
            reference = build.reference(config, run, learner, state.params)
            record = evaluate(state) | compiles.take()
            writer.write(0, record)
            console.note(f"before RL: accuracy {record['eval/accuracy']:.3f}" if "eval/accuracy" in record else "")
            save(state, 0, record)

        if config.sampling.warmup:
            continued = bool(config.sampling.carry_over or config.sampling.prefetch)
            settings = (sampling_settings(config), SamplingParams())  # the latter is evaluation's: nothing is cut off
            seconds = sampler.warmup(sampler.layout(learner.weights(state)), settings, continued)
            console.note(f"sampler: {len(sampler.shapes)} shapes ready in {seconds:.0f} s")

        # ---- the loop
        while step < config.steps:
            begin = time.perf_counter()
            collected = collector.collect(sampler.layout(learner.weights(state)), step)
            batches = make_batches(collected.chosen, config, step, num_batch_shards(mesh))
            chosen = with_kl_penalty(collected.chosen, batches, config, learner, learner.weights(state), reference)
            batches = fill_in(batches, chosen := with_advantages(chosen, config))
            begin_update = time.perf_counter()
            state, learned = learner.update(state, [b.data for b in batches], reference)
            step += 1
            in_a_row = 0
            if skipped := learned.get("nonfinite/updates"):
                in_a_row = int(state.skipped_in_a_row)
                if main:
                    nonfinite.store_batches(run.local, step, {i: batches[i].data for i in skipped})
                if nonfinite.must_roll_back(in_a_row, config.nonfinite.max_in_a_row, rollbacks, step, run.root):
                    state, ahead, rollbacks = None, collector.position, rollbacks + 1  # frees the memory first
                    found = checkpoints.restore(learner.abstract_state())
                    if not found:
                        raise UserError(f"step {step}: {in_a_row} updates in a row were not finite, and no checkpoint "
                                        f"could be saved in {run.root} to go back to")
                    console.note(f"{in_a_row} updates in a row were not finite: back from step {step} to {found.step}")
                    state, step = found.arrays, found.step
                    collector.restore(found.host["collector"], found.blobs)
                    collector.position = ahead  # on with other problems
                    writer.close()
                    writer = build.writer(config, run, found.host["writer"], rewound=True)
                    stack.enter_context(contextlib.closing(writer))
                    build.describe_run(run, config, decoder, tokenizer, step)
                    continue
            now = time.perf_counter()
            record = {**collected.metrics, **performance(batches, learner, now - begin_update), **learned}
            record |= {"time/update": now - begin_update, "time/step": now - begin, **checkpoints.timings}
            record["tokens_per_second"] = record["generated_tokens"] / record["time/step"]
            last = step == config.steps
            if step % config.eval.every == 0 or last:
                record |= evaluate(state)
            record |= compiles.take()
            stopping = stop.agreed(step)
            writer.write(step, record)
            console.step({"step": step, **record})
            watchdog.beat(step, record)
            if main and config.log.samples:
                run.write_samples(step, sample_rows(collected, chosen, tokenizer, config.log.samples))
            # In the middle of skipped updates nothing is saved: that is not a state to go back to.
            in_trouble = in_a_row and config.nonfinite.max_in_a_row
            if last or ((stopping or step % config.checkpoint.every == 0) and not in_trouble):
                save(state, step, record)
                if (last or stopping) and checkpoints.wait() != step:
                    return EXIT_UNSAVED
            if stopping and not last:
                return stop.exit_code
    if main:
        closing_table(run)
    return 0


def closing_table(run: RunDir) -> None:
    """Print held-out results before and after, and where everything is."""
    records = [r for r in read_metrics(run.metrics) if "eval/accuracy" in r]
    if records:
        first, last = records[0], records[-1]
        keys = [k for k, v in last.items() if k.startswith("eval/") and isinstance(v, int | float)]
        before_after([(k.removeprefix("eval/"), first.get(k), last[k]) for k in keys])
    print(f"run directory: {run.root}")


def main(argv: list[str]) -> int:
    """Train what the command line describes; returns the exit code (docs/reliability.md lists them)."""
    return train(parse_config(argv))


if __name__ == "__main__":
    cli.run(main)
