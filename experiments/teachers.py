"""Teachers of DeiT's students, trained on the whole of a data set and exported.

    python -m experiments.teachers fashion_mnist --folder runs/teachers
    jdistill defend deit-fashion --teacher runs/teachers/cnn --transformer runs/teachers/vit

A convolutional network and a transformer, each trained once on all training examples: what students
with few examples of their own learn from.
"""

import dataclasses
from typing import Literal

import jax
import numpy as np
import tyro
from etils import epath

from jdistill import data, export, nets, runtime, train
from jdistill.study import _deit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Data set of the teachers, and their folder."""

    dataset: tyro.conf.Positional[Literal["fashion_mnist", "mnist"]] = "fashion_mnist"
    """Data set of 28x28 images."""
    folder: str = "runs/teachers"
    """Folder of the exports `cnn` and `vit`."""
    epochs: tuple[int, int] = (3, 6)
    """Epochs of the convolutional network and of the transformer."""
    train_examples: int | None = None
    """Use only the first so many training examples (none: all)."""
    data_dir: str | None = None
    """Folder of prepared TFDS sets (none: TFDS_DATA_DIR, else ~/tensorflow_datasets)."""


def main() -> None:
    """Train both, export them, and print their test accuracy."""
    options = tyro.cli(Options, prog="python -m experiments.teachers", description=__doc__)
    runtime.add_cpu_flags()
    runtime.enable_compilation_cache()
    dataset = data.load(options.dataset, data_dir=options.data_dir)
    examples = [column[: options.train_examples] for column in dataset.train]
    teachers = {
        "cnn": (nets.mnist_net(0.5, dropout_rate=0.25), 2e-3, 1e-4),
        "vit": (nets.vit_mnist(), 1.5e-3, 0.05),
    }
    for (name, (model, rate, decay)), num_epochs in zip(
        teachers.items(), options.epochs, strict=True
    ):
        num_steps = num_epochs * data.num_batches(len(examples[1]), 128)
        step = train.make_train_step(
            nets.apply_fn(model),
            _deit.adamw(num_steps, rate, decay),
            augment=train.ShiftAndFlip(1),
        )
        params, model_state = nets.init(model, jax.random.key(0), (28, 28, 1))
        state = train.create_state(step, params, jax.random.key(1), model_state=model_state)
        with runtime.progress() as progress:
            state = train.fit(
                step,
                state,
                (examples[0], examples[1]),
                train.hard_loss(),
                num_epochs=num_epochs,
                callback=progress,
                stage=name,
            )
        network = train.logits_fn(step, state)
        predicted = train.predict(network, dataset.test.inputs).argmax(-1)
        export.save(epath.Path(options.folder) / name, network, input_shape=(28, 28, 1))
        print(f"{name}: test accuracy {np.mean(predicted == dataset.test.labels):.2%}")


if __name__ == "__main__":
    main()
