"""`load`: the cache first, then the prepared set, then a download, then a helpful error."""

import logging
import os
from typing import Any

from jdistill import _files, _validate
from jdistill.data import _cache, _digits, _prepared
from jdistill.data._types import (
    SPLITS,
    Dataset,
    joint_checksum,
    scaled,
    split_checksum,
)
from jdistill.typing import Callback

#: Names of the data sets that `load` knows.
NAMES = ("digits", "mnist", "fashion_mnist", "cifar10")

_NOTE_JPEG = "; the prepared images went through JPEG, so their values are not the original set's"

_log = logging.getLogger("jdistill")


def load(
    name: str,
    *,
    data_dir: _files.PathLike | None = None,
    cache_dir: _files.PathLike | None = None,
    fingerprint: str | None = None,
    progress: Callback | None = None,
) -> Dataset:
    r"""Loads a data set by name.

    `digits` comes out of scikit-learn. The others are looked for in this order:

    1. the cache entry that belongs to the set prepared under `data_dir`;
    2. that prepared set itself, which then goes into the cache. Reading takes 5 to 20 s;
    3. where nothing is prepared under `data_dir`, a cache entry of that name: the one that was
       once read from this `data_dir`, else the only one there is;
    4. where TensorFlow is installed and the network answers, a download by TFDS.

    A damaged cache entry is rebuilt; a cache folder that cannot be written is done without. Both
    are logged to the `jdistill` logger as warnings.

    The validation split of `mnist` and `fashion_mnist` is the first 5,000 training examples in
    stored order. TFDS shuffles when it prepares a set, so these are *not* the first 5,000 that
    the papers hold out. CIFAR-10 carries ids; it is sorted by them first, so there they are the
    first 5,000 of the official order.

    Args:
        name: one of `NAMES`.
        data_dir: the folder of prepared TFDS sets (`data_dir/mnist/3.0.1/…`, array_record); None
            is the environment's `TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
        cache_dir: the folder of jdistill's own `.npz` files; None is the environment's
            `JDISTILL_CACHE`, else `jdistill` in the user's cache folder.
        fingerprint: only a set with this `Dataset.fingerprint` will do. Chooses among several
            cached sets of one name.
        progress: called while a prepared set is read, with
            `{"event": "read", "stage": "read mnist", "done": 1000, "total": 70000}`.

    Returns:
        The data set: inputs float32 in [0, 1], labels int32.

    Raises:
        ValueError: an unknown name; a set prepared in a file format that needs TensorFlow;
            several cached sets and no way to tell which is meant; broken content.
        FileNotFoundError: the set is nowhere and cannot be downloaded here. Raised within
            seconds, with what to do.
        ImportError: a package is missing (scikit-learn for `digits`, Pillow for the others).
        OSError: the prepared files cannot be read.

    Example:
        >>> digits = load("digits")
        >>> [len(split.labels) for split in (digits.train, digits.validation, digits.test)]
        [1197, 200, 400]
        >>> float(digits.test.inputs.min()), float(digits.test.inputs.max())
        (0.0, 1.0)

    References:
        * MNIST: LeCun, Cortes and Burges, http://yann.lecun.com/exdb/mnist
        * Fashion-MNIST: Xiao, Rasul and Vollgraf, arXiv:1708.07747
        * CIFAR-10: Krizhevsky, "Learning multiple layers of features from tiny images", 2009
        * digits: Alpaydin and Kaynak, UCI "Optical Recognition of Handwritten Digits", 1998
    """
    _validate.one_of(NAMES, name=name)
    _validate.callback(progress, name="progress")
    if fingerprint is not None:
        _validate.text(fingerprint=fingerprint)
    for folder in (data_dir, cache_dir):
        if folder is not None:
            _files.as_path(folder)
    if name == "digits":
        return _load_digits(fingerprint)
    root = _prepared.tfds_root(data_dir)
    folder = _cache.cache_folder(cache_dir)
    entry = _find_entry(name, root, folder, fingerprint, progress)
    spec = _prepared.SPECS[name]
    splits = {split: scaled(entry.splits[split], 255) for split in SPLITS}
    return Dataset(
        name=name,
        **splits,
        num_classes=spec.num_classes,
        version=entry.key.version,
        fingerprint=entry.key.fingerprint,
        checksum=joint_checksum(entry.checksums),
        note=spec.note + (_NOTE_JPEG if entry.image_format == "JPEG" else ""),
    )


def _load_digits(fingerprint: str | None) -> Dataset:
    splits, checksums, version = _digits.read_digits()
    checksum = joint_checksum(checksums)
    dataset = Dataset(
        name="digits",
        **{split: scaled(splits[split], _digits.MAXIMUM) for split in SPLITS},
        num_classes=_digits.NUM_CLASSES,
        version=version,
        fingerprint=checksum[:12],
        checksum=checksum,
        note=_digits.NOTE,
    )
    if fingerprint not in (None, dataset.fingerprint):
        raise ValueError(
            f"expected digits with fingerprint {fingerprint!r}, got {dataset.fingerprint!r} from "
            f"scikit-learn {version}; leave fingerprint out, or install the version it came from"
        )
    return dataset


