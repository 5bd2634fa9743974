"""Targets of APGD-T and FAB-T, one class after another, and the starts at each of them."""

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate, norms
from jdistill._jax import register, static_field
from jdistill.attacks._core.problem import Goal, Problem, need_key, num_classes, one_per_example
from jdistill.typing import Array, ArrayLike, Norm


@register
class Starts:
    """The starts of an attack, numbered from 0; those at the first target come first.

    Attributes:
        first_target: `[B]` int32, rank of the first target in the order of the clean logits, 0 is
            the runner-up.
        num_restarts: starts at each target.
        num_targets: the most classes that an example is moved towards; None without targets.
        num_ranks: classes that there are to move towards.
    """

    first_target: Array
    num_restarts: int = static_field()
    num_targets: int | None = static_field()
    num_ranks: int = static_field()

    @classmethod
    def of(
        cls,
        problem: Problem,
        num_restarts: int,
        num_targets: int | None = None,
        first_target: ArrayLike = 0,
    ) -> "Starts":
        """Starts of an attack with these checked arguments.

        Args:
            problem: the attack's arguments; where it has targets, these are the only ones.
            num_restarts: starts at each target.
            num_targets: fewer where fewer classes are left; None without targets.
            first_target: a scalar or `[B]`; may be traced.

        Raises:
            ValueError: counts below 1, first_target not whole or outside `0..K-2`.
        """
        _validate.count(num_restarts=num_restarts)
        ranks = num_classes(problem) - 1
        _validate.within(0, ranks - 1, first_target=first_target)
        dtype = getattr(first_target, "dtype", None) or np.asarray(first_target).dtype
        if not np.issubdtype(dtype, np.integer):
            raise ValueError(
                f"expected first_target to be a whole number, got {first_target!r}; pass a rank in "
                "the order of the clean logits, 0 is the runner-up"
            )
        if problem.goal.targets is not None:
            ranks, first_target = 1, 0
        if num_targets is not None:
            _validate.count(num_targets=num_targets)
            traced = _validate.is_traced(first_target)
            smallest = 0 if traced else int(np.min(first_target, initial=ranks - 1))
            num_targets = min(num_targets, ranks - smallest)
        first = one_per_example(first_target, problem.inputs, name="first_target")
        return cls(
            first_target=first.astype(jnp.int32),
            num_restarts=num_restarts,
            num_targets=num_targets,
            num_ranks=ranks,
        )

    @property
    def most(self) -> int:
        """The most starts that an example has."""
        return self.num_restarts * (self.num_targets or 1)

    def is_last(self, start: Array) -> Array:
        """Mask of the examples whose start `[B]` is their last one, `[B]` bool."""
        left = jnp.clip(self.num_ranks - self.first_target, 1, self.num_targets or 1)
        return start + 1 >= left * self.num_restarts

    def targets(self, goal: Goal, logits: Array) -> Array | None:
        """The classes `[B, num_targets]` in their order, from the clean logits `[B, K]`."""
        if self.num_targets is None:
            return None
        if goal.targets is not None:
            return goal.targets[:, None]
        label = jax.nn.one_hot(goal.labels, logits.shape[1], dtype=bool)
        order = jnp.argsort(-jnp.where(label, -jnp.inf, logits), axis=1)[:, :-1]
        ranks = self.first_target[:, None] + jnp.arange(self.num_targets)[None]
        # An example with fewer classes left ends before the repeated ones.
        return jnp.take_along_axis(order, ranks, axis=1, mode="clip").astype(jnp.int32)

    def target(self, targets: Array | None, start: Array) -> Array | None:
        """The class that each example's start `[B]` moves towards, of those from `targets`."""
        if targets is None:
            return None
        place = start[:, None] // self.num_restarts
        return jnp.take_along_axis(targets, place, axis=1, mode="clip")[:, 0]

    def keys(self, problem: Problem, start: Array) -> Array:
        """A key for each example's start `[B]`, the same wherever the first target is."""
        number = self.first_target * self.num_restarts + start
        return jax.vmap(jax.random.fold_in)(need_key(problem, "random starts"), number)


def direction(keys: Array, inputs: Array, norm: Norm) -> Array:
    """A random direction of length 1 for each of the keys `[B]`, `[B, ...]`."""

    def draw(key: Array) -> Array:
        shape, dtype = inputs.shape[1:], inputs.dtype
        if norm == "linf":
            return jax.random.uniform(key, shape, dtype, minval=-1.0, maxval=1.0)
        return jax.random.normal(key, shape, dtype)

    return norms.normalize(jax.vmap(draw)(keys), norm)
