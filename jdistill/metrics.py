"""Measures of a network and of an attack's result: accuracy, intervals, two sensitivities.

The two sensitivities are different quantities, and both papers call theirs "sensitivity":

* `sensitivity_logits`: mean |∂(sum of the logits)/∂x|, what Mandal & Gao's released code
  computes. It grows with the scale of the logits, so it grows with the training temperature.
* `log10_sensitivity_softmax`: mean |∂ softmax(z)_k/∂x_d|, Papernot et al.'s. It collapses with
  the training temperature, to below 1e-40 and far beyond the range of float32: gradient masking.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdistill import _validate
from jdistill._precision import full_precision
from jdistill._pytree import as_pytree
from jdistill.typing import Array, ArrayLike, LogitsFn


class Interval(NamedTuple):
    """A share with its confidence interval."""

    value: float
    low: float
    high: float


def proportion(successes: int, total: int, *, confidence: float = 0.95) -> Interval:
    """A share of independent examples with its Wilson interval.

    Args:
        successes: how many, `0..total`.
        total: of how many; at least 1.
        confidence: inside (0, 1).

    Returns:
        The share and the interval's ends, in `[0, 1]`.

    Raises:
        ValueError: counts that do not fit each other, or a confidence outside (0, 1).

    Example:
        >>> interval = proportion(990, 1000)
        >>> round(interval.low, 4), round(interval.high, 4)
        (0.9817, 0.9946)

    References:
        Wilson 1927; Brown, Cai & DasGupta 2001, who recommend it over the Wald interval.
    """
    from scipy import stats  # half a second that an import of the library should not pay

    if not 0 <= successes <= total or total < 1:
        raise ValueError(
            f"expected 0 <= successes <= total with total >= 1, got {successes} of {total}; "
            "pass counts, not shares"
        )
    if not 0 < confidence < 1:
        raise ValueError(
            f"expected 0 < confidence < 1, got {confidence!r}; pass 0.95 for a 95 % interval"
        )
    test = stats.binomtest(int(successes), int(total))
    interval = test.proportion_ci(confidence_level=confidence, method="wilson")
    return Interval(successes / total, float(interval.low), float(interval.high))


class Robustness(NamedTuple):
    """How far inputs had to be moved; the first two say little without the third."""

    mean: float
    median: float
    success_rate: Interval


def robustness(distance: ArrayLike, success: ArrayLike, *, confidence: float = 0.95) -> Robustness:
    """The robustness ρ_adv: the mean of the smallest perturbations that an attack found.

    Args:
        distance: `[N]`, of a minimum-norm attack, in its norm; ignored where it failed.
        success: `[N]` bool. An input that is misclassified to begin with is a success at
            distance 0.
        confidence: of the success rate's interval, inside (0, 1).

    Returns:
        Mean and median over the successes (NaN without one), and the success rate: an attack
        that succeeds on the easy half alone makes any network look fragile, and one that fails
        on the near half makes it look robust.

    Raises:
        ValueError: no examples.

    Example:
        >>> result = robustness([1.0, 3.0, np.inf], [True, True, False])
        >>> result.mean, result.median, round(result.success_rate.value, 3)
        (2.0, 2.0, 0.667)

    References:
        Papernot et al. 2016, the definition of robustness, with the smallest perturbation that an
        attack found in place of the true one, which no attack can know.
    """
    hit = np.asarray(success, bool)
    reached = np.asarray(distance, np.float64)[hit]
    share = proportion(int(hit.sum()), hit.size, confidence=confidence)
    if not reached.size:
        return Robustness(float("nan"), float("nan"), share)
    return Robustness(float(reached.mean()), float(np.median(reached)), share)


def correct(logits: Array, labels: ArrayLike) -> Array:
    """Whether each prediction is right: the largest logit is the label's, all logits finite.

    Independent of the temperature, which divides all logits alike.

    Args:
        logits: `[B, K]` float.
        labels: `[B]` int.

    Returns:
        `[B]` bool.

    Example:
        >>> correct(jnp.array([[2.0, 1.0], [jnp.nan, 1.0]]), jnp.array([0, 1])).tolist()
        [True, False]
    """
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return finite & (jnp.argmax(logits, axis=-1) == jnp.asarray(labels))


def accuracy(
    logits: Array, labels: ArrayLike, mask: ArrayLike | None = None, *, confidence: float = 0.95
) -> Interval:
    """The share of right predictions with its interval.

    Args:
        logits: `[N, K]` float.
        labels: `[N]` int.
        mask: `[N]`, 1 for a real example and 0 for padding; None counts every row.
        confidence: inside (0, 1).

    Returns:
        The share and the interval's ends, in `[0, 1]`.

    Raises:
        ValueError: labels outside `0..K-1` or not `[N]`, or no example is left by the mask.

    Example:
        >>> accuracy(jnp.eye(4), jnp.array([0, 1, 2, 0])).value
        0.75
    """
    num_examples, num_classes = np.shape(logits)
    _validate.class_indices(labels, batch_size=num_examples, num_classes=num_classes)
    hits = np.asarray(correct(jnp.asarray(logits), labels))
    real = np.ones(hits.shape, bool) if mask is None else np.asarray(mask) > 0
    return proportion(int((hits & real).sum()), int(real.sum()), confidence=confidence)


def sensitivity_logits(logits_fn: LogitsFn, inputs: Array) -> Array:
    """Mean over the entries of the input of |∂ (sum over k of z_k) / ∂x|, per example.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        inputs: `[B, ...]` float.

    Returns:
        `[B]` float, in logit units per unit of input; average it over examples.

    Example:
        >>> weights = jnp.array([[1.0, 1.0], [0.0, -4.0]])
        >>> sensitivity_logits(lambda x: x @ weights, jnp.zeros((1, 2))).tolist()
        [3.0]

    References:
        Mandal & Gao 2023, released code `save_model_grads.py`.
    """
    with full_precision():
        return _sensitivity_logits(as_pytree(logits_fn), inputs)


@jax.jit
def _sensitivity_logits(logits_fn: LogitsFn, inputs: Array) -> Array:
    gradient = jax.grad(lambda x: jnp.sum(logits_fn(x)))(inputs)
    return jnp.mean(jnp.abs(gradient), axis=tuple(range(1, gradient.ndim)))


def log10_sensitivity_softmax(
    logits_fn: LogitsFn, inputs: Array, *, temperature: ArrayLike = 1.0
) -> Array:
    """log10 of the mean over classes and input entries of |∂ softmax(z / T)_k / ∂x_d|, per example.

    Computed wholly in log space,

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
    _validate.positive(temperature=temperature)
    with full_precision():
        return _log10_sensitivity_softmax(as_pytree(logits_fn), inputs, temperature)


