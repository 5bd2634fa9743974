"""Shares of examples with their intervals: accuracy, robustness, the worst case over attacks."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jdistill import _validate
from jdistill.typing import AnyArray, ArrayLike


class Interval(NamedTuple):
    """A share, or another mean, with its confidence interval.

    Attributes:
        value: the share itself, in `[0, 1]`.
        low: the lower end of the interval.
        high: the upper end.
    """

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
    _validate.scalar(successes=successes, total=total)
    whole = all(float(number).is_integer() for number in (successes, total))
    if not whole or not 0 <= successes <= total or total < 1:
        raise ValueError(
            f"expected whole 0 <= successes <= total, total >= 1, got {successes} of {total}; "
            "pass counts, not shares"
        )
    check_confidence(confidence)
    return _wilson(int(successes), int(total), float(confidence))


@functools.lru_cache(maxsize=8192)  # curves ask for the same counts again and again
def _wilson(successes: int, total: int, confidence: float) -> Interval:
    from scipy import stats  # half a second that an import of the library should not pay

    test = stats.binomtest(successes, total)
    interval = test.proportion_ci(confidence_level=confidence, method="wilson")
    return Interval(successes / total, float(interval.low), float(interval.high))


def check_confidence(confidence: float) -> None:
    """An error for a confidence outside (0, 1)."""
    _validate.scalar(confidence=confidence)
    if not 0 < confidence < 1:
        raise ValueError(
            f"expected 0 < confidence < 1, got {confidence!r}; pass 0.95 for a 95% interval"
        )


class Robustness(NamedTuple):
    """Distances that inputs had to be moved; they say little without the success rate.

    Attributes:
        mean: of the distances of the successes; NaN without one.
        median: of the distances of the successes; NaN without one.
        success_rate: share of all examples, with its interval.
    """

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
        ValueError: no examples, not one of each per example, or a success at a distance that is
            negative or not finite.

    Example:
        >>> result = robustness([1.0, 3.0, np.inf], [True, True, False])
        >>> result.mean, result.median, round(result.success_rate.value, 3)
        (2.0, 2.0, 0.667)

    References:
        Papernot et al. 2016, the definition of robustness, with the smallest perturbation that an
        attack found in place of the true one, which no attack can know.
    """
    hit, distance = _validate.booleans(success, name="success"), _validate.column(distance=distance)
    if hit.ndim != 1 or distance.shape != hit.shape:
        raise ValueError(
            f"expected distance and success [N] of the same examples, got shapes {distance.shape} "
            f"and {hit.shape}; pass one number and one flag per example"
        )
    reached = distance[hit]
    bad = ~(np.isfinite(reached) & (reached >= 0))
    if bad.any():
        raise ValueError(
            "expected finite distances >= 0 where the attack succeeded, got "
            f"{reached[bad][0]}; pass an attack's result as it is"
        )
    share = proportion(int(hit.sum()), hit.size, confidence=confidence)
    if not reached.size:
        return Robustness(float("nan"), float("nan"), share)
    return Robustness(float(reached.mean()), float(np.median(reached)), share)


def predicts(logits: AnyArray | np.ndarray) -> Any:
    """Validity of each row of logits as a prediction: no NaN, and a finite largest logit.

    A logit of `-inf` masks a class out, as networks over fewer classes do.

    Args:
        logits: `[..., K]` float, NumPy's or JAX's.

    Returns:
        `[...]` bool.

    Raises:
        ValueError: logits that are not float.

    Example:
        >>> predicts(np.array([[2.0, -np.inf], [2.0, np.inf], [np.nan, 1.0]])).tolist()
        [True, False, False]
    """
    _validate.floats(-1, logits=logits)
    largest = logits.max(axis=-1)  # NaN where any logit is
    return (largest > -np.inf) & (largest < np.inf)


