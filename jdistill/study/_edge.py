"""Studies of small students: how many parameters distillation can save, and what is lost then."""

import dataclasses
import functools
from typing import Any, Literal

from jdistill import _validate, data, diagnose, distill, nets
from jdistill.study._deit import adamw, at_one, attack_plans, first_examples
from jdistill.study._study import Stage, Study

# Shares of the width of the teacher's layers: 78,055, 19,695, and 5,014 parameters.
_WIDTHS = (0.495, 0.245, 0.12)
_NUM_TRAIN = 55_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class EdgeRecipe:
    """Distill a network into students of a quarter to a 64th of its parameters, and export them.

    Chains, named by their students' parameters: from the teacher, which has 312,202, to students of
    about a quarter, a sixteenth, and a 64th of them; to the smallest one through the larger ones as
    assistants; the smallest one without a teacher; and to an EMO, a network of inverted residuals
    and attention, with about a quarter of the parameters (28%). The first seed's students are
    exported.

    The teacher is an ordinary network (T = 1). Students learn from its softmax at T, that term
    times T², and from the true labels. T = 4, because small networks learn best from soft labels
    between 2.5 and 4 (Hinton et al., section 3, on MNIST with 30 units a layer), and a small weight
    of the true labels, because a considerably lower one than that of the soft labels was best there
    (section 2). T² keeps the two terms' gradients comparable at any T. The teacher drops half of
    its hidden units in training, the students none: half of the smallest one's 24 are too few.

    Example:
        >>> recipe = EdgeRecipe(dataset="mnist", epochs=10, batch_size=64, eps=0.1)
        >>> list(recipe.study().chains)[:3]
        ['5k', '20k', '78k']

    References:
        Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network"; Mirzadeh et al.
        2020, "Improved Knowledge Distillation via Teacher Assistant".
    """

    dataset: Literal["mnist"]
    """Name of the data set."""
    temperatures: tuple[float, ...] = (4.0,)
    """Temperatures T of the soft labels, each above 0 (no unit)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds; each gives initial weights and an order of the examples of its own."""

    train_examples: int | None = None
    """Use only the first so many training examples (none: all)."""
    epochs: int
    """Epochs per network (passes over the training set)."""
    batch_size: int
    """Training examples per step."""
    learning_rate: float = 3e-3
    """Largest learning rate of AdamW: it rises for a tenth of the steps and falls as a cosine."""
    hard_weight: float = 0.1
    """Weight of the true labels beside the teacher's, from 0 to 1."""
    efficient: bool = True
    """Also train an EMO."""

    eps: float
    """Radius of FGSM, AutoAttack, and the verdict (linf, in units of the pixel range 0..1)."""
    attack_examples: int = 100
    """Test examples for AutoAttack and the verdict."""

    def __post_init__(self) -> None:
        """Check what the study does not, and name what is wrong."""
        _validate.one_of(("mnist",), dataset=self.dataset)
        _validate.count(epochs=self.epochs, batch_size=self.batch_size)
        _validate.count(attack_examples=self.attack_examples)
        if self.train_examples is not None:
            _validate.count(train_examples=self.train_examples)
        _validate.positive(learning_rate=self.learning_rate, eps=self.eps)
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
            student_loss=functools.partial(
                distill.soft_loss, hard_weight=self.hard_weight, temperature_squared=True
            ),
            batch_size=self.batch_size,
            attacks=attack_plans(self.eps, self.attack_examples),
            verdict=functools.partial(diagnose.masking, eps=self.eps),
            num_verdict=self.attack_examples,
            deployed=True,
        )

    def smallest(self) -> "EdgeRecipe":
        """The same run with every size at its least: seconds, and numbers that mean nothing."""
        return dataclasses.replace(
            self,
            seeds=(0,),
            train_examples=64,
            epochs=1,
            batch_size=32,
            efficient=False,
            attack_examples=4,
        )

    def _chains(self) -> dict[str, list[Stage]]:
        teacher = self._stage(nets.mnist_net())
        quarter, sixteenth, smallest = (
            self._stage(nets.mnist_net(width, dropout_rate=0.0)) for width in _WIDTHS
        )
        # The first one is what the others are compared with.
        chains = {
            "5k": [teacher, smallest],
            "20k": [teacher, sixteenth],
            "78k": [teacher, quarter],
            "78k-20k-5k": [teacher, quarter, sixteenth, smallest],
            "5k alone": [smallest],
        }
        if self.efficient:
            # With a stride of 2 it takes a quarter of the operations.
            chains["87k EMO"] = [teacher, self._stage(nets.emo_small(0.88, stem_stride=2))]
        return chains

    def _stage(self, model: Any) -> Stage:
        num_train = min(self.train_examples or _NUM_TRAIN, _NUM_TRAIN)
        num_steps = self.epochs * data.num_batches(num_train, self.batch_size)
        return Stage(
            model=model,
            optimizer=adamw(num_steps, self.learning_rate, 1e-4),
            num_epochs=self.epochs,
        )


EDGE_MNIST = EdgeRecipe(dataset="mnist", train_examples=6_000, epochs=10, batch_size=64, eps=0.1)

RECIPES = {"edge-mnist": EDGE_MNIST}
