"""A process of several that train one network: ADDRESS, how many, its number, MODE, FILE, changes.

A change is of this process alone: `name=value`, an argument of `fit`; `rate=value`, the learning
rate; `temperature=value`, of the loss; `pause`: it stops for ever in the middle; `alone`: it trains
on its own devices; `exit`: it ends instead of training. Process 0 writes the losses and weights.
"""

import json
import sys
import time

import jax
import numpy as np

from jdistill import nets, parallel, runtime, train


def trained(mode, devices=None, callback=None, rate=0.1, temperature=2.0, **changed):
    """Losses of each epoch and weights of a network with dropout; the last batch is ragged."""
    rng = np.random.default_rng(0)
    inputs = rng.uniform(0, 1, (101, 8, 8, 1)).astype(np.float32)
    labels = rng.integers(0, 10, 101).astype(np.int32)
    model = nets.digits_net(width=0.125)
    step = train.make_train_step(nets.apply_fn(model), train.sgd(rate))
    params, _ = jax.jit(nets.init, static_argnums=(0, 2))(model, jax.random.key(0), (8, 8, 1))
    losses = []

    def keep(event):
        if event["event"] == "epoch":
            losses.append(event["loss"])
        if callback is not None:
            callback(event)

    state = train.fit(
        step,
        train.create_state(step, params, jax.random.key(1)),
        (inputs, labels),
        train.hard_loss(temperature),
        mode=mode,
        devices=devices,
        callback=keep,
        **{"num_epochs": 4, "batch_size": 20, **changed},
    )
    return losses, [np.asarray(leaf) for leaf in jax.tree.leaves(parallel.local(state.params))]


def main(address, num_processes, number, mode, file, *changes):
    """Join the others, and train."""
    runtime.initialize(address, int(num_processes), int(number), timeout_s=20, heartbeat_s=10)

    def show(event):
        if "pause" in changes and event["event"] == "step" and event["step"] == 3:
            print("pausing", flush=True)
            time.sleep(600)

    changed = {
        name: json.loads(value)
        for name, _, value in (change.partition("=") for change in changes if "=" in change)
    }
    if "exit" in changes:
        sys.exit("ended by itself")
    devices = jax.local_devices() if "alone" in changes else None
    losses, weights = trained(changed.pop("mode", mode), devices, callback=show, **changed)
    if runtime.is_main_process():
        np.savez(file, losses, *weights)


if __name__ == "__main__":
    runtime.run_main(main, *sys.argv[1:])
