"""Studies of examples that no student can learn robustly, and of teachers that are sure of them."""

import dataclasses
import functools
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax

from jdistill import _validate, attacks, data, diagnose, losses, robust, train
from jdistill.evaluate import AttackPlan
from jdistill.nets._two_layer import TwoLayer
from jdistill.study._deit import at_one
from jdistill.study._study import NamedArrays, Stage, Study
from jdistill.typing import Array, Bounds


@dataclasses.dataclass(frozen=True, kw_only=True)
class UnlearnableRecipe:
    """Train two-layer networks robustly, where a share of the examples cannot be learned so.

    Inputs are patches of noise. One patch of each also holds the signal: along the direction u, or,
    in an unlearnable example, along v, which no network sees. Its label can then only be remembered
    by its noise. Teachers are rules that see both directions: a bad one is sure of every example, a
    good one has no opinion of the unlearnable ones. Chains: from the true labels alone, from either
    teacher, and from either through an assistant, which is a network as the student is.

    All networks learn from adversarial inputs: those of the paper, whose signal along u is made
    weaker in every patch, or those of PGD. Students learn soft labels of the clean inputs.

    Example:
        >>> recipe = UnlearnableRecipe(dataset="patches", share=0.2)
        >>> list(recipe.study().chains)[:3]
        ['labels alone', 'bad teacher', 'good teacher']

    References:
        Lee et al. 2026, "Why Robust Teachers Fail", arXiv:2605.21999, appendix A.5, and its
        released code, which draws 4,000 training examples with replacement where this has 20 epochs
        of 200, and tests on 100.
    """

    dataset: Literal["patches"]
    """Name of the data set, which is drawn."""
    share: float = 0.1
    """Probability that an example is unlearnable, from 0 to 1."""
    data_seed: int = 0
    """Seed of the examples."""
    temperatures: tuple[float, ...] = (1.0,)
    """Temperatures T of the students and of their teachers' labels, each above 0 (no unit)."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds; each gives initial weights and an order of the examples of its own."""

    train_examples: int = 200
    """Training examples."""
    test_examples: int = 1000
    """Test examples, of which the same share is unlearnable."""
    patches: int = 4
    """Patches of an input."""
    dimension: int = 100
    """Numbers in a patch; the first is along u, the last along v, and noise lies between."""
    signal: float = 5.0
    """Size of the signal (input units)."""
    noise: float = 0.4
    """Standard deviation of the noise (input units)."""

    width: int = 80
    """Hidden units for each class."""
    margin: float = 10.0
    """Logits by which a teacher prefers the class that it is sure of."""
    epochs: int = 20
    """Epochs per network (passes over the training set)."""
    batch_size: int = 1
    """Training examples per step."""
    learning_rate: float = 0.01
    """Learning rate of plain SGD."""

    eps: float = 0.5
    """Radius of training, PGD, AutoAttack, and the verdict (linf, in input units)."""
    attack_steps: int = 0
    """Steps of the PGD that training examples are crafted by; 0 moves the first number of each
    patch by eps against the label, as the paper does."""
    attack_examples: int = 200
    """Test examples for AutoAttack and the verdict."""

    def __post_init__(self) -> None:
        """Check what the study does not, and name what is wrong."""
        _validate.one_of(("patches",), dataset=self.dataset)
        _validate.count(
            train_examples=self.train_examples,
            test_examples=self.test_examples,
            patches=self.patches,
            width=self.width,
            epochs=self.epochs,
            batch_size=self.batch_size,
            attack_examples=self.attack_examples,
        )
        _validate.count(minimum=3, dimension=self.dimension)
        _validate.count(minimum=0, data_seed=self.data_seed, attack_steps=self.attack_steps)
        _validate.positive(
            signal=self.signal,
            margin=self.margin,
            learning_rate=self.learning_rate,
            eps=self.eps,
        )
        _validate.non_negative(noise=self.noise)
        _validate.within(0.0, 1.0, share=self.share)

    def study(self, *, data_dir: str | None = None) -> Study:
        """The study.

        Args:
            data_dir: unused, the examples are drawn.
        """
        del data_dir
        pgd = functools.partial(attacks.pgd, eps=self.eps, num_steps=20, bounds=self.bounds)
        autoattack = functools.partial(attacks.autoattack, eps=self.eps, bounds=self.bounds)
        return Study(
            data=self.examples,
            chains=self._chains(),
            temperatures=self.temperatures,
            seeds=self.seeds,
            teacher_loss=robust.on_adversarial(at_one),
            student_loss=robust.ard_loss,
            online=True,
            batch_size=self.batch_size,
            attacks={
                "pgd-20": AttackPlan(pgd),
                "autoattack": AttackPlan(autoattack, self.attack_examples, batch_size=100),
            },
            verdict=functools.partial(diagnose.masking, eps=self.eps, bounds=self.bounds),
            num_verdict=self.attack_examples,
        )

    def smallest(self) -> "UnlearnableRecipe":
        """The same run with every size at its least: seconds, and numbers that mean nothing."""
        return dataclasses.replace(
            self,
            seeds=(0,),
            train_examples=32,
            test_examples=32,
            width=8,
            epochs=1,
            batch_size=8,
            attack_examples=4,
        )

    @property
    def bounds(self) -> Bounds:
        """A box that holds every input and the ball around it."""
        # No draw of the noise is eight deviations away.
        end = max(self.signal, 8 * self.noise) + self.eps
        return -end, end

    def examples(self) -> NamedArrays:
        """The examples; a larger share changes some of them, and leaves the others as they are."""
        of_train, of_test = np.random.SeedSequence(self.data_seed).spawn(2)
        return NamedArrays(
            self.dataset,
            self._draw(of_train, self.train_examples),
            self._draw(of_test, self.test_examples),
            f"Each example is unlearnable with probability {self.share:g}.",
        )

    def teacher(self, *, sure: bool) -> "LabelRule":
        """A teacher: one that is sure of every example, or only of those that can be learned."""
        return LabelRule(self.margin, sure)

    def _draw(self, seed: np.random.SeedSequence, size: int) -> data.Split:
        draw = np.random.default_rng(seed)
        labels = draw.integers(0, 2, size).astype(np.int32)
        unlearnable = draw.uniform(size=size) < self.share
        where = draw.integers(0, self.patches, size)
        inputs = np.zeros((size, self.patches, self.dimension), np.float32)
        shape = (size, self.patches, self.dimension - 2)
        inputs[:, :, 1:-1] = self.noise * draw.normal(size=shape)
        along = np.where(unlearnable, self.dimension - 1, 0)
        inputs[np.arange(size), where, along] = self.signal * (2 * labels - 1)
        return data.Split(inputs, labels)

    def _chains(self) -> dict[str, list[Stage]]:
        network = Stage(
            model=TwoLayer(self.width),
            optimizer=_sgd(self.learning_rate),
            num_epochs=self.epochs,
            make_step=_robust_step(self.eps, self.attack_steps, self.bounds),
        )
        bad, good = (Stage(frozen=self.teacher(sure=sure)) for sure in (True, False))
        return {
            # The first one is what the others are compared with.
            "labels alone": [network],
            "bad teacher": [bad, network],
            "good teacher": [good, network],
            "bad teacher, assistant": [bad, network, network],
            "good teacher, assistant": [good, network, network],
        }


