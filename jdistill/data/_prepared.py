"""Data sets prepared by TensorFlow Datasets (TFDS), read without TensorFlow.

TFDS is imported only where a prepared set is really read, and its download machinery is never
started by accident: without a network it retries for minutes before it fails.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jdistill import _files
from jdistill.data._types import Split, check_labels
from jdistill.typing import Callback

_JPEG = b"\xff\xd8"
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_RANDOM_ACCESS = ("array_record", "parquet")
_CHUNK = 1000
_VALIDATION = 5000


class Spec(NamedTuple):
    """Facts of a TFDS set that are known beforehand.

    Attributes:
        shape: of one image, `(H, W, C)`.
        num_classes: K.
        url: a small file of the download, to see whether it can be reached.
        note: how the splits were made.
    """

    shape: tuple[int, int, int]
    num_classes: int
    url: str
    note: str


_NOTE_SHUFFLED = (
    "{}: validation is the first 5,000 training examples in stored order; TFDS shuffled them when "
    "it prepared the set, so they are not the papers' first 5,000"
)
SPECS = {
    "mnist": Spec(
        (28, 28, 1),
        10,
        "https://storage.googleapis.com/cvdf-datasets/mnist/t10k-labels-idx1-ubyte.gz",
        _NOTE_SHUFFLED.format("mnist"),
    ),
    "fashion_mnist": Spec(
        (28, 28, 1),
        10,
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/t10k-labels-idx1-ubyte.gz",
        _NOTE_SHUFFLED.format("fashion_mnist"),
    ),
    "cifar10": Spec(
        (32, 32, 3),
        10,
        "https://www.cs.toronto.edu/~kriz/cifar.html",
        "cifar10: all examples sorted by their TFDS id, validation is the first 5,000 training "
        "examples in that order",
    ),
}


class Prepared(NamedTuple):
    """A prepared set on disk: the folder of one version, and the hash of its dataset_info.json."""

    name: str
    folder: Any
    version: str
    fingerprint: str


def tfds_root(data_dir: _files.PathLike | None) -> Any:
    """Where prepared sets lie: the argument, `TFDS_DATA_DIR`, or TFDS's default."""
    return _files.as_path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def find(root: Any, name: str) -> Prepared | None:
    """The prepared set under `root/name`, its highest version; None where there is none.

    Imports no TFDS: this runs on every load.
    """
    try:
        versions = [path.name for path in (root / name).iterdir() if _VERSION.fullmatch(path.name)]
    except OSError:
        return None
    for version in sorted(versions, key=lambda v: [int(n) for n in v.split(".")], reverse=True):
        folder = root / name / version
        try:
            content = (folder / "dataset_info.json").read_bytes()
        except OSError:  # a preparation that broke off
            continue
        return Prepared(name, folder, version, hashlib.sha256(content).hexdigest()[:12])
    return None


def how_to_prepare(name: str) -> str:
    """Remedy on a machine that lacks the set, for error messages."""
    return (
        f"prepare it once on a machine with TensorFlow and a network "
        f"(pip install tensorflow tensorflow-datasets; tfds build {name} "
        "--file_format=array_record) and pass its folder as data_dir or TFDS_DATA_DIR; "
        f"or copy the {name}-*.npz file from another machine's jdistill cache into this one's"
    )


def _reachable(url: str, seconds: float) -> bool:
    """Whether the address answers within the time, through the proxy where one is set."""
    answered = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):
            request = urllib.request.Request(url, method="HEAD")
            with urllib.request.urlopen(request, timeout=seconds):
                answered.set()

    # In a thread, since no timeout covers a name server that does not answer.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def can_prepare(name: str, *, seconds: float = 3.0) -> bool:
    """Whether TFDS could download and prepare the set here: TensorFlow and a network."""
    if importlib.util.find_spec("tensorflow") is None:
        return False
    return _reachable(SPECS[name].url, seconds)


def prepare(root: Any, name: str) -> None:
    """Downloads and prepares the set under `root`, in a format that needs no TensorFlow to read."""
    import tensorflow_datasets as tfds

    builder = tfds.builder(name, data_dir=os.fspath(root), file_format="array_record")
    builder.download_and_prepare()


def _check_readable(prepared: Prepared) -> None:
    """The file format has random access, and the packages that read it are installed."""
    try:
        info = json.loads((prepared.folder / "dataset_info.json").read_text())
        # The field is left out where it has TFDS's first default.
        formats = [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", [])]
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"expected JSON in {prepared.folder / 'dataset_info.json'}, got {error}; "
            f"{how_to_prepare(prepared.name)}"
        ) from error
    if not set(formats) & set(_RANDOM_ACCESS):
        raise ValueError(
            f"expected {prepared.name} prepared as array_record (or parquet) in {prepared.folder}, "
            f"got {', '.join(formats)}, which cannot be read without TensorFlow; where TensorFlow "
            f"is installed, do: tfds build {prepared.name} --file_format=array_record "
            "--data_dir=ANOTHER_FOLDER, and pass that folder as data_dir or TFDS_DATA_DIR"
        )
    reader = "array_record" if "array_record" in formats else "pyarrow"
    for modules, package in (
        (("tensorflow_datasets",), "tensorflow-datasets"),
        ((reader,), reader),
        (("PIL", "cv2"), "pillow"),
    ):
        if not any(importlib.util.find_spec(module) for module in modules):
            raise ImportError(
                f"expected {package} to be installed for reading {prepared.folder}, got no module "
                f"{' or '.join(modules)}; do: pip install {package}"
            )