def correct(logits: AnyArray | np.ndarray, labels: ArrayLike) -> Any:
    """Correctness of each prediction: the first of the largest logits is the label's.

    The one definition for clean examples: metrics, attacks, evaluation, and verdict share it, so
    robust accuracy is never above accuracy, ties included. Independent of the temperature, which
    divides all logits alike.

    Args:
        logits: `[..., K]` float, NumPy's or JAX's.
        labels: `[...]` int.

    Returns:
        `[...]` bool; False where `predicts` is.

    Raises:
        ValueError: logits that are not float, labels outside `0..K-1` or of another shape.

    Example:
        >>> correct(np.array([[2.0, 1.0], [1.0, 1.0], [np.nan, 1.0]]), np.array([0, 1, 1])).tolist()
        [True, False, False]
    """
    valid = predicts(logits)
    *shape, num_classes = np.shape(logits)
    _validate.class_indices(labels, batch_size=tuple(shape), num_classes=num_classes)
    return valid & (logits.argmax(axis=-1) == labels)


def accuracy(
    logits: AnyArray | np.ndarray,
    labels: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    confidence: float = 0.95,
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
        >>> accuracy(np.eye(4), np.array([0, 1, 2, 0])).value
        0.75
    """
    _validate.floats(2, logits=logits)
    num_examples, num_classes = np.shape(logits)
    _validate.class_indices(labels, batch_size=num_examples, num_classes=num_classes)
    hits = correct(np.asarray(logits), np.asarray(labels))
    real = np.ones(hits.shape, bool) if mask is None else _validate.booleans(mask, name="mask")
    if real.shape != hits.shape or not real.any():
        raise ValueError(
            f"expected mask of shape [N] = {hits.shape} with a real example, got {int(real.sum())} "
            f"of shape {real.shape}; pass 1 for each example that counts"
        )
    return proportion(int((hits & real).sum()), int(real.sum()), confidence=confidence)


class WorstCase(NamedTuple):
    """Robust accuracy of a network under several attacks on the same examples.

    Attributes:
        robust_accuracy: the share of examples that no attack broke.
        success: `[N]` bool, broken by at least one.
        broken_by: `[N]` int32, the place in `names` of the first attack that broke the example,
            -1 where none did.
        names: of the attacks, in their order.
    """

    robust_accuracy: Interval
    success: np.ndarray
    broken_by: np.ndarray
    names: tuple[str, ...]


def worst_case(success: Mapping[str, ArrayLike], *, confidence: float = 0.95) -> WorstCase:
    """The worst case over attacks, per example: broken is what any of them breaks.

    At most the smallest robust accuracy of the attacks, and smaller where they break different
    examples.

    Args:
        success: by the attack's name, `[N]` bool over the same examples.
        confidence: of the interval, inside (0, 1).

    Returns:
        The share of examples that stand, and of each what broke it.

    Raises:
        ValueError: no attack, or attacks on different numbers of examples.

    Example:
        >>> worst = worst_case({"fgsm": [True, False, False], "pgd": [False, True, False]})
        >>> round(worst.robust_accuracy.value, 3), worst.broken_by.tolist()
        (0.333, [0, 1, -1])

    References:
        Croce & Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
        Diverse Parameter-free Attacks", section 5; Carlini et al. 2019, "On Evaluating Adversarial
        Robustness" (per example, not per attack).
    """
    _validate.mapping(success=success)
    rows = [_validate.booleans(row, name=f"success of {name!r}") for name, row in success.items()]
    shapes = {row.shape for row in rows}
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ValueError(
            "expected success [N] of one attack or more on the same examples, got shapes "
            f"{ {name: row.shape for name, row in zip(success, rows, strict=True)} }; attack the "
            "same examples with each"
        )
    hits = np.stack(rows)
    broken: np.ndarray = np.any(hits, axis=0)
    first = np.where(broken, hits.argmax(axis=0), -1).astype(np.int32)
    standing = proportion(int((~broken).sum()), broken.size, confidence=confidence)
    return WorstCase(standing, broken, first, tuple(success))
