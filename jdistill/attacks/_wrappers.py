"""Adaptive tools: a defense's random or non-differentiable parts as a `logits_fn` to attack."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jdistill import _validate
from jdistill.nets import callable_logits_fn
from jdistill.typing import Array, LogitsFn


def expectation(
    random_logits_fn: Callable[[Array, Array], Array], key: Array, *, num_draws: int
) -> LogitsFn:
    """Expectation over transformation: the mean logits of a random network, as a `logits_fn`.

    With `n` draws of the transformation::

        z̄(x) = 1/n · Σ_d z(key_d, x),     key_d = fold_in(key, d)

    Its gradient is the mean of the draws' gradients. A `logits_fn` is a pure function, so the
    draws are fixed by `key` once and for all: at every step of an attack, and for every example
    (common random numbers: an example's draws do not depend on its place in a batch). An attack
    can therefore adapt to these very draws. Take enough of them, and judge what it found by
    `expectation(random_logits_fn, another_key, ...)` or by the defense as it is deployed.

    Args:
        random_logits_fn: `(key, inputs [B, ...]) -> logits [B, K]`, such as a network behind
            random noise; a pytree that carries its weights, or a plain function. It is called
            under `vmap`, one example at a time (`[1, ...]`), with the same key for each.
        key: one key.
        num_draws: draws in the mean, at least 1; static. All are computed at once, so memory and
            time grow with it. A query of the attack stands for `num_draws` forward passes.

    Returns:
        A pytree `inputs [B, ...] -> logits [B, K]`: new weights and a new key compile nothing.

    Raises:
        ValueError: num_draws below 1, not one key, something that cannot be called.

    Example:
        >>> def noisy(key, x):
        ...     return (x + jax.random.normal(key, x.shape)) @ jnp.array([[1.0, -1.0]])
        >>> logits_fn = expectation(noisy, jax.random.key(0), num_draws=1000)
        >>> logits = logits_fn(jnp.array([[3.0], [3.0]]))
        >>> logits.shape, bool(abs(logits[0, 0] - 3.0) < 0.2), bool(logits[0, 0] == logits[1, 0])
        ((2, 2), True, True)

    References:
        Athalye, Engstrom, Ilyas & Kwok 2018, "Synthesizing Robust Adversarial Examples", section
        2; Athalye, Carlini & Wagner 2018, "Obfuscated Gradients Give a False Sense of Security",
        section 4.2. There the expectation is of the loss; here of the logits, which any attack
        takes as they are, whatever its loss.
    """
    _validate.function(random_logits_fn=random_logits_fn)
    _validate.count(num_draws=num_draws)
    key = _validate.prng_key(key)
    if key.shape != ():
        raise ValueError(
            f"expected one key, got keys of shape {key.shape}; the draws are folded from one: pass "
            "jax.random.key(0)"
        )
    random_logits_fn = callable_logits_fn(random_logits_fn)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(num_draws))
    return Partial(_mean_logits, random_logits_fn, keys)


def _mean_logits(random_logits_fn: Any, keys: Array, inputs: Array) -> Array:
    def one_draw(key: Array) -> Array:
        return jax.vmap(lambda example: random_logits_fn(key, example[None])[0])(inputs)

    return jnp.mean(jax.vmap(one_draw)(keys), axis=0)


def bpda(
    logits_fn: LogitsFn,
    preprocess: Callable[[Array], Array],
    substitute: Callable[[Array], Array] | None = None,
) -> LogitsFn:
    """Backward pass differentiable approximation: a preprocessing step with another's gradient.

    Forward, the logits are `logits_fn(preprocess(x))`; backward, the gradient passes through
    `preprocess` as if it were `substitute`. So a step whose gradient is zero or missing
    (quantization, compression, thresholds) hides nothing from an attack.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        preprocess: `inputs [B, ...] -> [B, ...]`, per example; need not be differentiable. A
            pytree that carries its arrays, or a plain function.
        substitute: `preprocess`, approximately, and differentiable; of the same output shape. None
            takes the identity, right wherever `preprocess(x) ≈ x`.

    Returns:
        A pytree `inputs [B, ...] -> logits [B, K]`, for attacks that differentiate backwards
        (all of this library's); new weights compile nothing.

    Raises:
        ValueError: something that cannot be called; when called, a substitute whose output has
            another shape or type than that of `preprocess`.

    Example:
        >>> linear = lambda x: x @ jnp.array([[2.0, -2.0]])
        >>> defended = bpda(linear, jnp.round)
        >>> defended(jnp.array([[0.7]])).tolist()
        [[2.0, -2.0]]
        >>> jax.grad(lambda x: defended(x)[0, 0])(jnp.array([[0.7]])).tolist()  # jnp.round's: 0
        [[2.0]]

    References:
        Athalye, Carlini & Wagner 2018, "Obfuscated Gradients Give a False Sense of Security",
        section 4.1.
    """
    _validate.function(logits_fn=logits_fn, preprocess=preprocess)
    if substitute is not None:
        _validate.function(substitute=substitute)
    preprocess = callable_logits_fn(preprocess)
    substitute = Partial(_identity) if substitute is None else callable_logits_fn(substitute)
    return Partial(_straight_through_logits, callable_logits_fn(logits_fn), preprocess, substitute)


def _identity(inputs: Array) -> Array:
    return inputs


def _straight_through_logits(
    logits_fn: Any, preprocess: Any, substitute: Any, inputs: Array
) -> Array:
    shapes = [jax.eval_shape(fun, inputs) for fun in (preprocess, substitute)]
    wanted, got = [(shape.shape, str(shape.dtype)) for shape in shapes]
    if wanted != got:
        raise ValueError(
            f"expected substitute to return what preprocess does, {wanted}, got {got}; pass a "
            "substitute of the same output shape and type (None is the identity)"
        )
    return logits_fn(_preprocessed(preprocess, substitute, inputs))


@jax.custom_vjp
def _preprocessed(preprocess: Any, substitute: Any, inputs: Array) -> Array:
    del substitute
    return preprocess(inputs)


def _preprocessed_forward(
    preprocess: Any, substitute: Any, inputs: Array
) -> tuple[Array, tuple[Any, Array]]:
    return preprocess(inputs), (substitute, inputs)


def _preprocessed_backward(saved: tuple[Any, Array], cotangent: Array) -> tuple[None, None, Array]:
    substitute, inputs = saved
    _, pull = jax.vjp(substitute, inputs)
    return None, None, *pull(cotangent)  # what the two functions carry gets no gradient


_preprocessed.defvjp(_preprocessed_forward, _preprocessed_backward)
