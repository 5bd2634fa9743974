"""Batches of one compiled shape, in which every example counts exactly once."""

from collections.abc import Iterator, Sequence

import numpy as np

from jdistill import _validate
from jdistill.typing import Batch


def num_batches(num_examples: int, batch_size: int) -> int:
    """Number of batches that hold all examples, the last one padded.

    Args:
        num_examples: N, at least 0.
        batch_size: B, at least 1.

    Returns:
        `ceil(N / B)`.

    Raises:
        ValueError: a count is no whole number in its range.

    Example:
        >>> num_batches(1197, 128)
        10
    """
    _validate.count(minimum=0, num_examples=num_examples)
    _validate.count(batch_size=batch_size)
    return -(-num_examples // batch_size)


def epoch_order(seed_words: Sequence[int], epoch: int, num_examples: int) -> np.ndarray:
    """The order in which one epoch visits the examples.

    A function of its arguments alone, so a resumed run draws the order that the interrupted one
    would have drawn. One NumPy version gives one order; NumPy does not promise it across versions.

    Args:
        seed_words: whole numbers that name the run, e.g. `jax.random.key_data(key).tolist()`.
            Use the same number of words throughout: `[1]` and `[1, 0]` may draw alike.
        epoch: the epoch, from 0.
        num_examples: N.

    Returns:
        `[N]` int64, a permutation of `0..N-1`.

    Raises:
        ValueError: a word or the epoch is negative, or not a whole number.

    Example:
        >>> sorted(epoch_order([3, 7], epoch=0, num_examples=5).tolist())
        [0, 1, 2, 3, 4]
    """
    _validate.sequence(seed_words=seed_words, remedy="pass a list of whole numbers")
    for word in seed_words:
        _validate.count(minimum=0, **{"each of seed_words": word})
    _validate.count(minimum=0, epoch=epoch, num_examples=num_examples)
    words = [int(word) for word in (*seed_words, epoch)]
    return np.random.default_rng(words).permutation(int(num_examples))


def _check_columns(
    inputs: np.ndarray, labels: np.ndarray | None, targets: np.ndarray | None
) -> None:
    if inputs.ndim < 2:
        raise ValueError(
            f"expected inputs of shape [N, ...] with rank >= 2, got shape {inputs.shape}; "
            "add the batch axis: inputs[None]"
        )
    if labels is not None:
        _validate.class_indices(labels, batch_size=len(inputs))
    if targets is not None:
        if targets.ndim != 2 or len(targets) != len(inputs):
            raise ValueError(
                f"expected targets of shape [N, K] with N = {len(inputs)}, got shape "
                f"{targets.shape}; pass one row of class probabilities per example"
            )
        _validate.floats(2, targets=targets)


def _check_order(order: np.ndarray, num_examples: int) -> None:
    if order.ndim != 1 or not np.issubdtype(order.dtype, np.integer):
        raise ValueError(
            f"expected order to be integer indices of shape [M], got dtype {order.dtype} and "
            f"shape {order.shape}; pass epoch_order(...) or np.flatnonzero(selection)"
        )
    bad = (order < 0) | (order >= num_examples)
    if bad.any():
        raise ValueError(
            f"expected order to hold indices in 0..{num_examples - 1}, got {order[bad][0]}; "
            "draw it for as many examples as there are inputs"
        )


def batches(
    inputs: np.ndarray,
    labels: np.ndarray | None = None,
    targets: np.ndarray | None = None,
    *,
    batch_size: int,
    order: np.ndarray | None = None,
    start: int = 0,
) -> Iterator[Batch]:
    """Yields the examples in batches of one size, the last one padded and masked.

    Every batch has exactly `batch_size` rows, so one compiled function serves all of them. The
    rows that fill up the last batch repeat that batch's first row, so they are finite, inside the
    box and validly labeled, and carry `mask == 0`: a sum weighted by the mask counts every
    example exactly once. No examples give no batches.

    Args:
        inputs: `[N, ...]`.
        labels: `[N]` integers, or None.
        targets: `[N, K]` soft labels, or None.
        batch_size: B, at least 1.
        order: `[M]` integer indices into the examples, visited in that order: a permutation from
            `epoch_order` for training, a subset for evaluation. None is the stored order.
        start: how many batches to leave out at the front, to go on inside an epoch.

    Returns:
        An iterator over `num_batches(M, B) - start` batches of NumPy arrays: inputs `[B, ...]` of
        the dtype given, labels `[B]` int32 or None, targets `[B, K]` or None, mask `[B]` float32.

    Raises:
        ValueError: shapes that disagree, labels that are no integers, an index out of range, or a
            count that is no whole number. At the call, not at the first batch.

    Example:
        >>> inputs, labels = np.linspace(0, 1, 5)[:, None], np.arange(5)
        >>> *_, last = batches(inputs, labels, batch_size=3)
        >>> last.labels.tolist(), last.mask.tolist()
        ([3, 4, 3], [1.0, 1.0, 0.0])
    """
    inputs = np.asarray(inputs)
    labels = None if labels is None else np.asarray(labels)
    targets = None if targets is None else np.asarray(targets)
    _check_columns(inputs, labels, targets)
    _validate.count(batch_size=batch_size)
    _validate.count(minimum=0, start=start)
    visited = np.arange(len(inputs)) if order is None else np.asarray(order)
    _check_order(visited, len(inputs))
    labels = None if labels is None else labels.astype(np.int32)
    # The checks must run at the call, and the body of a generator runs at the first `next`.
    return _generate(inputs, labels, targets, visited, batch_size, start)


def _generate(
    inputs: np.ndarray,
    labels: np.ndarray | None,
    targets: np.ndarray | None,
    visited: np.ndarray,
    batch_size: int,
    start: int,
) -> Iterator[Batch]:
    for first in range(start * batch_size, len(visited), batch_size):
        rows = visited[first : first + batch_size]
        missing = batch_size - len(rows)
        mask = np.ones(batch_size, np.float32)
        if missing:
            mask[len(rows) :] = 0
            rows = np.concatenate([rows, np.repeat(rows[:1], missing)])
        yield Batch(
            inputs=inputs[rows],
            labels=None if labels is None else labels[rows],
            targets=None if targets is None else targets[rows],
            mask=mask,
        )
