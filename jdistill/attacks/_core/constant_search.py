"""What the attacks with a searched constant share: its search, Adam and the box, per example."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdistill.typing import Array

# Above this the constant has never succeeded yet, so the search multiplies instead of bisecting.
_NEVER = 1e9
_UPPER = 1e10
# arctanh(1) is infinite: pixels on the box's faces are moved in by this factor, as the paper does.
_INSIDE = 0.999999
# The final search of a long one repeats the best constant known to succeed.
_REPEAT_FROM = 10


class Bracket(NamedTuple):
    """The weight `c` of the adversarial term and what is known about it, `[B]` each."""

    const: Array  # the one being tried
    lower: Array  # the largest that failed
    upper: Array  # the smallest that succeeded


def first_bracket(const: Array) -> Bracket:
    """The state of the search before anything was tried."""
    return Bracket(const, jnp.zeros_like(const), jnp.full_like(const, _UPPER))


def next_bracket(bracket: Bracket, succeeded: Array, search: Array, num_searches: int) -> Bracket:
    """The constant to try after search number `search`: times 10, or the middle once one worked."""
    const, lower, upper = bracket
    upper = jnp.where(succeeded, jnp.minimum(upper, const), upper)
    lower = jnp.where(succeeded, lower, jnp.maximum(lower, const))
    known = upper < _NEVER
    const = jnp.where(known, (lower + upper) / 2, const * 10)
    if num_searches >= _REPEAT_FROM:
        const = jnp.where(search + 1 == num_searches - 1, upper, const)
    return Bracket(const, lower, upper)


def to_box(w: Array, bounds: tuple[Array, Array]) -> Array:
    """The point of the box that the free variable `w` stands for."""
    low, high = bounds
    # At tanh(w) = 1 the sum can round to just outside the box.
    return jnp.clip((low + high) / 2 + (high - low) / 2 * jnp.tanh(w), low, high)


def from_box(inputs: Array, bounds: tuple[Array, Array]) -> Array:
    """The free variable of a point of the box, finite on the box's faces too."""
    low, high = bounds
    return jnp.arctanh((2 * inputs - low - high) / (high - low) * _INSIDE)


def per_example_adam() -> optax.GradientTransformation:
    """Adam with one state (moments and count) an example, so that each can start anew alone."""
    adam = optax.scale_by_adam()
    return optax.GradientTransformation(
        init=jax.vmap(adam.init),
        update=lambda gradient, state, params=None: jax.vmap(adam.update)(gradient, state),
    )


def select(condition: Array, new: Any, old: Any) -> Any:
    """Leaf by leaf, the new rows where the condition `[B]` holds."""
    return jax.tree.map(
        lambda a, b: jnp.where(condition.reshape(a.shape[:1] + (1,) * (a.ndim - 1)), a, b), new, old
    )
