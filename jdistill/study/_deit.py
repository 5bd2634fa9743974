"""Studies of transformer students: DeiT's distillation beside no teacher, on small images."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import optax

from jdistill import _validate, attacks, data, diagnose, distill, export, nets, train
from jdistill.evaluate import AttackPlan
from jdistill.study._study import Stage, Study


class _Setting(NamedTuple):
    """What differs between the data sets."""

    num_train: int
    teacher: Callable[[], Any]
    assistant: Callable[[], Any]
    vit: Callable[..., Any]
    augment: Any
    """Of teachers and students alike; an online teacher sees what its student sees."""


_SETTINGS = {
    "digits": _Setting(
        1_197,
        nets.digits_net,
        functools.partial(nets.digits_net, 0.5),
        functools.partial(nets.vit_digits, 0.5),
        train.ShiftAndFlip(1),
    ),
    "fashion_mnist": _Setting(
        55_000,
        functools.partial(nets.mnist_net, 0.5, dropout_rate=0.25),
        functools.partial(nets.mnist_net, 0.25, dropout_rate=0.25),
        functools.partial(nets.vit_mnist, 0.5),
        train.ShiftAndFlip(1),
    ),
    "cifar10": _Setting(
        45_000,
        functools.partial(nets.resnet, 20),
        functools.partial(nets.resnet, 8),
        nets.vit_cifar,
        train.ShiftAndFlip(4, flip=True),
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeitRecipe:
    """Train vision transformers alone and from teachers, attack all of them, report.

    Chains: the transformer without a teacher; from a convolutional teacher by soft and by hard
    labels, without and with a distillation token; by hard labels through the token from a
    transformer; and with assistants through a smaller convolutional network and through a
    transformer. Teachers are ordinary networks (T = 1) that label each augmented batch as it comes.

    Example:
        >>> recipe = DeitRecipe(
        ...     dataset="digits", epochs=60, batch_size=32, learning_rate=3e-3, eps=0.1
        ... )
        >>> list(recipe.study().chains)[:5]
        ['no teacher', 'soft', 'hard', 'soft, token', 'hard, token']

    References:
        Touvron, Cord, Douze, Massa, Sablayrolles & Jégou 2021, "Training data-efficient image
        transformers & distillation through attention".
    """

    dataset: Literal["digits", "fashion_mnist", "cifar10"]
    """Name of the data set."""
    temperatures: tuple[float, ...] = (3.0,)
    """Temperatures T of the soft labels, each above 0 (no unit); hard labels have none."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds; each gives initial weights, an order of the examples and augmentation of its own."""

    train_examples: int | None = None
    """Use only the first so many training examples (none: all)."""
    epochs: int
    """Epochs per network (passes over the training set)."""
    batch_size: int
    """Training examples per step."""
    learning_rate: float
    """Largest learning rate of the transformers' AdamW: it rises for a tenth of the steps and falls
    as a cosine."""
    teacher_learning_rate: float = 2e-3
    """Likewise of the convolutional networks."""
    hard_weight: float = 0.5
    """Weight of the true labels beside the teacher's, from 0 to 1."""
    assistants: bool = False
    """Also train chains with an assistant: convolutional, and a transformer."""
    vit_teacher: bool = True
    """Also train a student of a transformer."""
    teacher: str | None = None
    """Folder of an exported network, trained elsewhere, as the convolutional teacher (none: one is
    trained on the same examples)."""
    transformer: str | None = None
    """Likewise of the transformer that teaches (none: the one without a teacher does)."""

    eps: float
    """Radius of FGSM, AutoAttack, and the verdict (linf, in units of the pixel range 0..1)."""
    attack_examples: int = 100
    """Test examples for AutoAttack and the verdict."""

    def __post_init__(self) -> None:
        """Check what the study does not, and name what is wrong."""
        _validate.one_of(_SETTINGS, dataset=self.dataset)
        _validate.count(epochs=self.epochs, batch_size=self.batch_size)
        _validate.count(attack_examples=self.attack_examples)
        if self.train_examples is not None:
            _validate.count(train_examples=self.train_examples)
        _validate.positive(
            learning_rate=self.learning_rate,
            teacher_learning_rate=self.teacher_learning_rate,
            eps=self.eps,
        )
        _validate.within(0.0, 1.0, hard_weight=self.hard_weight)

    def study(self, *, data_dir: str | None = None) -> Study:
        """The study.

        Args:
            data_dir: folder of prepared TFDS sets, see `data.load`.
        """
        return Study(
            data=functools.partial(first_examples, self.dataset, self.train_examples, data_dir),
            chains=self._chains(),
            temperatures=self.temperatures,
            seeds=self.seeds,
            teacher_loss=at_one,
            online=True,
            batch_size=self.batch_size,
            attacks=attack_plans(self.eps, self.attack_examples),
            verdict=functools.partial(diagnose.masking, eps=self.eps),
            num_verdict=self.attack_examples,
        )

    def smallest(self) -> "DeitRecipe":
        """The same run with every size at its least: seconds, and numbers that mean nothing."""
        return dataclasses.replace(
            self, seeds=(0,), train_examples=64, epochs=1, batch_size=32, attack_examples=4
        )

    def _chains(self) -> dict[str, list[Stage]]:
        setting, weight = _SETTINGS[self.dataset], self.hard_weight
        soft: Any = functools.partial(distill.soft_loss, temperature_squared=True)
        hard: Any = distill.hard_label_loss
        soft_token = distill.through_token(distill.online(soft), hard_weight=weight)
        hard_token = distill.through_token(distill.online(hard), hard_weight=weight)
        # Without the token both terms are of the one head.
        soft = distill.online(functools.partial(soft, hard_weight=weight))
        hard = distill.online(functools.partial(hard, hard_weight=weight))

        teacher, alone = self._cnn(setting.teacher()), self._vit()
        transformer = alone
        if self.teacher is not None:
            teacher = Stage(frozen=export.load(self.teacher))
        if self.transformer is not None:
            transformer = Stage(frozen=export.load(self.transformer))
        student = self._vit(token=True, loss=hard_token)
        chains = {
            "no teacher": [alone],
            "soft": [teacher, self._vit(loss=soft)],
            "hard": [teacher, self._vit(loss=hard)],
            "soft, token": [teacher, self._vit(token=True, loss=soft_token)],
            "hard, token": [teacher, student],
        }
        if self.vit_teacher:
            chains["hard, token, from ViT"] = [transformer, student]
        if self.assistants:
            assistant = self._cnn(setting.assistant(), loss=hard)
            chains["hard, token, CNN assistant"] = [teacher, assistant, student]
            chains["hard, token, ViT assistant"] = [teacher, self._vit(loss=hard), student]
        return chains

    def _cnn(self, model: Any, **lesson: Any) -> Stage:
        return self._stage(model, self.teacher_learning_rate, 1e-4, lesson)

    def _vit(self, *, token: bool = False, **lesson: Any) -> Stage:
        model = _SETTINGS[self.dataset].vit(distillation_token=token)
        return self._stage(model, self.learning_rate, 0.05, lesson)

    def _stage(self, model: Any, rate: float, weight_decay: float, lesson: Any) -> Stage:
        setting = _SETTINGS[self.dataset]
        num_train = min(self.train_examples or setting.num_train, setting.num_train)
        num_steps = self.epochs * data.num_batches(num_train, self.batch_size)
        return Stage(
            model=model,
            optimizer=adamw(num_steps, rate, weight_decay),
            num_epochs=self.epochs,
            augment=setting.augment,
            **lesson,
        )


