"""The two sensitivities, the share of zero gradients, and Papernot's histogram."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdistill import _validate
from jdistill._jax import full_precision, jit, logits_shape
from jdistill.nets import callable_logits_fn
from jdistill.typing import AnyArray, Array, ArrayLike, LogitsFn

#: log10 of the edges of Papernot et al. 2016: 0, 1e-40, …, 1e-5, 1e-3, 1; and, so that
#: every example has a bin, what lies above.
SENSITIVITY_EDGES = (-math.inf, -40, -35, -30, -25, -20, -15, -10, -5, -3, 0, math.inf)


def sensitivity_logits(logits_fn: LogitsFn, inputs: AnyArray) -> Array:
    """Mean over the entries of the input of ``|∂ (sum over k of z_k) / ∂x|``, per example.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        inputs: `[B, ...]` float.

    Returns:
        `[B]` float, in logit units per unit of input; average it over examples.

    Raises:
        ValueError: inputs that are not finite, a network that does not return `[B, K]`.

    Example:
        >>> weights = jnp.array([[1.0, 1.0], [0.0, -4.0]])
        >>> sensitivity_logits(lambda x: x @ weights, jnp.zeros((1, 2))).tolist()
        [3.0]

    References:
        Mandal & Gao 2023, released code `save_model_grads.py`.
    """
    network, inputs = _checked(logits_fn, inputs)
    with full_precision():
        return _sensitivity_logits(network, inputs)


def _checked(logits_fn: LogitsFn, inputs: AnyArray) -> tuple[LogitsFn, Array]:
    """The arguments in the form that jit takes."""
    _validate.inputs_in_box(inputs, (-math.inf, math.inf))
    return callable_logits_fn(logits_fn), jnp.asarray(inputs)


def _logits(logits_fn: LogitsFn, inputs: Array) -> Array:
    """The checked logits `[B, K]`."""
    logits = logits_fn(inputs)
    _validate.logits(logits, inputs.shape[0])
    return logits


@jit
def _sensitivity_logits(logits_fn: LogitsFn, inputs: AnyArray) -> Array:
    gradient = jax.grad(lambda x: jnp.sum(_logits(logits_fn, x)))(inputs)
    return jnp.mean(jnp.abs(gradient), axis=tuple(range(1, gradient.ndim)))


def log10_sensitivity_softmax(
    logits_fn: LogitsFn, inputs: AnyArray, *, temperature: ArrayLike = 1.0
) -> Array:
    """log10 of the mean over classes and inputs of ``|∂ softmax(z / T)_k / ∂x_d|``, per example.

    Computed wholly in log space::

        ∂p_k/∂x = p_k Σ_{j≠k} p_j (∂z_k/∂x - ∂z_j/∂x) / T,

    so that 1e-40, which float32 arithmetic on the probabilities rounds to 0, is a number.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        inputs: `[B, ...]` float.
        temperature: the test temperature, above 0; 1 in every paper.

    Returns:
        `[B]` float; `-inf` where the Jacobian is exactly zero. Combine examples with
        `log10_mean`, never with a plain mean.

    Raises:
        ValueError: a temperature that is not above 0.

    Example:
        >>> weights = jnp.array([[1000.0, 0.0]])
        >>> value = log10_sensitivity_softmax(lambda x: x @ weights, jnp.ones((1, 1)))
        >>> round(float(value[0]), 2)  # 1000 exp(-1000)
        -431.29

    References:
        Papernot et al. 2016, section V.C (the amplitude of adversarial gradients).
    """
    network, inputs = _checked(logits_fn, inputs)
    _validate.scalar(temperature=temperature)
    _validate.positive(temperature=temperature)
    with full_precision():
        return _log10_sensitivity_softmax(network, inputs, temperature)


@jit
def _log10_sensitivity_softmax(
    logits_fn: LogitsFn, inputs: AnyArray, temperature: ArrayLike
) -> Array:
    rows = (inputs.shape[0], math.prod(inputs.shape[1:]))
    logits, pullback = jax.vjp(lambda x: _logits(logits_fn, x), inputs)
    temperature = jnp.asarray(temperature, logits.dtype)
    num_classes = logits.shape[-1]
    # One pullback a class: [K, B, D]. Each row depends on its own input, so a batched cotangent
    # of ones gives every example's gradient at once.
    one_class = jax.nn.one_hot(jnp.arange(num_classes), num_classes, dtype=logits.dtype)
    gradients = jax.lax.map(
        lambda row: pullback(jnp.broadcast_to(row, logits.shape))[0].reshape(rows),
        one_class,
    )
    log_probs = jax.nn.log_softmax(logits / temperature, axis=-1).T  # [K, B]

    def one_output(k: Array) -> Array:
        """Log of the sum over the input's entries of |∂p_k/∂x_d|, `[B]`."""
        difference = gradients[k][None] - gradients  # [K, B, D]; row k is exactly 0 and drops out
        magnitude = jnp.log(jnp.abs(difference)) + log_probs[:, :, None]
        total, _ = jax.nn.logsumexp(magnitude, b=jnp.sign(difference), axis=0, return_sign=True)
        return jax.nn.logsumexp(total, axis=-1) + log_probs[k]

    log_sums = jax.lax.map(one_output, jnp.arange(num_classes))  # [K, B]
    num_entries = num_classes * gradients.shape[-1]
    log_temperature = jnp.log(temperature)
    log_mean = jax.nn.logsumexp(log_sums, axis=0) - np.log(num_entries) - log_temperature
    return log_mean / np.log(10.0)


