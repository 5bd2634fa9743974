"""The embedded data set: scikit-learn's 8×8 digits."""

import logging

import numpy as np

from jdistill.data._types import SPLITS, Split, joint_checksum, split_checksum

MAXIMUM = 16
NUM_CLASSES = 10
NOTE = (
    "digits: 1,197 / 200 / 400 of scikit-learn's 1,797 images (8x8 pixels, 17 gray levels), by one "
    "fixed permutation; the same writers appear in every split"
)
_SIZES = {"train": 1197, "validation": 200, "test": 400}
_CHECKSUM = "c571366e379fb1f1"

_log = logging.getLogger("jdistill")


def read_digits() -> tuple[dict[str, Split], dict[str, str], str]:
    """The splits in stored integers 0..16, their checksums, and scikit-learn's version.

    Returns:
        Splits of 1,197, 200 and 400 examples, `[N, 8, 8, 1]` uint8; checksum of each; version.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        import sklearn
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            f"expected scikit-learn for the embedded digits, got {error}; "
            "do: pip install 'jdistill[study]' (or pip install scikit-learn)"
        ) from error
    bunch = load_digits()
    images = bunch.images.astype(np.uint8)[..., None]
    labels = bunch.target.astype(np.int32)
    # RandomState is the one NumPy generator whose stream is frozen for good (NEP 19), so the
    # split is the same on every version of NumPy.
    order = np.random.RandomState(0).permutation(len(labels))
    splits, first = {}, 0
    for name in SPLITS:
        rows = order[first : first + _SIZES[name]]
        splits[name] = Split(images[rows], labels[rows])
        first += _SIZES[name]
    checksums = {name: split_checksum(splits[name]) for name in SPLITS}
    if joint_checksum(checksums) != _CHECKSUM:
        _log.warning(
            "the digits of scikit-learn %s differ from those that jdistill's published numbers "
            "were measured on (checksum %s, not %s)",
            sklearn.__version__,
            joint_checksum(checksums),
            _CHECKSUM,
        )
    return splits, checksums, sklearn.__version__
