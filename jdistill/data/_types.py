"""The types that `load` returns, and small pure functions on them."""

import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

SPLITS = ("train", "validation", "test")


class Split(NamedTuple):
    """The examples of one split.

    Attributes:
        inputs: `[N, H, W, C]` float32 in [0, 1].
        labels: `[N]` int32 in `0..K-1`.

    Example:
        >>> split = Split(np.zeros((4, 8, 8, 1), np.float32), np.arange(4, dtype=np.int32))
        >>> inputs, labels = split
        >>> inputs.shape, labels.tolist()
        ((4, 8, 8, 1), [0, 1, 2, 3])
    """

    inputs: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """A data set with its three splits, and what is needed to say which data it was.

    Attributes:
        name: one of `NAMES`.
        train: the examples to learn from; the validation examples are not among them.
        validation: held-out examples for choosing hyperparameters.
        test: examples for the final numbers only.
        num_classes: K.
        version: the version of the prepared set, e.g. "3.0.1".
        fingerprint: short hash of the prepared set's `dataset_info.json` (of the images
            themselves for `digits`). It tells apart two sets of one name and version.
        checksum: short hash of every image and label, split by split. Equal checksums mean the
            same examples in the same order and the same splits.
        note: one sentence on how the splits were made, for a report.

    Example:
        >>> from jdistill import data
        >>> digits = data.load("digits")
        >>> digits.train.inputs.shape, digits.num_classes
        ((1197, 8, 8, 1), 10)
    """

    name: str
    train: Split
    validation: Split
    test: Split
    num_classes: int
    version: str
    fingerprint: str
    checksum: str
    note: str


def split_checksum(split: Split) -> str:
    """A short hash of the arrays' shapes, types, values and order."""
    digest = hashlib.sha256()
    for array in split:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


def joint_checksum(checksums: Mapping[str, str]) -> str:
    """One short hash out of the splits' own."""
    text = " ".join(checksums[name] for name in SPLITS)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_labels(labels: np.ndarray, num_classes: int, where: str) -> None:
    """Every label lies in `0..K-1`; raises ValueError where one does not."""
    bad = (labels < 0) | (labels >= num_classes)
    if bad.any():
        index = int(np.argmax(bad))
        raise ValueError(
            f"expected labels in 0..{num_classes - 1}, got {labels[index]} at index {index} of "
            f"{where}; prepare the data set again"
        )


def scaled(split: Split, maximum: int) -> Split:
    """Stored integers `0..maximum` as float32 in [0, 1]."""
    # Division is exact to the last bit; multiplying by 1/255 puts half of all values one unit off.
    # In one pass, without a float copy of the integers first: CIFAR-10 is 700 MB by then.
    inputs = np.divide(split.inputs, np.float32(maximum), dtype=np.float32)
    return Split(inputs, split.labels)
