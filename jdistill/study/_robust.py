"""Studies of robust chains: a robust teacher, assistants, and students that withstand attacks."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from jdistill import _validate, attacks, data, diagnose, export, nets, robust, train
from jdistill.study._deit import adamw, at_one, attack_plans, first_examples
from jdistill.study._study import Stage, Study

_LOSSES: dict[str, Callable[..., Any]] = {
    "ard": robust.ard_loss,
    "iad": robust.iad_loss,
    "rslad": robust.rslad_loss,
    "adaad": robust.adaad_loss,
    "igdm": robust.igdm_loss,
    "saad": robust.saad_loss,
    "ltd": robust.low_temperature_loss,
}


class _Setting(NamedTuple):
    """What differs between the data sets; networks by their width."""

    num_train: int
    teacher: Callable[[float], Any]
    student: Callable[[float], Any]
    augment: Any


def _dense(width: float) -> nets.ConvNet:
    """Layers of 512 and 256 units at width 1, for CPUs."""
    hidden = tuple(max(1, round(width * size)) for size in (512, 256))
    return nets.ConvNet(features=(), hidden=hidden, dropout_rate=0.0)


_MNIST = functools.partial(nets.mnist_net, dropout_rate=0.0)
_SETTINGS = {
    "mnist": _Setting(55_000, _MNIST, _MNIST, None),
    "fashion_mnist": _Setting(55_000, _MNIST, _MNIST, None),
    "cifar10": _Setting(
        45_000,
        functools.partial(nets.wide_resnet, 34),
        nets.resnet18,
        train.ShiftAndFlip(4, flip=True),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustRecipe:
    """Train a robust teacher and robust students of it, with assistants between; attack, report.

    Chains: for each loss the student of the teacher, of one assistant, and of more; beside them the
    student's network trained as the teacher is, without one. The teacher learns by TRADES. Widths
    of assistants lie between those of teacher and student, the first one's in the middle of their
    ratio; on CIFAR-10, where the teacher is another kind of network, they are the student's.

    Example:
        >>> recipe = RobustRecipe(
        ...     dataset="mnist", eps=0.3, epochs=5, batch_size=64, num_assistants=1
        ... )
        >>> list(recipe.study().chains)
        ['rslad', 'rslad, 1 assistant', 'no teacher']

    References:
        Zi, Zhao, Ma & Jiang 2021, "Revisiting Adversarial Robustness Distillation: Robust Soft
        Labels Make Student Better"; the others with their losses, in `jdistill.robust`.
    """

    dataset: Literal["mnist", "fashion_mnist", "cifar10"]
    """Name of the data set."""
    losses: tuple[Literal["ard", "iad", "rslad", "adaad", "igdm", "saad", "ltd"], ...] = ("rslad",)
    """Losses of the students, each with chains of its own. Where eps is large (0.3 on MNIST), rslad
    and adaad learned one class for all inputs; ltd, which is within TRADES, does not."""
    num_assistants: int = 2
    """Most assistants between teacher and student: chains have 0, 1, … of them."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; each gives initial weights, an order of the examples and attacks of its own."""

    train_examples: int | None = None
    """Use only the first so many training examples (none: all)."""
    epochs: int
    """Epochs per network (passes over the training set)."""
    batch_size: int
    """Training examples per step."""
    learning_rate: float = 2e-3
    """Largest learning rate of AdamW: it rises for a tenth of the steps and falls as a cosine."""
    layers: Literal["convolutional", "dense"] = "convolutional"
    """The papers' network of the data set (WRN-34 and ResNet-18 for CIFAR-10), or two dense layers,
    512 and 256 units at width 1."""
    teacher_width: float = 0.5
    """Width of the teacher, as a factor on the number of channels or units. It must be that
    of an exported teacher, since assistants lie between it and the students."""
    student_width: float = 0.125
    """Width of the students."""
    trades_weight: float = 2.0
    """Weight of the divergence in TRADES, the loss of the teacher, and in ltd."""
    temperature: float = 1.0
    """Temperature T of the distillation losses."""
    attack_steps: int = 10
    """Steps of PGD in training."""
    weight_perturbation: float = 0.0
    """Adversarial weight perturbation in training, as a share of each kernel's norm (0: none)."""
    teacher: str | None = None
    """Folder of an exported network, trained elsewhere, as the teacher (none: one is trained)."""

    eps: float
    """Radius of the attacks in training and of FGSM, AutoAttack, and the verdict (linf, in units of
    the pixel range 0..1)."""
    attack_examples: int = 1000
    """Test examples for AutoAttack."""
    verdict_examples: int = 200
    """Test examples for the verdict."""

    def __post_init__(self) -> None:
        """Check what the study does not, and name what is wrong."""
        _validate.one_of(_SETTINGS, dataset=self.dataset)
        _validate.one_of(("convolutional", "dense"), layers=self.layers)
        _validate.sequence(losses=self.losses)
        if not self.losses or len(set(self.losses)) < len(self.losses):
            raise ValueError(
                f"expected losses without repetition and not empty, got {self.losses}; name each "
                "once"
            )
        for loss in self.losses:
            _validate.one_of(_LOSSES, losses=loss)
        _validate.count(minimum=0, num_assistants=self.num_assistants)
        _validate.count(
            epochs=self.epochs,
            batch_size=self.batch_size,
            attack_steps=self.attack_steps,
            attack_examples=self.attack_examples,
            verdict_examples=self.verdict_examples,
        )
        if self.train_examples is not None:
            _validate.count(train_examples=self.train_examples)
        _validate.positive(
            learning_rate=self.learning_rate,
            teacher_width=self.teacher_width,
            student_width=self.student_width,
            temperature=self.temperature,
            eps=self.eps,
        )
        _validate.non_negative(
            trades_weight=self.trades_weight, weight_perturbation=self.weight_perturbation
        )

    def study(self, *, data_dir: str | None = None) -> Study:
        """The study.

        Args:
            data_dir: folder of prepared TFDS sets, see `data.load`.
        """
        return Study(
            data=functools.partial(first_examples, self.dataset, self.train_examples, data_dir),
            chains=self._chains(),
            temperatures=(self.temperature,),
            seeds=self.seeds,
            teacher_loss=at_one,
            online=True,
            batch_size=self.batch_size,
            attacks=attack_plans(self.eps, self.attack_examples),
            verdict=functools.partial(diagnose.masking, eps=self.eps),
            num_verdict=self.verdict_examples,
        )

    def smallest(self) -> "RobustRecipe":
        """The same run with every size at its least: seconds, and numbers that mean nothing."""
        return dataclasses.replace(
            self,
            losses=self.losses[:1],
            num_assistants=min(1, self.num_assistants),
            seeds=(0,),
            train_examples=64,
            epochs=1,
            batch_size=32,
            teacher_width=0.25,
            student_width=0.125,
            attack_steps=1,
            attack_examples=4,
            verdict_examples=4,
        )

    def _setting(self) -> _Setting:
        found = _SETTINGS[self.dataset]
        return found._replace(teacher=_dense, student=_dense) if self.layers == "dense" else found

    def _chains(self) -> dict[str, list[Stage]]:
        setting = self._setting()
        trades = functools.partial(robust.trades_loss, weight=self.trades_weight)
        if self.teacher is None:
            teacher = self._stage(setting.teacher(self.teacher_width), loss=_plain(trades))
        else:
            teacher = Stage(frozen=export.load(self.teacher))
        chains = {}
        for name in self.losses:
            loss = _LOSSES[name]
            if name == "ltd":
                loss = functools.partial(loss, trades_weight=self.trades_weight)
            student = self._stage(setting.student(self.student_width), loss=loss)
            for count in range(self.num_assistants + 1):
                assistants = [
                    self._stage(setting.student(width), loss=loss) for width in self._widths(count)
                ]
                plural = "s" if count > 1 else ""
                title = f"{name}, {count} assistant{plural}" if count else name
                chains[title] = [teacher, *assistants, student]
        alone = self._stage(setting.student(self.student_width), loss=_plain(trades))
        return {**chains, "no teacher": [alone]}

    def _widths(self, count: int) -> list[float]:
        """The widths of so many assistants, from the wider to the narrower."""
        first, last = self.teacher_width, self.student_width
        if (
            self._setting().teacher is not self._setting().student
        ):  # a width of the teacher's network says another thing there
            return [last] * count
        # The first assistant is the same whatever follows it, so that chains share it.
        middle = (first * last) ** 0.5
        return [middle * (last / middle) ** (place / count) for place in range(count)]

    def _stage(self, model: Any, *, loss: Callable[..., Any]) -> Stage:
        setting = self._setting()
        num_train = min(self.train_examples or setting.num_train, setting.num_train)
        num_steps = self.epochs * data.num_batches(num_train, self.batch_size)
        objective = _objective(self.eps, self.attack_steps, self.weight_perturbation)
        return Stage(
            model=model,
            optimizer=adamw(num_steps, self.learning_rate, 1e-4),
            num_epochs=self.epochs,
            make_step=functools.partial(
                train.make_train_step, objective=objective, augment=setting.augment
            ),
            loss=loss,
        )


