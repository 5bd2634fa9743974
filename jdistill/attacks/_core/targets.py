"""The classes that APGD-T and FAB-T aim at, one after another."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate
from jdistill.attacks._core import problem as _base
from jdistill.attacks._core.problem import Goal, Problem
from jdistill.typing import Array, ArrayLike


class Aims(NamedTuple):
    """Which class each start of an example aims at.

    Attributes:
        ranked: `[B, K - 1]` int32, the classes other than the label, the largest clean logit
            first; or `[B, 1]`, the targets given.
        first: scalar, the rank that the first start aims at.
    """

    ranked: Array
    first: Array

    @classmethod
    def of(cls, goal: Goal, logits: Array, first: Array) -> "Aims":
        """From the clean logits `[B, K]`."""
        if goal.targets is not None:
            return cls(goal.targets[:, None], first)
        own = jax.nn.one_hot(goal.labels, logits.shape[1], dtype=bool)
        order = jnp.argsort(-jnp.where(own, -jnp.inf, logits), axis=1)
        return cls(order[:, :-1].astype(jnp.int32), first)

    def at(self, place: Array) -> Array:
        """The class of each example's `place` `[B]` in the order, from the first one aimed at."""
        # A traced first rank may leave fewer classes than starts: the last one is then repeated.
        rank = jnp.minimum(self.first + place, self.ranked.shape[1] - 1)
        return jnp.take_along_axis(self.ranked, rank[:, None], axis=1)[:, 0]


def check(problem: Problem, num_targets: int, first_target: ArrayLike) -> tuple[int, Array]:
    """How many classes there are to aim at, at most `num_targets`, and the first one's rank.

    Raises:
        ValueError: num_targets below 1, first_target outside `0..K-2`.
    """
    _validate.count(num_targets=num_targets)
    _validate.rank(0, first_target=first_target)
    last = _base.num_classes(problem) - 2
    _validate.within(0, last, first_target=first_target)
    if problem.goal.targets is not None:
        num_targets, first_target = 1, 0
    elif not _validate.is_traced(first_target):
        _validate.count(minimum=0, first_target=first_target)
        number: Any = np.asarray(first_target)
        num_targets = min(num_targets, last + 1 - int(number))
    return min(num_targets, last + 1), jnp.asarray(first_target, jnp.int32)
