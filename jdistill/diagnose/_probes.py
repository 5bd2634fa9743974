"""Probes of the network itself, without an attack: its gradients, and what they promise."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdistill import losses, metrics, norms
from jdistill._jax import full_precision, jit
from jdistill.diagnose import _thresholds
from jdistill.typing import Array, LogitsFn, Norm


class Gradients(NamedTuple):
    """The largest entry of each loss's input gradient, `[B]`; NaN where one is not finite.

    Compiled code returns JAX's arrays, `Rows.run` NumPy's.

    Attributes:
        cross_entropy: at T = 1.
        cross_entropy_at_temperature: at the temperature of the probe.
        margin: of the difference of logits.
        dlr: of the difference of logits ratio; the margin's below three classes.
    """

    cross_entropy: Any
    cross_entropy_at_temperature: Any
    margin: Any
    dlr: Any


def gradients(logits_fn: LogitsFn, inputs: Array, labels: Array, temperature: Array) -> Gradients:
    """The sizes of the input gradients of four losses, by one forward pass."""
    with full_precision():
        return Gradients(*_gradients(logits_fn, inputs, labels, temperature))


@jit
def _gradients(logits_fn: LogitsFn, inputs: Array, labels: Array, temperature: Array) -> Array:
    logits, pullback = jax.vjp(logits_fn, inputs)
    num_classes = logits.shape[-1]
    measured: Any = [
        losses.cross_entropy,
        functools.partial(losses.cross_entropy, temperature=temperature),
        losses.margin,
        losses.dlr if num_classes >= 3 else losses.margin,
    ]
    of_logits = jnp.stack(
        [jax.grad(lambda z, loss=loss: jnp.sum(loss(z, labels)))(logits) for loss in measured]
    )

    def largest(cotangent: Array) -> Array:
        (gradient,) = pullback(cotangent)
        return jnp.max(jnp.abs(norms.flatten(gradient)), axis=-1)

    sizes = jax.lax.map(largest, of_logits)
    return jnp.where(jnp.isfinite(sizes), sizes, jnp.nan)


class Agreement(NamedTuple):
    """Whether the margin changes as its gradient says, `[B]` bool each.

    Attributes:
        local: a short step changes it by something else.
        jump: a step of the radius changes it by many times as much.
        unrepeated: the same input has other logits when asked again.
    """

    local: Any
    jump: Any
    unrepeated: Any


def agreement(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    radius: Array,
    bounds: tuple[Array, Array],
) -> Agreement:
    """Compare the gradient of the margin with differences of the margin.

    Args:
        logits_fn: the network.
        keys: `[B]`, for directions where the gradient has none.
        inputs: `[B, ...]`.
        labels: `[B]`.
        radius: the largest step of one feature.
        bounds: the box, which no step leaves.
    """
    with full_precision():
        return _agreement(logits_fn, keys, inputs, labels, radius, bounds)


@jit
def _agreement(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    radius: Array,
    bounds: tuple[Array, Array],
) -> Agreement:
    def total(x: Array) -> tuple[Array, Array]:
        logits = logits_fn(x)
        return jnp.sum(losses.margin(logits, labels)), logits

    gradient, logits = jax.grad(total, has_aux=True)(inputs)
    size = jnp.max(jnp.abs(logits), axis=-1, where=~jnp.isneginf(logits), initial=0.0)
    rounding = _thresholds.ROUNDING * jnp.finfo(logits.dtype).eps * size
    # Along the gradient's signs the prediction is as large as it gets, so that rounding matters
    # least. Where an entry is 0 the gradient promises that nothing happens: any sign tests that.
    signs = jax.vmap(lambda key, x: jax.random.rademacher(key, x.shape, x.dtype))(keys, inputs)
    direction = jnp.where(gradient == 0, signs, jnp.sign(gradient))

    def changes(step: Array) -> tuple[Array, Array]:
        """The change of the margin over a step to both sides: seen, and predicted."""
        ahead = jnp.clip(inputs + step * direction, *bounds)
        behind = jnp.clip(inputs - step * direction, *bounds)
        seen = losses.margin(logits_fn(ahead), labels) - losses.margin(logits_fn(behind), labels)
        predicted = jnp.sum(norms.flatten(gradient * (ahead - behind)), axis=-1)
        return seen, predicted

    shortest = jnp.minimum(_thresholds.SHORTEST_STEP * (bounds[1] - bounds[0]), radius)
    seen, predicted = changes(jnp.maximum(_thresholds.LOCAL_STEP * radius, shortest))
    larger = jnp.maximum(jnp.abs(seen), jnp.abs(predicted))
    local = jnp.abs(seen - predicted) > _thresholds.DISAGREEMENT * larger + rounding
    seen, predicted = changes(radius)
    jump = jnp.abs(seen) > _thresholds.JUMP * jnp.abs(predicted) + rounding
    again = logits_fn(inputs[::-1])[::-1]
    # Two classes that are masked out both times do not differ.
    difference = jnp.max(jnp.where(again == logits, 0.0, jnp.abs(again - logits)), axis=-1)
    return Agreement(local, jump, difference > _thresholds.REPEATS * size)


def noise_breaks(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    eps: Array,
    bounds: tuple[Array, Array],
    *,
    norm: Norm,
    num_draws: int,
) -> Array:
    """Whether any of so many random points of the ball is misclassified, `[B]` bool.

    For linf the points are corners of the ball, which are the farthest.
    """
    with full_precision():
        return _noise_breaks(
            logits_fn, keys, inputs, labels, eps, bounds, norm=norm, num_draws=num_draws
        )


@functools.partial(jit, static_argnames=("norm", "num_draws"))
def _noise_breaks(
    logits_fn: LogitsFn,
    keys: Array,
    inputs: Array,
    labels: Array,
    eps: Array,
    bounds: tuple[Array, Array],
    *,
    norm: Norm,
    num_draws: int,
) -> Array:
    def corner(key: Array, x: Array) -> Array:
        return eps * jax.random.rademacher(key, x.shape, x.dtype)

    def draw(number: Array, broken: Array) -> Array:
        draws = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
        if norm == "linf":
            noise = jax.vmap(corner)(draws, inputs)
        else:
            noise = norms.random_start(draws, inputs, eps, norm)
        logits = logits_fn(jnp.clip(inputs + noise, *bounds))
        return broken | (metrics.predicts(logits) & (losses.margin(logits, labels) > 0))

    return jax.lax.fori_loop(0, num_draws, draw, jnp.zeros(labels.shape, bool))