@jax.jit
def _log10_sensitivity_softmax(logits_fn: LogitsFn, inputs: Array, temperature: ArrayLike) -> Array:
    rows = (inputs.shape[0], math.prod(inputs.shape[1:]))
    logits, pullback = jax.vjp(logits_fn, inputs)
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

    Example:
        >>> log10_mean([-40.0, -40.0])
        -40.0
    """
    values = np.asarray(log10_values, np.float64)
    top = values.max()
    if np.isneginf(top):
        return float("-inf")
    return float(top + np.log10(np.mean(10.0 ** (values - top))))


def zero_gradient(
    logits_fn: LogitsFn, inputs: Array, labels: ArrayLike, *, temperature: ArrayLike = 1.0
) -> Array:
    """Whether the input gradient of the cross-entropy is exactly zero, per example.

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
            of at least 0.

    Example:
        >>> steep = lambda x: x @ jnp.array([[1000.0, 0.0]])
        >>> zero_gradient(steep, jnp.ones((1, 1)), jnp.array([0])).tolist()
        [True]

    References:
        Carlini & Wagner 2016, "Defensive Distillation is Not Robust"; Athalye et al. 2018.
    """
    _validate.positive(temperature=temperature)
    _validate.class_indices(labels, batch_size=inputs.shape[0])
    _validate.non_negative(labels=labels)
    with full_precision():
        return _zero_gradient(as_pytree(logits_fn), inputs, jnp.asarray(labels), temperature)


@jax.jit
def _zero_gradient(
    logits_fn: LogitsFn, inputs: Array, labels: Array, temperature: ArrayLike
) -> Array:
    def loss(x: Array) -> Array:
        logits = logits_fn(x)
        logits = logits / jnp.asarray(temperature, logits.dtype)
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    gradient = jax.grad(loss)(inputs)
    return jnp.all(gradient == 0, axis=tuple(range(1, gradient.ndim)))
