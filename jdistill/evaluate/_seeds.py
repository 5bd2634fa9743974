"""Intervals over networks that are seeds of the same thing."""

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

from jdistill import _validate, metrics


def over_seeds(
    values: Iterable[Any], groups: Sequence[Hashable], *, confidence: float = 0.95
) -> dict[Hashable, metrics.Interval]:
    """The mean over seeds, with its t interval, for each group of a stack's networks.

    An interval over examples says how another test set might come out for this network; one over
    seeds, how another network trained alike might. A claim about a method needs the second.

    Args:
        values: `[R]`, one number a network, or one `Interval`, whose value is taken: such as
            `CleanMeasures.accuracy`, `AttackOutcome.mean_distance`, or
            `[worst.robust_accuracy for worst in worst_case(...)]`.
        groups: `[R]`, what each network is a seed of, such as `(temperature, generation)`.
        confidence: inside (0, 1).

    Returns:
        By group, in order of appearance.

    Raises:
        ValueError: a group of one seed, which has no interval (the error names it); a number of
            groups other than that of the values; values that are not finite.

    Example:
        >>> found = over_seeds([0.90, 0.92, 0.70, 0.76], ["T=1", "T=1", "T=20", "T=20"])
        >>> {group: round(interval.value, 3) for group, interval in found.items()}
        {'T=1': 0.91, 'T=20': 0.73}
    """
    if isinstance(values, (str, np.generic)) or not isinstance(values, Iterable):
        raise ValueError(f"expected values, one a network, got {values!r}; pass a list of them")
    _validate.sequence(groups=groups, remedy="pass what each network is a seed of")
    listed = list(values)
    numbers = [entry.value if isinstance(entry, metrics.Interval) else entry for entry in listed]
    if len(numbers) != len(groups) or not numbers:
        raise ValueError(
            f"expected groups, one group for each of the values, got {len(groups)} for "
            f"{len(numbers)}; name what each network is a seed of"
        )
    for group in groups:
        _validate.instance(Hashable, "hashable", groups=group)
    _validate.column(values=numbers)
    members: dict[Hashable, list[float]] = {}
    for number, group in zip(numbers, groups, strict=True):
        members.setdefault(group, []).append(float(np.asarray(number)))
    alone = [group for group, seeds in members.items() if len(seeds) < 2]
    if alone:
        raise ValueError(
            f"expected at least 2 seeds of each group, got one of {alone[0]!r}; train more "
            "seeds, or give the interval over examples, which says nothing about other seeds"
        )
    return {
        group: metrics.seed_interval(np.array(seeds), confidence=confidence)
        for group, seeds in members.items()
    }