def _find_entry(
    name: str, root: Any, folder: Any, fingerprint: str | None, progress: Callback | None
) -> _cache.Entry:
    """The set as stored integers, by the four steps of `load`."""
    source = _prepared.find(root, name)
    if source is not None and fingerprint in (None, source.fingerprint):
        return _from_source(source, root, folder, progress)
    key = _choose(name, root, folder, fingerprint)
    damage = ""
    if key is not None:
        try:
            entry = _cache.read(folder, key)
        except _cache.Damaged as error:
            damage = f" (the cached {folder / key.file_name} is damaged: {error})"
        else:
            if entry is not None:
                _log_substitute(entry, root, folder)
                return entry
    if source is None and fingerprint is None and _prepared.can_prepare(name):
        _log.warning("no prepared %s under %s%s: TFDS downloads it", name, root, damage)
        _prepared.prepare(root, name)
        source = _prepared.find(root, name)
        if source is not None:
            return _from_source(source, root, folder, progress)
    raise FileNotFoundError(_missing(name, root, folder, fingerprint, source) + damage)


def _from_source(
    source: _prepared.Prepared, root: Any, folder: Any, progress: Callback | None
) -> _cache.Entry:
    """The cache entry of a prepared set, made (again) where there is no good one."""
    key = _cache.Key(source.name, source.version, source.fingerprint)
    try:
        entry = _cache.read(folder, key)
    except _cache.Damaged as error:
        _log.warning(
            "the cached %s is damaged (%s): rebuilt from %s",
            folder / key.file_name,
            error,
            source.folder,
        )
        entry = None
    if entry is not None:
        return entry
    splits = _prepared.read(source, progress)
    checksums = {split: split_checksum(splits[split]) for split in SPLITS}
    image_format = _prepared.image_format(source)
    entry = _cache.Entry(key, _identity(root), splits, checksums, image_format)
    try:
        _cache.write(folder, entry)
    except OSError as error:
        _log.warning(
            "the cache folder %s cannot be written (%s): %s will be read again next time; "
            "set JDISTILL_CACHE to a folder that can",
            folder,
            error,
            source.name,
        )
    return entry


def _identity(root: Any) -> str:
    """A `data_dir` as it is noted in a cache entry: the same text from any working directory."""
    text = os.fspath(root)
    return text if "://" in text else os.path.realpath(text)


def _choose(name: str, root: Any, folder: Any, fingerprint: str | None) -> _cache.Key | None:
    """Which cache entry stands in for a source that is not there; None where there is none.

    Raises:
        ValueError: there are several, and nothing says which.
    """
    found = [k for k in _cache.keys(folder, name) if fingerprint in (None, k.fingerprint)]
    if len(found) > 1:
        sources = {key: _cache.read_source(folder, key) for key in found}
        same = [key for key in found if sources[key] == _identity(root)]
        if len(same) != 1:
            listed = "; ".join(
                f"fingerprint={key.fingerprint!r} (version {key.version}, read from "
                f"{sources[key] or 'an unknown folder'})"
                for key in found
            )
            raise ValueError(
                f"expected one cached {name} in {folder}, since none is prepared under {root}, "
                f"got {len(found)}: {listed}; pass one of these fingerprints, or the data_dir"
            )
        found = same
    return found[0] if found else None


def _log_substitute(entry: _cache.Entry, root: Any, folder: Any) -> None:
    """Says that the cache stands in for a missing source: loudly where it came from elsewhere."""
    level = logging.INFO if entry.source == _identity(root) else logging.WARNING
    _log.log(
        level,
        "no prepared %s under %s: using the cached %s, read from %s",
        entry.key.name,
        root,
        folder / entry.key.file_name,
        entry.source,
    )


def _missing(
    name: str, root: Any, folder: Any, fingerprint: str | None, source: _prepared.Prepared | None
) -> str:
    """The message where a set is nowhere to be had."""
    if fingerprint is None:
        return (
            f"expected {name} prepared by TFDS in {root / name}, or cached in {folder}, got "
            f"neither, and it cannot be downloaded here; {_prepared.how_to_prepare(name)}"
        )
    known = [key.fingerprint for key in _cache.keys(folder, name)]
    if source is not None:
        known.append(source.fingerprint)
    return (
        f"expected {name} with fingerprint {fingerprint!r} prepared in {root / name} or cached in "
        f"{folder}, got {', '.join(map(repr, known)) or 'none'}; pass one of these, or the "
        "data_dir that the fingerprint belongs to"
    )
