"""The networks behind the papers' tables: one training study per data set and scale.

Every item measures networks of these studies, so that none is trained twice. With equal stages
generation `n + 1` of the longest chain is the student of `n` assistants: one chain holds all
shorter ones.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

from jdistill import attacks, data, diagnose, nets, train
from jdistill.evaluate import AttackPlan
from jdistill.study import Stage, Study

Scale = Literal["full", "cpu", "smoke"]

PAPER_TEMPERATURES = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 100.0)
_NETWORKS = {
    "digits": nets.digits_net,
    "mnist": nets.mnist_net,
    "fashion_mnist": nets.mnist_net,
    "cifar10": nets.cifar_net,
}
# Of AutoAttack and the verdict, in units of the pixel range.
EPS = {"digits": 0.2, "mnist": 0.1, "fashion_mnist": 0.05, "cifar10": 8 / 255}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Chains of equal networks at several temperatures and seeds.

    Attributes:
        dataset: a name that `data.load` knows.
        width: factor on the hidden sizes of the papers' network.
        temperatures: T of training and soft labels.
        seeds: of initial weights, order of the examples, and dropout.
        num_assistants: of the longest chain.
        num_epochs: per generation.
        learning_rate: at T = 1; at T it is `learning_rate * T ** power`.
        power: 0 in the released code, whose 50 epochs need no larger rate at a high T.
        batch_size: examples per training step.
        num_train: the first so many training examples; None takes all.
        num_attack: test examples for AutoAttack and the verdict.
    """

    dataset: str
    width: float = 1.0
    temperatures: tuple[float, ...] = PAPER_TEMPERATURES
    seeds: tuple[int, ...] = (0, 1, 2)
    num_assistants: int = 6
    num_epochs: int = 50
    learning_rate: float = 0.01
    power: float = 0.0
    batch_size: int = 128
    num_train: int | None = None
    num_attack: int = 200

    def stage(self) -> Stage:
        """Every generation: the papers' network and the released code's optimizer."""
        return Stage(
            model=_NETWORKS[self.dataset](width=self.width),
            optimizer=train.sgd(self.learning_rate),
            num_epochs=self.num_epochs,
            hyperparams={"learning_rate": functools.partial(_rate, self.learning_rate, self.power)},
        )

    def study(self, *, data_dir: str | None = None) -> Study:
        """Chains without an assistant, with 1, 2, …, under AutoAttack, with their verdicts."""
        stage, eps = self.stage(), EPS[self.dataset]
        names = ["no assistant", "1 assistant", *(f"{n} assistants" for n in range(2, 7))]
        return Study(
            data=functools.partial(load, self.dataset, self.num_train, data_dir),
            chains={
                names[number]: [stage] * (number + 2) for number in range(self.num_assistants + 1)
            },
            temperatures=self.temperatures,
            seeds=self.seeds,
            batch_size=self.batch_size,
            initial_epochs=1,
            attacks={
                "fgsm": AttackPlan(functools.partial(attacks.fgsm, eps=eps), 1000),
                "autoattack": AttackPlan(
                    functools.partial(attacks.autoattack, eps=eps), self.num_attack, batch_size=100
                ),
            },
            verdict=functools.partial(diagnose.masking, eps=eps),
            num_verdict=self.num_attack,
        )


def _rate(learning_rate: float, power: float, temperature: float) -> float:
    return learning_rate * temperature**power


def load(name: str, num_train: int | None, data_dir: str | None) -> data.Dataset:
    """A data set with its first training examples."""
    dataset = data.load(name, data_dir=data_dir)
    if num_train is None:
        return dataset
    return dataset._replace(train=data.Split(*(part[:num_train] for part in dataset.train)))


# With 7 epochs where the papers have 50, a high temperature needs a larger rate.
_FEW_EPOCHS: Mapping[str, Any] = {"num_epochs": 7, "learning_rate": 0.02, "power": 0.5}

TRAININGS: Mapping[str, Mapping[str, Training]] = {
    # As released by Mandal & Gao.
    "full": {"mnist": Training(dataset="mnist"), "cifar10": Training(dataset="cifar10")},
    "cpu": {
        # The papers' width, one seed: for figures that stand beside published ones.
        "mnist": Training(
            dataset="mnist",
            temperatures=(1.0, 5.0, 20.0, 100.0),
            seeds=(0,),
            num_assistants=1,
            **_FEW_EPOCHS,
        ),
        # Half of it, three seeds: for what assistants do.
        "mnist-half": Training(
            dataset="mnist",
            width=0.5,
            temperatures=(1.0, 20.0, 100.0),
            num_assistants=3,
            **_FEW_EPOCHS,
        ),
        # Five seeds, all temperatures and chain lengths: for the pooled effect.
        "digits": Training(
            dataset="digits",
            seeds=(0, 1, 2, 3, 4),
            num_epochs=30,
            learning_rate=0.05,
            batch_size=32,
            num_attack=100,
        ),
        "cifar10-narrow": Training(
            dataset="cifar10",
            width=0.25,
            temperatures=(1.0, 20.0, 100.0),
            seeds=(0, 1),
            num_assistants=1,
            num_epochs=10,
            learning_rate=0.02,
            power=0.5,
            num_train=20_000,
            num_attack=100,
        ),
    },
}
