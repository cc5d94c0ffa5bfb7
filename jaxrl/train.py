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
from jaxrl.learner import nonfinite
from jaxrl.learner.learner import Learner
from jaxrl.learner.performance import performance
from jaxrl.rollout.requests import SamplingParams
from jaxrl.rollout_metrics import sample_rows
from jaxrl.runtime import cli, distributed
from jaxrl.runtime.compiles import Compiles
from jaxrl.runtime.config import mismatch_warning, parse_config, validate
from jaxrl.runtime.console import Console, before_after
from jaxrl.runtime.mesh import num_batch_shards, own_shards
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
    with contextlib.ExitStack() as stack:
        trainer = Trainer(config, stack)
        trainer.warm_up_sampler()
        while trainer.step < config.steps:
            code = trainer.train_step()
            if code is not None:
                return code
    if distributed.is_main():
        closing_table(trainer.run)
    return 0


class Trainer:
    """The parts of a run and its progress: step, state, reference (a frozen model, or None), rollbacks.

    Begins a new run or continues from the newest checkpoint. `stack` closes at the end what must be closed.
    """

    def __init__(self, config, stack: contextlib.ExitStack):
        # ---- the parts
        self.config, self.stack, self.main = config, stack, distributed.is_main()
        self.mesh, self.tokenizer = build.mesh(config), build.tokenizer(config)
        self.decoder = build.decoder_config(config, self.tokenizer)
        self.task = stack.enter_context(open_task(config, self.tokenizer))
        self.sampler = build.sampler(config, self.decoder, self.tokenizer, self.mesh)
        self.learner = Learner(config, self.decoder, self.mesh)
        self.collector = Collector(config, self.task, self.tokenizer, self.sampler)
        self.data = {"task.data": digest(self.task.train), "task.eval_data": digest(self.task.held_out)}

        # ---- the run directory: a new run, or the newest checkpoint of this one
        self.run = build.run_dir(config)
        if self.run.lock:
            stack.callback(self.run.close)
        self.checkpoints = stack.enter_context(build.checkpointer(config, self.run))
        found = self.checkpoints.restore(self.learner.abstract_state())
        self.step, host = (found.step, found.host) if found else (0, {})
        self.rollbacks, self.base = host.get("rollbacks", 0), host.get("base", "")
        self.writer = stack.enter_context(contextlib.closing(build.writer(config, self.run, host.get("writer"))))
        self.console = stack.enter_context(Console(config.steps, self.step, enabled=self.main))
        self.compiles = stack.enter_context(contextlib.closing(Compiles(self.console.note)))
        self.stop = stack.enter_context(StopRequest(config.watchdog.grace))
        self.watchdog = stack.enter_context(build.watchdog(config, self.run))
        self.sampler.on_progress = self.watchdog.beat
        self.console.note(mismatch_warning(config))
        if found:
            self._continue(found)
        else:
            self._begin()

    def _describe(self) -> list[str]:
        """Write what others need to read the run; returns one line for each setting that has changed since."""
        return build.describe_run(self.run, self.config, self.decoder, self.tokenizer, self.step)

    def _begin(self) -> None:
        """Begin a new run: parameters, warm start, held-out results before RL, checkpoint 0."""
        config, learner = self.config, self.learner
        self._describe()
        self.console.note(f"{build.describe(config, self.decoder, self.mesh)}\nrun directory: {self.run.root}")
        params = build.params_maker(config, self.decoder, self.mesh)()
        params = sft.warm_start(config, self.decoder, self.mesh, params, self.tokenizer, note=self._note)
        self.state = learner.init(params)
        # before the save: a restart needs them
        self.base = build.keep_base(config, self.run, learner)
        self.reference = build.reference(config, self.run, learner, self.state.params)
        record = self.evaluate() | self.compiles.take()
        self.writer.write(0, record)
        if "eval/accuracy" in record:
            self.console.note(f"before RL: accuracy {record['eval/accuracy']:.3f}")
        self.save(record)

    def _continue(self, found) -> None:
        """Continue from the checkpoint `found`. What may refuse to comes first: the run must stay as it was then."""
        self.state = found.arrays
        self.collector.restore(found.host["collector"], found.blobs)
        build.find_base(self.config, self.run, self.learner, self.decoder, self.mesh, identity=self.base)
        self.reference = build.reference(self.config, self.run, self.learner, None)
        then, changed = found.host.get("data", {}), self._describe()
        changed += [f"config.{k}: its rows are others than before" for k, v in then.items() if v != self.data[k]]
        self.console.note("\n".join([f"continuing {self.run.root} after step {self.step}", *changed]))

    def _note(self, text: str) -> None:
        self.console.note(text)
        self.watchdog.beat()

    def sampling_params(self):
        """The current policy in the sampler's layout."""
        return self.sampler.layout(self.learner.weights(self.state))

    def evaluate(self) -> dict[str, float]:
        """Held-out results of the current policy, "eval/..."."""
        return evaluate_task(self.config, self.sampler, self.sampling_params(), self.tokenizer, self.task)

    def save(self, record: dict) -> None:
        """Start a checkpoint of this step. record: its metrics."""
        numbers, waiting = self.collector.state()
        host = {"collector": numbers, "writer": self.writer.state() if self.main else {}, "rollbacks": self.rollbacks,
                "base": self.base, "data": self.data}
        self.checkpoints.save(self.step, self.state, distributed.broadcast(host), metrics=record, blobs=waiting)

    def warm_up_sampler(self) -> None:
        """Compile the sampler's shapes before step 1, if config.sampling.warmup says so."""
        s = self.config.sampling
        if s.warmup:
            continued = bool(s.carry_over or s.prefetch)
            settings = (sampling_settings(self.config), SamplingParams())  # the latter: evaluation truncates nothing
            seconds = self.sampler.warmup(self.sampling_params(), settings, continued)
            self.console.note(f"sampler: {len(self.sampler.shapes)} shapes ready in {seconds:.0f} s")

    # ---- one step

    def train_step(self) -> int | None:
        """Rollouts, advantages, updates, records; returns the exit code if the run ends here, else None."""
        config, learner, begin = self.config, self.learner, time.perf_counter()
        collected = self.collector.collect(self.sampling_params(), self.step)
        shards = num_batch_shards(self.mesh)
        batches = make_batches(collected.chosen, config, self.step, shards, own_shards(self.mesh))
        weights = learner.weights(self.state)
        chosen = with_kl_penalty(collected.chosen, batches, config, learner, params=weights, reference=self.reference)
        batches = fill_in(batches, chosen := with_advantages(chosen, config))
        del weights  # the update may take their place
        begin_update = time.perf_counter()
        self.state, learned = learner.update(self.state, [b.data for b in batches], self.reference)
        self.step += 1
        skipped = learned.get("nonfinite/updates", ())
        if skipped and self._rolled_back({i: nonfinite.whole_batch(batches[i].data, self.mesh) for i in skipped}):
            return None
        now = time.perf_counter()
        record = {**collected.metrics, **performance([b.packing for b in batches], learner, now - begin_update)}
        record |= {**learned, "time/update": now - begin_update, "time/step": now - begin, **self.checkpoints.timings}
        record["tokens_per_second"] = record["generated_tokens"] / record["time/step"]
        last = self.step == config.steps
        if self.step % config.eval.every == 0 or last:
            record |= self.evaluate()
        record |= self.compiles.take()
        stopping = self.stop.agreed(self.step)
        self.writer.write(self.step, record)
        self.console.step({"step": self.step, **record})
        self.watchdog.beat(self.step, record)
        if self.main and config.log.samples:
            rows = sample_rows(collected, chosen, self.tokenizer, config.log.samples)
            self.run.write_samples(self.step, rows)
        # While updates are being skipped nothing is saved: the run should not go back to such a state.
        in_trouble = skipped and int(self.state.skipped_in_a_row) and config.nonfinite.max_in_a_row
        if last or ((stopping or self.step % config.checkpoint.every == 0) and not in_trouble):
            self.save(record)
            if (last or stopping) and self.checkpoints.wait() != self.step:
                return EXIT_UNSAVED
        return self.stop.exit_code if stopping and not last else None

    def _rolled_back(self, skipped: dict) -> bool:
        """Store the mini-batches of skipped updates; True if too many in a row were skipped and the run went back."""
        config, in_a_row = self.config, int(self.state.skipped_in_a_row)
        if self.main:
            nonfinite.store_batches(self.run.local, self.step, skipped)
        limit = config.nonfinite.max_in_a_row
        if not nonfinite.must_roll_back(in_a_row, limit, self.rollbacks, self.step, self.run.root):
            return False
        self.state, ahead, self.rollbacks = None, self.collector.position, self.rollbacks + 1  # frees the memory first
        found = self.checkpoints.restore(self.learner.abstract_state())
        if not found:
            raise UserError(f"step {self.step}: {in_a_row} updates in a row were not finite, and no checkpoint could "
                            f"be saved in {self.run.root} to go back to")
        self.console.note(f"{in_a_row} updates in a row were not finite: back from step {self.step} to {found.step}")
        self.state, self.step = found.arrays, found.step
        self.collector.restore(found.host["collector"], found.blobs)
        self.collector.position = ahead  # continue with other problems
        self.writer.close()
        self.writer = build.writer(config, self.run, found.host["writer"], rewound=True)
        self.stack.enter_context(contextlib.closing(self.writer))
        self._describe()
        return True


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