def _plain(loss: Callable[..., Any]) -> Callable[[float], Any]:
    """The loss at T = 1, whatever the students' T."""
    return functools.partial(_at_one, loss)


def _at_one(loss: Callable[..., Any], temperature: float) -> Any:
    del temperature
    return loss(1.0)


@functools.cache  # equal settings give the same objective, hence equal steps
def _objective(eps: float, num_steps: int, weight_perturbation: float) -> Any:
    """PGD from a random start, whose steps together are two and a half radii long."""
    attack = functools.partial(attacks.pgd, eps=eps, num_steps=num_steps)
    return robust.adversarial(attack, weight_perturbation=weight_perturbation)


ROBUST_CHAIN_MNIST = RobustRecipe(
    dataset="mnist",
    losses=("ltd",),
    num_assistants=1,
    epochs=8,
    batch_size=128,
    teacher_width=0.5,
    student_width=0.5,
    eps=0.3,
)
ROBUST_CHAIN_FASHION = RobustRecipe(
    dataset="fashion_mnist", epochs=12, batch_size=128, eps=0.1, student_width=0.125
)
# As the papers have it, but for their steps of SGD; on a CPU a matter of weeks.
ROBUST_CHAIN_CIFAR10 = RobustRecipe(
    dataset="cifar10",
    losses=("rslad", "adaad"),
    epochs=200,
    batch_size=128,
    learning_rate=1e-3,
    teacher_width=10.0,
    student_width=1.0,
    trades_weight=6.0,
    eps=8 / 255,
)

RECIPES = {
    "robust-chain-mnist": ROBUST_CHAIN_MNIST,
    "robust-chain-fashion": ROBUST_CHAIN_FASHION,
    "robust-chain-cifar10": ROBUST_CHAIN_CIFAR10,
}