DEIT_DIGITS = DeitRecipe(
    dataset="digits",
    train_examples=600,
    epochs=60,
    batch_size=32,
    learning_rate=3e-3,
    eps=0.1,
    assistants=True,
)
DEIT_FASHION = DeitRecipe(
    dataset="fashion_mnist",
    train_examples=2_000,
    epochs=60,
    batch_size=64,
    learning_rate=3e-3,
    eps=4 / 255,
)
# On a CPU a matter of many hours.
DEIT_CIFAR10 = DeitRecipe(
    dataset="cifar10",
    epochs=200,
    batch_size=128,
    learning_rate=1e-3,
    eps=2 / 255,
    attack_examples=200,
)

RECIPES = {
    "deit-digits": DEIT_DIGITS,
    "deit-fashion": DEIT_FASHION,
    "deit-cifar10": DEIT_CIFAR10,
}


@functools.cache  # equal settings give the same optimizer, hence equal steps
def adamw(num_steps: int, rate: float, weight_decay: float) -> optax.GradientTransformation:
    """AdamW whose rate rises for a tenth of the steps and falls as a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, max(1, num_steps // 10), num_steps)
    return optax.adamw(schedule, weight_decay=weight_decay)


def attack_plans(eps: float, num_examples: int) -> dict[str, AttackPlan]:
    """FGSM on many examples, and AutoAttack on some."""
    autoattack = functools.partial(attacks.autoattack, eps=eps)
    return {
        "fgsm": AttackPlan(functools.partial(attacks.fgsm, eps=eps), 1000),
        "autoattack": AttackPlan(autoattack, num_examples, batch_size=100),
    }


def first_examples(name: str, size: int | None, data_dir: str | None) -> data.Dataset:
    """A data set with its first training examples."""
    dataset = data.load(name, data_dir=data_dir)
    if size is None:
        return dataset
    return dataset._replace(train=data.Split(*(part[:size] for part in dataset.train)))


def at_one(temperature: float) -> Any:
    """The loss of a teacher that is an ordinary network, whatever the students' T."""
    del temperature
    return distill.soft_loss(1.0)
