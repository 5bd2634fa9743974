"""Agreement of two networks, in their predictions and in their representations."""

from typing import Any

import numpy as np

from jdistill import _validate
from jdistill.metrics._shares import predicts
from jdistill.typing import AnyArray


def top1_agreement(logits: AnyArray, other: AnyArray) -> Any:
    """Agreement of two networks on the class of each example, right or wrong.

    The class is the first of the largest logits, as in `correct`, so no temperature changes it. A
    row that is no prediction (`predicts`) agrees with nothing, itself included. The mean is the
    share of examples on which a student does as its teacher: `proportion` gives its interval.

    Args:
        logits: `[B, K]` float, NumPy's or JAX's.
        other: `[B, K]` float, the other network's on the same examples.

    Returns:
        `[B]` bool.

    Raises:
        ValueError: logits of different shapes.

    Example:
        >>> student = np.array([[2.0, 1.0], [0.0, 1.0]])
        >>> top1_agreement(student, np.array([[9.0, 0.0], [5.0, 3.0]])).tolist()
        [True, False]

    References:
        Stanton, Izmailov, Kirichenko, Alemi & Wilson 2021, "Does Knowledge Distillation Really
        Work?", where it is the average top-1 agreement.
    """
    _validate.floats(2, logits=logits, other=other)
    if np.shape(logits) != np.shape(other):
        raise ValueError(
            f"expected other of the shape of logits, {np.shape(logits)}, got {np.shape(other)}; "
            "pass the logits of both networks for the same examples and classes"
        )
    same = logits.argmax(axis=-1) == other.argmax(axis=-1)
    return predicts(logits) & predicts(other) & same


def linear_cka(features: AnyArray, other: AnyArray) -> float:
    """Linear centered kernel alignment of two representations of the same examples.

    Of representations `X` and `Y`::

        ||Yᵀ X||² / (||Xᵀ X|| · ||Yᵀ Y||),     each column of X and Y less its mean

    with Frobenius norms. Neither a rotation or reflection of either's features, nor a factor on all
    of them, nor a shift changes it; other linear maps do. It is of all examples together and has
    no part per example.

    It is biased upwards where the examples are few: with many more features than examples,
    representations that have nothing in common come near 1. Compare values of the same number of
    examples, and take several times as many of them as there are features.

    Args:
        features: `[N, D]` float, finite; images of features flattened.
        other: `[N, E]` float, finite, the other network's for the same examples in the same order.

    Returns:
        A number in `[0, 1]`, computed in float64; 1 for the same features. Features that are the
        same for all examples tell nothing of them and are similar to none: 0, also to themselves.

    Raises:
        ValueError: fewer than two examples, not the same number of them, or features that are not
            finite.

    Example:
        >>> points = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        >>> turned = 3 * points @ np.array([[0.0, 1.0], [-1.0, 0.0]]) + 7
        >>> round(linear_cka(points, turned), 6)
        1.0
        >>> linear_cka(points, np.ones((3, 5)))
        0.0

    References:
        Kornblith, Norouzi, Lee & Hinton 2019, "Similarity of Neural Network Representations
        Revisited", section 3. On the bias: Murphy, Zylberberg & Fyshe 2024, "Correcting Biased
        Centered Kernel Alignment Measures in Biological and Artificial Neural Networks".
    """
    _validate.floats(2, features=features, other=other)
    _validate.finite(features=features, other=other)
    if len(features) != len(other) or len(features) < 2:
        raise ValueError(
            "expected features and other of the same two examples or more, got "
            f"{len(features)} and {len(other)} rows; pass one row of each network per example"
        )
    one, two = _centered(features), _centered(other)
    # The same numbers out of the smaller matrices: features by features, or rows by rows.
    if len(one) < max(one.shape[1], two.shape[1]):
        ours, theirs = one @ one.T, two @ two.T
        both = np.sum(ours * theirs)
    else:
        ours, theirs = one.T @ one, two.T @ two
        both = np.sum(np.square(two.T @ one))
    size = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
    return float(np.clip(both / size, 0.0, 1.0)) if size > 0 else 0.0


def _centered(features: AnyArray) -> np.ndarray:
    """Columns less their means, scaled so that no square overflows or vanishes; float64."""
    rows = np.asarray(features, np.float64)
    # Equal rows are then exactly 0, where their mean may be off by a rounding.
    rows = rows - rows[:1]
    rows = rows / max(float(np.abs(rows).max(initial=0.0)), np.finfo(np.float64).tiny)
    centered: np.ndarray = rows - rows.mean(axis=0, keepdims=True)
    return centered
