"""The networks behind the papers' tables: one training study per data set and scale.

Every item measures networks of these studies, so that none is trained twice. With equal stages
generation `n + 1` of the longest chain is the student of `n` assistants: one chain holds all
shorter ones.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jdistill import attacks, diagnose, distill, nets, train
from jdistill.evaluate import AttackPlan
from jdistill.study import RECIPES, DeitRecipe, RobustRecipe, Stage, Study
from jdistill.study._deit import at_one, first_examples

Scale = Literal["full", "cpu", "smoke"]

PAPER_TEMPERATURES = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 100.0)
_NETWORKS = {
    "digits": nets.digits_net,
    "mnist": nets.mnist_net,
    "fashion_mnist": nets.mnist_net,
    "cifar10": nets.cifar_net,
}
# Of AutoAttack and the verdict, in units of the pixel range.
EPS = {"digits": 0.2, "mnist": 0.2, "fashion_mnist": 0.05, "cifar10": 8 / 255}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Sizes of a training study.

    Attributes:
        dataset: a name that `data.load` knows.
        temperatures: T of training and soft labels.
        seeds: of initial weights, order of the examples, and dropout.
        num_epochs: per network.
        learning_rate: at T = 1; at T it is `learning_rate * T ** power`.
        power: 0 in the released code, whose 50 epochs need no larger rate at a high T.
        batch_size: examples per training step.
        num_train: the first so many training examples; None takes all.
        select: each network's epoch, the last or the best on the validation examples.
        num_attack: test examples for AutoAttack and the verdict.
    """

    dataset: str
    temperatures: tuple[float, ...] = PAPER_TEMPERATURES
    seeds: tuple[int, ...] = (0, 1, 2)
    num_epochs: int = 50
    learning_rate: float = 0.01
    power: float = 0.0
    batch_size: int = 128
    num_train: int | None = None
    select: Literal["last", "best"] = "last"
    num_attack: int = 200

    def _stage(self, network: Any) -> Stage:
        """A network, or the papers' at a width, with the released code's optimizer."""
        if isinstance(network, float):
            network = _NETWORKS[self.dataset](width=network)
        return Stage(
            model=network,
            optimizer=train.sgd(self.learning_rate),
            num_epochs=self.num_epochs,
            select=self.select,
            hyperparams={"learning_rate": functools.partial(_rate, self.learning_rate, self.power)},
        )

    def _study(self, data_dir: str | None, chains: Mapping[str, Any], **more: Any) -> Study:
        """The chains of networks, under AutoAttack, with their verdicts."""
        eps = EPS[self.dataset]
        return Study(
            data=functools.partial(first_examples, self.dataset, self.num_train, data_dir),
            chains={name: [self._stage(each) for each in own] for name, own in chains.items()},
            temperatures=self.temperatures,
            seeds=self.seeds,
            batch_size=self.batch_size,
            attacks={
                "fgsm": AttackPlan(functools.partial(attacks.fgsm, eps=eps), 1000),
                "autoattack": AttackPlan(
                    functools.partial(attacks.autoattack, eps=eps), self.num_attack, batch_size=100
                ),
            },
            verdict=functools.partial(diagnose.masking, eps=eps),
            num_verdict=self.num_attack,
            **more,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training(_Sizes):
    """Chains of equal networks at several temperatures and seeds.

    Attributes:
        width: factor on the hidden sizes of the papers' network.
        num_assistants: of the longest chain.
    """

    width: float = 1.0
    num_assistants: int = 6

    def study(self, *, data_dir: str | None = None) -> Study:
        """Chains without an assistant, with 1, 2, …; they start as in the released code."""
        names = ["no assistant", "1 assistant", *(f"{n} assistants" for n in range(2, 7))]
        chains = {
            names[number]: [self.width] * (number + 2) for number in range(self.num_assistants + 1)
        }
        return self._study(data_dir, chains, initial_epochs=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Assistants(_Sizes):
    """Chains that end in one small student, with and without larger teachers and assistants.

    Attributes:
        chains: by name, the networks from teacher to student: widths of the papers' network, or
            modules.
        hard_weight: λ of the labels in the students' loss.
        temperature_squared: whether its soft term is multiplied by T².
        defensive: whether the teacher learns at T too, as in defensive distillation; else at 1.
    """

    chains: Mapping[str, tuple[Any, ...]]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    num_attack: int = 100
    hard_weight: float = 0.0
    temperature_squared: bool = False
    defensive: bool = True

    def study(self, *, data_dir: str | None = None) -> Study:
        """The chains, with their losses."""
        return self._study(
            data_dir,
            self.chains,
            teacher_loss=distill.soft_loss if self.defensive else at_one,
            student_loss=functools.partial(
                distill.soft_loss,
                hard_weight=self.hard_weight,
                temperature_squared=self.temperature_squared,
            ),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Standardized(Training):
    """Chains whose students learn from standardized logits, whose loss sees no scale.

    Attributes:
        loss_temperature: of the students' loss; the teacher learns at the training temperature.
    """

    loss_temperature: float = 2.0

    def study(self, *, data_dir: str | None = None) -> Study:
        """As of `Training`, with the other loss."""
        return dataclasses.replace(
            super().study(data_dir=data_dir),
            student_loss=functools.partial(_standardized, self.loss_temperature),
            online=True,
        )


def _standardized(loss_temperature: float, temperature: float, teacher: Any) -> Any:
    del temperature  # of the teacher, when it learned
    return distill.standardized_loss(loss_temperature, teacher)


def _rate(learning_rate: float, power: float, temperature: float) -> float:
    return learning_rate * temperature**power


# Measured (docs/performance.md), two cores and an H100; a small step costs its start.
_CORES_FLOPS, _H100_FLOPS, _STEP_SECONDS = 70e9, 15e12, 1.5e-3
_SHAPES = {"digits": (8, 8, 1), "cifar10": (32, 32, 3)}
_SIZES = {"digits": 1_197, "cifar10": 45_000}


class Cost(NamedTuple):
    """Size of a training study.

    Attributes:
        networks: to train.
        steps: of all of them.
        flops: likewise, by XLA's count of the forward pass, three times.
    """

    networks: int
    steps: int
    flops: float

    def __str__(self) -> str:
        cores, chip = (
            max(self.flops / rate, self.steps * _STEP_SECONDS) / 3600
            for rate in (_CORES_FLOPS, _H100_FLOPS)
        )
        return (
            f"{self.networks} networks, {self.flops / 1e15:.2g} PFLOP: about {cores:.1f} h on two "
            f"cores, {chip:.1f} h on an H100, before the attacks"
        )


AnyTraining = Training | Assistants | DeitRecipe | RobustRecipe


def cost(training: AnyTraining) -> Cost:
    """Size of a training study, from its networks' arithmetic; nothing is run."""
    study = training.study()
    shape = (training.batch_size, *_SHAPES.get(training.dataset, (28, 28, 1)))
    if isinstance(training, DeitRecipe | RobustRecipe):
        few = training.train_examples
    else:
        few = training.num_train
    size = few or _SIZES.get(training.dataset, 55_000)
    runs = len(study.temperatures) * len(study.seeds)
    stages = study.trained_stages()
    forward = functools.cache(lambda model: _forward_flops(model, shape))
    # Forward, and about twice as much back; on inputs that a robust student's attack has to find.
    passes = 3 * (training.attack_steps + 2 if isinstance(training, RobustRecipe) else 1)
    per_epoch = runs * math.ceil(size / training.batch_size)
    return Cost(
        networks=runs * len(stages),
        steps=per_epoch * sum(stage.num_epochs for stage in stages),
        flops=passes * per_epoch * sum(stage.num_epochs * forward(stage.model) for stage in stages),
    )


def _forward_flops(model: Any, shape: tuple[int, ...]) -> float:
    params, state = jax.eval_shape(lambda: nets.init(model, jax.random.key(0), shape[1:]))
    apply = nets.apply_fn(model)
    forward = jax.jit(lambda params, state, x: apply(params, state, x, train=False, key=None)[0])
    inputs = jax.ShapeDtypeStruct(shape, np.float32)
    found = forward.lower(params, state, inputs).cost_analysis()
    return float((found or {}).get("flops", math.nan))


# With 7 epochs where the papers have 50, a high temperature needs a larger rate.
_FEW_EPOCHS: Mapping[str, Any] = {"num_epochs": 7, "learning_rate": 0.02, "power": 0.5}

_LEAST: Mapping[str, Any] = {
    **{"seeds": (0, 1), "num_assistants": 1, "num_epochs": 3, "learning_rate": 0.05},
    **{"batch_size": 32, "num_attack": 10},
}
# The released code of Mirzadeh et al. has T and λ chosen per pair; these are its author's example.
# It keeps the epoch that is best on the test set; here the validation examples choose.
_TAKD: Mapping[str, Any] = {
    "select": "best",
    "temperatures": (5.0,),
    "hard_weight": 0.15,
    "temperature_squared": True,
    "defensive": False,
}
_PLAIN_NETS = {number: nets.plain_net(number) for number in (2, 4, 10)}
_RESNETS = {number: nets.resnet(number) for number in (8, 14, 20, 26, 110)}


def _from(networks: Mapping[int, Any], teacher: int, assistant: int, student: int) -> Any:
    """A student alone, from a teacher, and through an assistant."""
    return {
        "no distillation": (networks[student],),
        "distillation": (networks[teacher], networks[student]),
        "assistant": (networks[teacher], networks[assistant], networks[student]),
    }


_WIDTHS = {4: 0.5, 2: 0.25, 1: 0.125}
_SHRINKING = {
    "equal, no assistant": (0.25, 0.25),
    "equal, 1 assistant": (0.25, 0.25, 0.25),
    "shrinking, no assistant": (1.0, 0.25),
    "shrinking, 1 assistant": (1.0, 0.5, 0.25),
}

_ROBUST = {name: recipe for name, recipe in RECIPES.items() if isinstance(recipe, RobustRecipe)}
_DEIT = {name: recipe for name, recipe in RECIPES.items() if isinstance(recipe, DeitRecipe)}

TRAININGS: Mapping[str, Mapping[str, AnyTraining]] = {
    # As released by Mandal & Gao; TAKD as in its paper, with a fixed T and λ.
    "full": {
        "mnist": Training(dataset="mnist"),
        "cifar10": Training(dataset="cifar10"),
        "takd-plain": Assistants(
            dataset="cifar10",
            chains=_from(_PLAIN_NETS, 10, 4, 2),
            num_epochs=160,
            learning_rate=0.01,
            **_TAKD,
        ),
        "takd-resnet": Assistants(
            dataset="cifar10",
            chains=_from(_RESNETS, 110, 20, 8),
            num_epochs=160,
            learning_rate=0.1,
            **_TAKD,
        ),
        "takd-resnet26": Assistants(
            dataset="cifar10",
            chains=_from(_RESNETS, 26, 14, 8),
            num_epochs=160,
            learning_rate=0.1,
            **_TAKD,
        ),
        "ladder": Assistants(
            dataset="mnist",
            chains=_SHRINKING,
            temperatures=PAPER_TEMPERATURES,
            num_epochs=50,
            learning_rate=0.01,
        ),
        "standardized": Standardized(dataset="mnist", num_assistants=1),
        "deit-cifar10": _DEIT["deit-cifar10"],
        "robust-mnist": _ROBUST["robust-chain-mnist"],
        "robust-cifar10": _ROBUST["robust-chain-cifar10"],
    },
    "cpu": {
        # All examples, one seed.
        "robust-mnist": _ROBUST["robust-chain-mnist"],
        # Students of a quarter of the teacher's width. Narrow convolutions are slow on a CPU.
        "robust-fashion": dataclasses.replace(
            _ROBUST["robust-chain-fashion"],
            losses=("ard", "rslad", "adaad", "igdm", "saad"),
            seeds=(0, 1, 2, 3, 4),
            train_examples=10_000,
            epochs=5,
            batch_size=64,
            layers="dense",
            teacher_width=1.0,
            student_width=0.25,
            attack_examples=250,
            verdict_examples=100,
        ),
        # So few that a teacher of all 55,000 matters, and as many steps as 2,000 examples get. The
        # sizes were chosen at seed 0.
        "deit-fashion": dataclasses.replace(
            _DEIT["deit-fashion"], train_examples=500, epochs=240, seeds=(1, 2, 3, 4, 5)
        ),
        "deit-digits": _DEIT["deit-digits"],
        # The papers' width, one seed: for figures that stand beside published ones.
        "mnist": Training(
            dataset="mnist",
            temperatures=(1.0, 5.0, 20.0, 100.0),
            seeds=(0,),
            num_assistants=0,
            **_FEW_EPOCHS,
        ),
        # Half of it, three seeds: for what assistants do.
        "mnist-half": Training(
            dataset="mnist",
            width=0.5,
            temperatures=(1.0, 20.0, 100.0),
            num_assistants=3,
            num_attack=100,
            **{**_FEW_EPOCHS, "num_epochs": 3},
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
            num_epochs=6,
            learning_rate=0.02,
            power=0.5,
            num_train=10_000,
            num_attack=100,
        ),
        # Students of a quarter of the teacher's width, on few examples, so that a teacher matters.
        # At T = 5 the soft term's gradient is several times the labels': 0.02 kills small students.
        "takd-fashion": Assistants(
            dataset="fashion_mnist",
            chains=_from(_WIDTHS, 4, 2, 1),
            num_epochs=30,
            learning_rate=0.005,
            num_train=6_000,
            num_attack=20,
            **_TAKD,
        ),
        # At 30 epochs and one rate for all T its small networks learn nothing at T = 100.
        "ladder": Assistants(
            dataset="digits",
            chains=_SHRINKING,
            temperatures=(1.0, 5.0, 20.0, 100.0),
            num_epochs=60,
            learning_rate=0.05,
            power=0.25,
            batch_size=32,
        ),
        "standardized": Standardized(
            dataset="digits",
            temperatures=(1.0, 20.0, 100.0),
            seeds=(0, 1, 2, 3, 4),
            num_assistants=1,
            num_epochs=30,
            learning_rate=0.05,
            batch_size=32,
            num_attack=100,
        ),
    },
    "smoke": {
        "digits": Training(dataset="digits", temperatures=(1.0, 20.0), **_LEAST),
        "takd": Assistants(
            dataset="digits",
            chains=_from({8: 0.5, 4: 0.25, 1: 0.125}, 8, 4, 1),
            **_TAKD,
            **{name: value for name, value in _LEAST.items() if name != "num_assistants"},
        ),
        "standardized": Standardized(dataset="digits", temperatures=(1.0, 20.0), **_LEAST),
        "deit": dataclasses.replace(_DEIT["deit-digits"].smallest(), seeds=(0, 1)),
        "robust": dataclasses.replace(
            _ROBUST["robust-chain-fashion"].smallest(), layers="dense", seeds=(0, 1)
        ),
    },
}
