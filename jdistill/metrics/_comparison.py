"""Intervals over seeds, and paired tests of two networks."""

from typing import Any, NamedTuple

import numpy as np

from jdistill import _validate
from jdistill.metrics._shares import Interval, check_confidence
from jdistill.typing import ArrayLike


class Comparison(NamedTuple):
    """A difference, first minus second, with its test.

    Attributes:
        difference: with its interval.
        p_value: two-sided, of no difference.
        num_pairs: examples, or seeds.
        first_higher: pairs in which the first is higher.
        second_higher: pairs in which the second is higher.
        test: what was computed, in words.
    """

    difference: Interval
    p_value: float
    num_pairs: int
    first_higher: int
    second_higher: int
    test: str


def paired(first: ArrayLike, second: ArrayLike, *, confidence: float = 0.95) -> Comparison:
    """The difference of two shares over the same examples: the student with assistant against none.

    Only the `b` examples that are true under the first alone and the `c` under the second alone
    tell the two apart. The difference is `(b - c) / N`; McNemar's exact test is that of `b` heads
    in `b + c` throws of a fair coin; the interval is Bonett and Price's, which adds one to each of
    `b` and `c` and two to `N`.

    Args:
        first: `[N]` bool, such as `CleanMeasures.correct` of one network, or `~success` of an
            attack on it.
        second: `[N]` bool, the same of the other network on the same examples.
        confidence: of the interval, inside (0, 1).

    Returns:
        The difference in `[-1, 1]`. It speaks of these two networks, over examples: other seeds
        give other networks (`paired_over_seeds`).

    Raises:
        ValueError: no examples, or not the same number of them.

    Example:
        >>> result = paired([True] * 9 + [False], [True] * 4 + [False] * 6)
        >>> result.difference.value, result.first_higher, result.second_higher
        (0.5, 5, 0)
        >>> result.p_value  # 2 / 2**5
        0.0625

    References:
        McNemar 1947; Bonett & Price 2012, "Adjusted Wald Confidence Interval for a Difference of
        Binomial Proportions Based on Paired Data". Fagerland, Lydersen & Laake 2014, "Recommended
        tests and confidence intervals for paired binomial proportions", recommend this interval;
        of the exact test they prefer the mid-p form, where the plain one is conservative: it errs
        on the side of no difference, which is the side wanted here.
    """
    from scipy import stats

    check_confidence(confidence)
    first = _validate.booleans(first, name="first")
    one, other = _pairs(first, _validate.booleans(second, name="second"), bool)
    total = one.size
    only_first, only_second = int((one & ~other).sum()), int((other & ~one).sum())
    discordant = only_first + only_second
    p_value = 1.0 if discordant == 0 else stats.binomtest(only_first, discordant, 0.5).pvalue
    up, down = (only_first + 1) / (total + 2), (only_second + 1) / (total + 2)
    half = stats.norm.ppf((1 + confidence) / 2) * np.sqrt(
        (up + down - (up - down) ** 2) / (total + 2)
    )
    ends = np.clip([up - down - half, up - down + half], -1.0, 1.0)
    return Comparison(
        difference=Interval((only_first - only_second) / total, float(ends[0]), float(ends[1])),
        p_value=float(p_value),
        num_pairs=total,
        first_higher=only_first,
        second_higher=only_second,
        test="exact McNemar test and Bonett-Price interval over examples",
    )


def seed_interval(values: ArrayLike, *, confidence: float = 0.95) -> Interval:
    """The mean over seeds with its t interval.

    Args:
        values: `[S]`, one number a seed, at least two seeds.
        confidence: inside (0, 1).

    Returns:
        The mean and the interval's ends. They are not cut at 0 and 1: with two or three seeds an
        interval beyond them says that the seeds are too few.

    Raises:
        ValueError: fewer than two seeds, which have no spread, or a value that is not finite.

    Example:
        >>> interval = seed_interval([0.97, 0.98, 0.99])
        >>> round(interval.value, 3), round(interval.low, 3), round(interval.high, 3)
        (0.98, 0.955, 1.005)

    References:
        Student 1908, "The probable error of a mean".
    """
    check_confidence(confidence)
    return _t_interval(_seeds(_validate.column(values=values), "values"), confidence)


def paired_over_seeds(
    first: ArrayLike, second: ArrayLike, *, confidence: float = 0.95
) -> Comparison:
    """The mean difference over seeds, each seed its own pair: a paired t test.

    Args:
        first: `[S]`, one number a seed, such as the robust accuracy with an assistant.
        second: `[S]`, the same without, of the same seeds in the same order.
        confidence: of the interval, inside (0, 1).

    Returns:
        The comparison. Differences that are all alike have no spread to judge by: all 0 gives
        p = 1; otherwise the p-value and the interval's ends are NaN.

    Raises:
        ValueError: fewer than two seeds, not the same number of them, a value that is not finite.

    Example:
        >>> result = paired_over_seeds([0.3, 0.5, 0.4], [0.2, 0.3, 0.3])
        >>> round(result.difference.value, 3), round(result.p_value, 3)
        (0.133, 0.057)

    References:
        Student 1908, "The probable error of a mean", section IX.
    """
    from scipy import stats

    check_confidence(confidence)
    one, other = _pairs(_validate.column(first=first), _validate.column(second=second), float)
    difference = _seeds(one, "first") - _seeds(other, "second")
    interval = _t_interval(difference, confidence)
    # Equal differences may differ by rounding; a spread of that size would call all significant.
    rounding = 8 * np.finfo(np.float64).eps * max(np.abs(one).max(), np.abs(other).max())
    if np.ptp(difference) > rounding:
        p_value = float(stats.ttest_1samp(difference, 0.0).pvalue)
    elif np.abs(difference).max() <= rounding:
        interval, p_value = Interval(0.0, 0.0, 0.0), 1.0
    else:
        interval, p_value = Interval(interval.value, np.nan, np.nan), np.nan
    return Comparison(
        difference=interval,
        p_value=p_value,
        num_pairs=difference.size,
        first_higher=int((difference > rounding).sum()),
        second_higher=int((difference < -rounding).sum()),
        test="paired t test over seeds",
    )


def _t_interval(values: np.ndarray, confidence: float) -> Interval:
    from scipy import stats

    mean, error = values.mean(), stats.sem(values)
    half = stats.t.ppf((1 + confidence) / 2, values.size - 1) * error
    return Interval(float(mean), float(mean - half), float(mean + half))


def _pairs(first: ArrayLike, second: ArrayLike, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    one, other = np.asarray(first, dtype), np.asarray(second, dtype)
    if one.ndim != 1 or one.shape != other.shape or not one.size:
        raise ValueError(
            f"expected two columns [N], first and second, over the same examples or seeds, got "
            f"shapes {one.shape} and {other.shape}; pass one value each, in the same order"
        )
    return one, other


def _seeds(values: np.ndarray, name: str) -> np.ndarray:
    """The values, checked: an interval over seeds needs two."""
    if values.ndim != 1 or values.size < 2:
        raise ValueError(
            f"expected {name} of one number a seed for at least 2 seeds, got shape {values.shape}; "
            "an interval over seeds needs their spread: train more seeds, or give the interval "
            "over examples, which says nothing about other seeds"
        )
    if not np.isfinite(values).all():
        raise ValueError(
            f"expected finite {name}, got {values.tolist()}; a mean over seeds exists only where "
            "each of them has a value"
        )
    return values
