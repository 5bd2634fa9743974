"""Carlini & Wagner's L2 distances against the epochs that an ordinary network was trained.

    python -m experiments.epochs --output experiments/results/epochs-mnist.csv

The cpu scale of `experiments.reproduce` has 7 epochs where the papers have 50; this shows what that
does to the distances. The network is the papers', narrower, on MNIST at their learning rate. A CSV
with a row for each number of epochs; 40 minutes on one core.
"""

import csv
import dataclasses
import io
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tyro
from etils import epath

from experiments.papers.mandal2023 import FEW_STEPS
from experiments.papers.measures import Hits
from jdistill import data, evaluate, metrics, nets, runtime, train
from jdistill import study as studies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The network, and when it is attacked."""

    epochs: tuple[int, ...] = (3, 7, 20, 50)
    """Numbers of epochs, in ascending order."""
    width: float = 0.5
    """Factor on the hidden sizes of the papers' network."""
    learning_rate: float = 0.01
    """Of SGD with momentum, the same in every epoch."""
    num_images: int = 20
    """Test images, each towards every class but its own."""
    seed: int = 0
    """Of the weights and of the order of the examples."""
    output: str | None = None
    """CSV file to write (none: the rows are only printed)."""
    data_dir: str | None = None
    """Folder of prepared TFDS sets (none: TFDS_DATA_DIR, else ~/tensorflow_datasets)."""


def rows(options: Options) -> Iterator[dict[str, Any]]:
    """A row for each number of epochs: accuracy, logits, and distances."""
    mnist = data.load("mnist", data_dir=options.data_dir)
    model = nets.mnist_net(width=options.width)
    params, model_state = nets.init(model, jax.random.key(options.seed), (28, 28, 1))
    step = train.make_train_step(nets.apply_fn(model), train.sgd(options.learning_rate))
    key = jax.random.key(100 + options.seed)
    state = train.create_state(step, params, key, model_state=model_state)
    images, labels = (part[: options.num_images] for part in mnist.test)
    targets = np.array([np.delete(np.arange(10), label) for label in labels])
    many, their = (np.repeat(part, 9, axis=0) for part in (images, labels))
    plan = evaluate.AttackPlan(FEW_STEPS, batch_size=90)
    for epochs in options.epochs:
        state = train.fit(step, state, mnist.train, train.hard_loss(), num_epochs=epochs)
        network = train.logits_fn(step, state)
        logits = train.predict(network, mnist.test.inputs)
        right = metrics.correct(logits, mnist.test.labels)
        outcome = evaluate.under_attack(
            nets.stack([network]), many, their, plan, targets=targets.ravel()
        )
        success, distance = (
            part[0].reshape(targets.shape)[right[: len(images)]]
            for part in (outcome.success, outcome.distance)
        )
        trained = studies.Trained("", 1.0, options.seed, 0, int(state.step), "", network)
        yield {
            "width": options.width,
            "learning_rate": options.learning_rate,
            "epochs": epochs,
            "test_accuracy": float(right.mean()),
            "mean_abs_logit": float(np.abs(logits).mean()),
            **Hits(trained, success, distance).row(),
        }


def main() -> None:
    """Parse the command line, and print or write the rows."""
    options = tyro.cli(Options, prog="python -m experiments.epochs", description=__doc__)
    runtime.add_cpu_flags()
    runtime.enable_compilation_cache()
    found = []
    for row in rows(options):
        print(row, flush=True)
        found.append(row)
    if options.output is not None:
        content = io.StringIO()
        writer = csv.DictWriter(content, found[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
        runtime.atomic_write_text(epath.Path(options.output), content.getvalue())


if __name__ == "__main__":
    runtime.run_main(main)
