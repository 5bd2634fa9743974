"""Makes the networks and images that the parity tests attack.

    python -m experiments.defend mnist --workdir runs/mnist
    python tests/parity/make_networks.py runs/mnist

`plain.npz` is the teacher at T = 1 and `distilled.npz` the student at T = 100 of that run, seed 0;
`robust.npz`, of half the width, is trained here on PGD examples (Madry et al. 2018; linf, eps 0.1).
`plain_small.npz`, `distilled_small.npz` and `robust_small.npz` (linf, eps 0.3) are the same of a
quarter or half of the width, for the attacks that take hours on the papers' network. `images.npz`
holds the first test images. All need the prepared MNIST set.
"""

import pathlib
import sys
from collections.abc import Sequence

import jax
import numpy as np

from jdistill import attacks, data, distill, metrics, nets, study, train
from jdistill.checkpoint import Checkpointer
from jdistill.typing import Batch

FOLDER = pathlib.Path(__file__).parent
NUM_IMAGES = 520
STEPS, BATCH = 7, 100
# The radius of each epoch: at once the whole one is too hard to begin with.
RADII = {"robust": (0.05, 0.1, 0.1, 0.1), "robust_small": (0.05, 0.1, 0.2, 0.3, 0.3, 0.3)}


def main(workdir: str) -> None:
    """Write the files."""
    mnist = data.load("mnist")
    inputs, labels = (column[:NUM_IMAGES] for column in mnist.test)
    np.savez_compressed(
        FOLDER / "images.npz",
        inputs=np.rint(inputs * 255).astype(np.uint8),
        labels=labels.astype(np.uint8),
    )
    for name, place in {"plain": "T1/generation0", "distilled": "T100/generation2"}.items():
        step, state = start(study.RECIPES["mnist"].model())
        with Checkpointer(f"{workdir}/checkpoints/seed0/{place}") as checkpointer:
            found = checkpointer.restore_latest(state)
        assert found is not None, place
        save(name, step, found.state, mnist)
    for name, radii in RADII.items():
        save(name, *adversarially_trained(mnist, radii), mnist)
    save("plain_small", *distilled(mnist, temperature=1.0, num_generations=1), mnist)
    save("distilled_small", *distilled(mnist, temperature=100.0, num_generations=3), mnist)


def start(model: nets.ConvNet) -> tuple[train.TrainStep, train.TrainState]:
    """A training step and a fresh state."""
    step = train.make_train_step(nets.apply_fn(model), train.sgd(0.02))
    params, _ = nets.init(model, jax.random.key(0), (28, 28, 1))
    return step, train.create_state(step, params, jax.random.key(0))


def adversarially_trained(
    mnist: data.Dataset, radii: Sequence[float]
) -> tuple[train.TrainStep, train.TrainState]:
    """A network trained on PGD examples of itself alone, an epoch at each radius."""
    step, state = start(nets.mnist_net(width=0.5, dropout_rate=0.0))
    compiled = jax.jit(step)
    for epoch, eps in enumerate(radii):
        order = np.random.default_rng(epoch).permutation(len(mnist.train.labels))
        for number, batch in enumerate(data.batches(*mnist.train, batch_size=BATCH, order=order)):
            found = attacks.pgd(
                train.logits_fn(step, state),
                jax.random.fold_in(state.key, state.step),
                batch.inputs,
                batch.labels,
                eps=eps,
                num_steps=STEPS,
            )
            batch = Batch(found.inputs, batch.labels, None, batch.mask)
            state, sums = compiled(state, batch, train.hard_loss())
            if number % 50 == 0:
                print(f"epoch {epoch} step {number}: {float(sums['correct']) / BATCH:.2f}")
    return step, state


def distilled(
    mnist: data.Dataset, *, temperature: float, num_generations: int
) -> tuple[train.TrainStep, train.TrainState]:
    """The last generation of a chain of narrow networks."""
    step, state = start(nets.mnist_net(width=0.25))
    key = jax.random.key(0)
    initial = distill.initial_weights(step, state.params, mnist.train, key, num_epochs=1)
    generation = distill.Generation(
        step=step,
        params=initial.params,
        num_epochs=4,
        hyperparams={"learning_rate": 0.02 * temperature**0.5},
    )
    chain = distill.chain([generation] * num_generations, mnist.train, key, temperature=temperature)
    return step, chain[-1]


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
