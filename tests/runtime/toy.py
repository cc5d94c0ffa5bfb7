"""A trainer in thirty lines with everything that an exact resume has to bring back: the chaos harness runs
it.

    python -m tests.runtime.toy RUN_DIR STEPS EVERY
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxrl.runtime.checkpoint import Checkpointer
from jaxrl.runtime.metrics import MetricsWriter
from jaxrl.runtime.rundir import open_run_dir
from jaxrl.runtime.signals import StopRequest

OPTIMIZER = optax.adamw(1e-2)


def initial_state():
    params = {"w": jax.random.normal(jax.random.key(1), (64, 64)), "b": jnp.zeros(64, jnp.bfloat16)}
    return {"params": params, "opt": OPTIMIZER.init(params), "key": jax.random.key(2), "step": jnp.int32(0)}


@jax.jit
def update(state, batch):
    key, noise = jax.random.split(state["key"])

    def loss_fn(p):
        y = jnp.tanh(batch @ p["w"] + p["b"].astype(jnp.float32))
        return jnp.mean((y - 0.1 * jax.random.normal(noise, y.shape)) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state["params"])
    updates, opt = OPTIMIZER.update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    return {"params": params, "opt": opt, "key": key, "step": state["step"] + 1}, loss


def main(run_dir, steps, every):
    run = open_run_dir(run_dir, resume=True)
    with Checkpointer(run.checkpoints, keep_last=2, before_commit=run.publish) as saver, StopRequest() as stop:
        state, data, pending = initial_state(), np.random.default_rng(3), np.zeros((0, 64), np.float32)
        found = saver.restore(state)
        if found:
            state, pending = found.arrays, np.array(found.host["pending"], np.float32).reshape(-1, 64)
            data.bit_generator.state = found.host["data"]
        writer = MetricsWriter(run.local, (), state=found and found.host["metrics"])
        for step in range(int(state["step"]) + 1, steps + 1):
            # Surplus rows wait for the next step: how many depends on the whole past of the data stream.
            rows = data.normal(size=(data.integers(4, 12), 64)).astype(np.float32)
            pending = np.concatenate([pending, rows])
            batch, pending = pending[:4], pending[4:12]
            state, loss = update(state, batch)
            writer.write(step, {"loss": loss, "pending": len(pending), "time/step": 0.0 + id(state) % 97})
            stopping = stop.agreed(step)
            if step % every == 0 or step == steps or stopping:
                host = {"data": data.bit_generator.state, "metrics": writer.state(), "pending": pending.tolist()}
                saver.save(step, state, host)
            if stopping:
                break
        saver.wait()
        writer.close()
        return stop.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