def log10_mean(log10_values: ArrayLike) -> float:
    """log10 of the mean of numbers given by their log10.

    Args:
        log10_values: `[N]` float; `-inf` stands for 0.

    Returns:
        A float; `-inf` where all are 0.

    Raises:
        ValueError: no values, or not one column of numbers.

    Example:
        >>> log10_mean([-40.0, -40.0])
        -40.0
    """
    values = _validate.column(log10_values=log10_values)
    if not values.size:
        raise ValueError("expected at least one of log10_values, got none; pass one per example")
    top = values.max()
    if np.isneginf(top):
        return float("-inf")
    return float(top + np.log10(np.mean(10.0 ** (values - top))))


def zero_gradient(
    logits_fn: LogitsFn, inputs: AnyArray, labels: ArrayLike, *, temperature: ArrayLike = 1.0
) -> Array:
    """Zeros among the input gradients of the cross-entropy: where one is exactly 0, per example.

    Where it is, FGSM and PGD on the cross-entropy have nothing to follow, and their failure says
    nothing about the network.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        inputs: `[B, ...]` float.
        labels: `[B]` int.
        temperature: of the loss, above 0.

    Returns:
        `[B]` bool.

    Raises:
        ValueError: a temperature that is not above 0, labels that are not `[B]` integers
            in `0..K-1`, inputs that are not finite.

    Example:
        >>> steep = lambda x: x @ jnp.array([[1000.0, 0.0]])
        >>> zero_gradient(steep, jnp.ones((1, 1)), jnp.array([0])).tolist()
        [True]

    References:
        Carlini & Wagner 2016, "Defensive Distillation is Not Robust"; Athalye et al. 2018.
    """
    network, inputs = _checked(logits_fn, inputs)
    _validate.scalar(temperature=temperature)
    _validate.positive(temperature=temperature)
    _validate.class_indices(labels, batch_size=inputs.shape[0])
    if not _validate.is_traced(labels):
        num_classes = logits_shape(network, inputs).shape[-1]
        _validate.class_indices(labels, batch_size=inputs.shape[0], num_classes=num_classes)
    with full_precision():
        return _zero_gradient(network, inputs, jnp.asarray(labels), temperature)


@jit
def _zero_gradient(
    logits_fn: LogitsFn, inputs: AnyArray, labels: AnyArray, temperature: ArrayLike
) -> Array:
    def loss(x: Array) -> Array:
        logits = _logits(logits_fn, x)
        logits = logits / jnp.asarray(temperature, logits.dtype)
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    gradient = jax.grad(loss)(inputs)
    return jnp.all(gradient == 0, axis=tuple(range(1, gradient.ndim)))


class Histogram(NamedTuple):
    """Numbers of examples in bins; the counts and `num_nonfinite` add up to all of them.

    Attributes:
        edges: `[J + 1]`, rising; bin `j` is `edges[j] <= value < edges[j + 1]`.
        counts: `[J]` int64.
        num_nonfinite: examples without a value (NaN or `+inf`), which are in no bin.
    """

    edges: np.ndarray
    counts: np.ndarray
    num_nonfinite: int


def sensitivity_histogram(
    log10_values: ArrayLike, *, edges: Sequence[float] = SENSITIVITY_EDGES
) -> Histogram:
    """In which of Papernot's bins the examples' sensitivities lie.

    Args:
        log10_values: `[N]`, log10 of each example's sensitivity, such as
            `log10_sensitivity_softmax` returns; `-inf` (a Jacobian of zeros) is in the first bin.
        edges: `[J + 1]`, rising, in log10; the first may be `-inf` and the last `inf`. The default
            is the paper's edges 0, 1e-40, 1e-35, …, 1e-5, 1e-3, 1, and one bin above.

    Returns:
        The counts.

    Raises:
        ValueError: edges that do not rise, or values outside of them.

    Example:
        >>> sensitivity_histogram([-np.inf, -41.0, -40.0, -0.5]).counts.tolist()
        [2, 1, 0, 0, 0, 0, 0, 0, 0, 1, 0]

    References:
        Papernot et al. 2016, section V.C (the amplitude of adversarial gradients by temperature).
    """
    values, steps = _validate.column(log10_values=log10_values), _validate.column(edges=edges)
    if steps.size < 2 or not (steps[1:] > steps[:-1]).all():
        raise ValueError(f"expected rising edges [J + 1], got {edges}; sort them, each one once")
    known = values[~np.isnan(values) & ~np.isposinf(values)]
    if known.size and (known.min() < steps[0] or known.max() >= steps[-1]):
        raise ValueError(
            f"expected log10_values in [{steps[0]:g}, {steps[-1]:g}), got {known.min():g} to "
            f"{known.max():g}; end the edges with -inf and inf, so that none is left out"
        )
    place = np.searchsorted(steps, known, side="right") - 1
    counts = np.bincount(place, minlength=steps.size - 1)
    return Histogram(steps, counts, values.size - known.size)