@contextlib.contextmanager
def _explained(prepared: Prepared) -> Iterator[None]:
    """Turns whatever TFDS raises over a broken folder into one error that says what to do."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"expected every package that tensorflow-datasets needs, got {error}; "
            f"do: pip install {error.name or 'tensorflow-datasets'}"
        ) from error
    except Exception as error:
        raise OSError(
            f"expected a readable prepared {prepared.name} in {prepared.folder}, got "
            f"{type(error).__name__}: {str(error).strip()[:300]}; {how_to_prepare(prepared.name)}"
        ) from error


def canonical(split: Split, ids: list[bytes]) -> Split:
    """The examples in the order of their ids (`train_00017`), which TFDS's shuffle keeps.

    Raises:
        ValueError: two examples share an id.
    """
    named = np.array(ids)
    order = np.argsort(named, kind="stable")
    if len(np.unique(named)) != len(named):
        raise ValueError(
            f"expected {len(named)} different ids, got {len(np.unique(named))}; "
            "prepare the data set again"
        )
    return Split(split.inputs[order], split.labels[order])


def carve(train: Split, size: int) -> tuple[Split, Split]:
    """Splits off the first `size` examples: (the rest, those).

    Raises:
        ValueError: nothing would be left to train on.
    """
    if len(train.labels) <= size:
        raise ValueError(
            f"expected more than {size} training examples, since {size} become the validation "
            f"split, got {len(train.labels)}; prepare the whole data set"
        )
    head = Split(train.inputs[:size], train.labels[:size])
    return Split(train.inputs[size:], train.labels[size:]), head


def image_format(prepared: Prepared) -> str:
    """The format in which the set has its images: "PNG", as TFDS prepares these, or "JPEG".

    JPEG is lossy: the values are not the original set's.
    """
    with _explained(prepared):
        import tensorflow_datasets as tfds

        builder = tfds.builder_from_directory(os.fspath(prepared.folder))
        undecoded = {"image": tfds.decode.SkipDecoding()}
        [first] = builder.as_data_source("test", decoders=undecoded).__getitems__([0])
    return "JPEG" if first["image"].startswith(_JPEG) else "PNG"


def read(prepared: Prepared, progress: Callback | None = None) -> dict[str, Split]:
    """Reads and splits a prepared set.

    Args:
        prepared: what `find` found.
        progress: called after every thousand examples with `event`, `stage`, `done`, `total`.

    Returns:
        Train, validation and test: inputs `[N, H, W, C]` uint8, labels `[N]` int32.

    Raises:
        ValueError: the file format needs TensorFlow, or the content is not what it should be.
        ImportError: a package that reads it is missing.
        OSError: the files cannot be read.
    """
    _check_readable(prepared)
    spec = SPECS[prepared.name]
    with _explained(prepared):
        import tensorflow_datasets as tfds

        # From the very folder that the fingerprint was taken of. `tfds.data_source(name)` would
        # look for the version its own code knows, and download where that differs.
        builder = tfds.builder_from_directory(os.fspath(prepared.folder))
        sources = {name: builder.as_data_source(name) for name in ("train", "test")}
    total, done, splits = sum(len(source) for source in sources.values()), 0, {}
    for name, source in sources.items():
        inputs = np.empty((len(source), *spec.shape), np.uint8)
        labels = np.empty(len(source), np.int32)
        ids: list[bytes] = []
        for first in range(0, len(source), _CHUNK):
            last = min(first + _CHUNK, len(source))
            with _explained(prepared):
                rows = source.__getitems__(range(first, last))
                # `stack` and not an assignment to a slice, which would broadcast a wrong shape.
                images = np.stack([row["image"] for row in rows])
                if images.shape[1:] != spec.shape:
                    raise ValueError(f"images of shape {images.shape[1:]}, not {spec.shape}")
                inputs[first:last] = images
                labels[first:last] = [row["label"] for row in rows]
                ids += [row["id"] for row in rows if "id" in row]
            done += last - first
            if progress is not None:
                stage = f"read {prepared.name}"
                progress({"event": "read", "stage": stage, "done": done, "total": total})
        check_labels(labels, spec.num_classes, f"{prepared.name}'s {name} split")
        splits[name] = Split(inputs, labels)
        if ids:
            splits[name] = canonical(splits[name], ids)
    train, validation = carve(splits["train"], _VALIDATION)
    return {"train": train, "validation": validation, "test": splits["test"]}