@dataclasses.dataclass(frozen=True)
class LabelRule:
    """Teacher that reads the label off the two directions of the signal.

    Attributes:
        margin: logits by which it prefers the label where it is sure.
        sure: whether it is so of unlearnable examples, too; otherwise their logits are 0.
    """

    margin: float
    sure: bool

    def __call__(self, inputs: Array) -> Array:
        """Logits `[B, 2]` of inputs `[B, P, D]`."""
        # Sums, so that no patch decides alone: an attack changes nothing where the signal is above
        # twice the number of patches times its radius, as it is by default.
        learnable, unlearnable = (jnp.sum(inputs[..., place], axis=-1) for place in (0, -1))
        sign = jnp.sign(learnable + unlearnable)
        if not self.sure:
            sign = jnp.where(jnp.abs(unlearnable) > jnp.abs(learnable), 0.0, sign)
        return self.margin * jnp.stack([-sign, sign], axis=-1) / 2


def is_unlearnable(inputs: np.ndarray) -> np.ndarray:
    """Of clean inputs `[N, P, D]`, whether their signal lies along the last direction, `[N]`."""
    found: np.ndarray = np.any(np.asarray(inputs)[..., -1] != 0, axis=-1)
    return found


def against_signal(
    logits_fn: Any, key: Any, inputs: Any, labels: Any, *, eps: float, bounds: Bounds
) -> attacks.AttackResult:
    """The paper's adversary of training: the first number of each patch, moved against the label.

    It is FGSM on the sum of these numbers; the network plays no part.
    """
    del logits_fn, key
    return attacks.fgsm(_signal, None, inputs, labels, eps=eps, bounds=bounds, loss=losses.margin)


def _signal(inputs: Array) -> Array:
    learnable = jnp.sum(inputs[..., 0], axis=-1)
    return jnp.stack([-learnable, learnable], axis=-1)


@functools.cache  # equal settings give the same step, hence one compilation
def _robust_step(eps: float, num_steps: int, bounds: Bounds) -> Any:
    attack: Any = functools.partial(against_signal, eps=eps, bounds=bounds)
    if num_steps:
        attack = functools.partial(attacks.pgd, eps=eps, num_steps=num_steps, bounds=bounds)
    return functools.partial(train.make_train_step, objective=robust.adversarial(attack))


@functools.cache
def _sgd(learning_rate: float) -> optax.GradientTransformation:
    return optax.sgd(learning_rate)


UNLEARNABLE = UnlearnableRecipe(dataset="patches")

RECIPES = {"unlearnable": UNLEARNABLE}
