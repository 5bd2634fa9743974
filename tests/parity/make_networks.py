"""Makes the networks and images that the parity tests attack.

    python -m experiments.defend mnist --workdir runs/mnist
    python tests/parity/make_networks.py runs/mnist

`plain.npz` is the teacher at T = 1 and `distilled.npz` the student at T = 100 of that run, seed 0;
`robust.npz`, of half the width, is trained here on PGD examples (Madry et al. 2018; linf, eps 0.1).
`images.npz` holds the first test images. All need the prepared MNIST set.
"""

import pathlib
import sys

import jax
import numpy as np

from experiments.recipes import MNIST
from jdistill import attacks, data, metrics, nets, train
from jdistill.checkpoint import Checkpointer
from jdistill.typing import Batch

FOLDER = pathlib.Path(__file__).parent
NUM_IMAGES = 520
EPS, STEPS, EPOCHS, BATCH = 0.1, 7, 4, 100


def main(workdir: str) -> None:
    """Write the four files."""
    mnist = data.load("mnist")
    inputs, labels = (column[:NUM_IMAGES] for column in mnist.test)
    np.savez_compressed(
        FOLDER / "images.npz",
        inputs=np.rint(inputs * 255).astype(np.uint8),
        labels=labels.astype(np.uint8),
    )
    for name, place in {"plain": "T1/generation0", "distilled": "T100/generation2"}.items():
        step, state = start(MNIST.model())
        with Checkpointer(f"{workdir}/checkpoints/seed0/{place}") as checkpointer:
            found = checkpointer.restore_latest(state)
        assert found is not None, place
        save(name, step, found.state, mnist)
    save("robust", *adversarially_trained(mnist), mnist)


def start(model: nets.ConvNet) -> tuple[train.TrainStep, train.TrainState]:
    """A training step and a fresh state."""
    step = train.make_train_step(nets.apply_fn(model), train.sgd(0.02))
    params, _ = nets.init(model, jax.random.key(0), (28, 28, 1))
    return step, train.create_state(step, params, jax.random.key(0))


def adversarially_trained(mnist: data.Dataset) -> tuple[train.TrainStep, train.TrainState]:
    """A network trained on PGD examples of itself alone."""
    step, state = start(nets.mnist_net(width=0.5, dropout_rate=0.0))
    compiled = jax.jit(step)
    for epoch in range(EPOCHS):
        order = np.random.default_rng(epoch).permutation(len(mnist.train.labels))
        for number, batch in enumerate(data.batches(*mnist.train, batch_size=BATCH, order=order)):
            found = attacks.pgd(
                train.logits_fn(step, state),
                jax.random.fold_in(state.key, state.step),
                batch.inputs,
                batch.labels,
                # Half of it in the first epoch: at once the whole eps is too hard to begin with.
                eps=EPS / 2 if epoch == 0 else EPS,
                num_steps=STEPS,
            )
            batch = Batch(found.inputs, batch.labels, None, batch.mask)
            state, sums = compiled(state, batch, train.hard_loss())
            if number % 50 == 0:
                print(f"epoch {epoch} step {number}: {float(sums['correct']) / BATCH:.2f}")
    return step, state


def save(name: str, step: train.TrainStep, state: train.TrainState, mnist: data.Dataset) -> None:
    """Write the weights, and print how good they are."""
    logits = train.predict(train.logits_fn(step, state), mnist.test.inputs)
    print(name, metrics.accuracy(logits, mnist.test.labels))
    flat = {
        f"{layer}/{kind}": np.asarray(value, np.float32)
        for layer, kinds in state.params.items()
        for kind, value in kinds.items()
    }
    np.savez_compressed(FOLDER / f"{name}.npz", **flat)


if __name__ == "__main__":
    main(*sys.argv[1:])
