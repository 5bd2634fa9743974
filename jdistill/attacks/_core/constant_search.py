"""Carlini and Wagner's search for the weight of the adversarial term, Adam, and their box."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdistill._jax import register, static_field
from jdistill.attacks._core.engine import Method, Progress, select
from jdistill.attacks._core.problem import AttackResult, Problem, start_point
from jdistill.typing import Array, ArrayLike

# Above this the constant has never succeeded yet, so the search multiplies instead of bisecting.
_NEVER = 1e9
_UPPER = 1e10
# arctanh(1) is infinite: pixels on the box's faces are moved in by this factor, as the paper does.
_INSIDE = 0.999999
# The final search of a long one repeats the best constant known to succeed.
_REPEAT_FROM = 10


class Search(NamedTuple):
    """The weight `c` of the adversarial term and what is known about it, `[B]` each."""

    const: Array  # the one being tried
    lower: Array  # the largest that failed
    upper: Array  # the smallest that succeeded
    number: Array  # of constants tried before
    step: Array  # with this constant
    succeeded: Array  # with this constant
    previous_loss: Array  # at the last check for an early end


@register
class ConstantSearch(Method):
    """Base of attacks that look for the smallest constant that succeeds."""

    confidence: Array  # [B]
    learning_rate: Array  # [B]
    initial_const: Array  # [B]
    num_searches: int = static_field()
    num_steps: int = static_field()
    abort_early: bool = static_field()
    minimum_norm = True
    keeps_closest = True

    @property
    def num_events(self) -> int:  # type: ignore[override]
        return self.num_searches * self.num_steps

    def first_search(self) -> Search:
        """The search before its first step."""
        const = self.initial_const
        zeros = jnp.zeros(const.shape, jnp.int32)
        unknown = jnp.zeros_like(const), jnp.full_like(const, _UPPER)
        return self._begin(const, *unknown, number=zeros)

    def _begin(self, const: Array, lower: Array, upper: Array, number: Array) -> Search:
        """The search before the first step with a constant."""
        return Search(
            const=const,
            lower=lower,
            upper=upper,
            number=number,
            step=jnp.zeros_like(number),
            succeeded=jnp.zeros(number.shape, bool),
            previous_loss=jnp.full_like(const, jnp.inf),
        )

    def next_search(
        self, search: Search, success: Array, loss: Array
    ) -> tuple[Search, Array, Array]:
        """The search after a step, whether its constant is new, and whether all were tried."""
        succeeded = search.succeeded | success
        checked = search.step % max(self.num_steps // 10, 1) == 0
        stalled = checked & (loss > 0.9999 * search.previous_loss) & self.abort_early
        ended = stalled | (search.step + 1 == self.num_steps)
        same = search._replace(
            step=search.step + 1,
            succeeded=succeeded,
            previous_loss=jnp.where(checked, loss, search.previous_loss),
        )
        # Times 10, or the middle once a constant succeeded.
        upper = jnp.where(succeeded, jnp.minimum(search.upper, search.const), search.upper)
        lower = jnp.where(succeeded, search.lower, jnp.maximum(search.lower, search.const))
        const = jnp.where(upper < _NEVER, (lower + upper) / 2, search.const * 10)
        if self.num_searches >= _REPEAT_FROM:
            const = jnp.where(search.number + 1 == self.num_searches - 1, upper, const)
        new = select(ended, self._begin(const, lower, upper, search.number + 1), same)
        return new, ended, new.number == self.num_searches

    def no_note(self, problem: Problem) -> Array:
        return jnp.full_like(self.initial_const, jnp.nan)

    def info(
        self, problem: Problem, state: Any, progress: Progress, result: AttackResult
    ) -> dict[str, Array]:
        assert progress.best is not None
        return {"const": progress.best[2]}


def first_point(init: ArrayLike | None, problem: Problem) -> Array:
    """An injected start moved into the box, or the inputs, `[B, ...]`."""
    if init is None:
        return problem.inputs
    return jnp.clip(start_point(init, problem), *problem.bounds)


def to_box(w: Array, bounds: tuple[Array, Array]) -> Array:
    """The point of the box that the free variable `w` stands for."""
    low, high = bounds
    # At tanh(w) = 1 the sum can round to just outside the box.
    return jnp.clip((low + high) / 2 + (high - low) / 2 * jnp.tanh(w), low, high)


def from_box(inputs: Array, bounds: tuple[Array, Array]) -> Array:
    """The free variable of a point of the box, finite on the box's faces too."""
    low, high = bounds
    return jnp.arctanh((2 * inputs - low - high) / (high - low) * _INSIDE)


def per_example_adam(b1: float = 0.9) -> optax.GradientTransformation:
    """Adam with one state (moments and count) per example, so that each can start anew alone."""
    adam = optax.scale_by_adam(b1)
    return optax.GradientTransformation(
        init=jax.vmap(adam.init),
        update=lambda gradient, state, params=None: jax.vmap(adam.update)(gradient, state),
    )
