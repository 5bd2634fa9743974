"""The `.npz` cache: one file a data set, checked on every read and written atomically."""

import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jdistill import _files
from jdistill.data._types import SPLITS, Split, split_checksum

# Raise it whenever the meaning of a cache file changes: older files are then rebuilt.
_FORMAT = 2
_FILE_NAME = re.compile(r"(?P<name>.+)-(?P<version>\d+\.\d+\.\d+)-(?P<fingerprint>[0-9a-f]{12})")


class Damaged(Exception):
    """A cache file that is not what it should be; the message says in what way."""


class Key(NamedTuple):
    """Key of a cache file."""

    name: str
    version: str
    fingerprint: str

    @property
    def file_name(self) -> str:
        """The name of the file that holds this set."""
        return f"{self.name}-{self.version}-{self.fingerprint}.npz"


class Entry(NamedTuple):
    """The content of a cache file.

    Attributes:
        key: what it is.
        source: the `data_dir` it was read from, for telling entries apart.
        splits: the three splits, inputs `[N, H, W, C]` uint8 and labels `[N]` int32.
        checksums: one per split.
        image_format: in which the prepared set has its images: "PNG", or "JPEG", which is lossy.
    """

    key: Key
    source: str
    splits: dict[str, Split]
    checksums: dict[str, str]
    image_format: str


def cache_folder(cache_dir: _files.PathLike | None) -> epath.Path:
    """The cache folder: the argument, or the user's."""
    return _files.as_path(cache_dir) if cache_dir else _files.user_cache()


def keys(folder: Any, name: str) -> list[Key]:
    """The cached sets of that name, by version and fingerprint; their content is not looked at."""
    try:
        stems = sorted(path.name.removesuffix(".npz") for path in folder.glob(f"{name}-*.npz"))
    except OSError:
        return []
    matches = (_FILE_NAME.fullmatch(stem) for stem in stems)
    found = (Key(**match.groupdict()) for match in matches if match)
    return [key for key in found if key.name == name]


def _read_metadata(archive: Mapping[str, np.ndarray], key: Key) -> dict[str, Any]:
    metadata = json.loads(str(archive["metadata"]))
    if metadata["format"] != _FORMAT:
        raise Damaged(f"expected cache format {_FORMAT}, got {metadata['format']}")
    held = Key(metadata["name"], metadata["version"], metadata["fingerprint"])
    if held != key:
        raise Damaged(f"it holds {held.file_name}")
    return metadata


def read_source(folder: Any, key: Key) -> str:
    """The `data_dir` that an entry was read from; empty where the file does not say."""
    try:
        with (folder / key.file_name).open("rb") as stream, np.load(stream) as archive:
            return str(_read_metadata(archive, key)["source"])
    except Exception:  # whatever a broken file raises: `read` will say what is wrong with it
        return ""


def read(folder: Any, key: Key) -> Entry | None:
    """Reads an entry and verifies its checksums; None where there is none.

    Raises:
        Damaged: there is a file, but it cannot be read or does not hold what it should.
    """
    try:
        with (folder / key.file_name).open("rb") as stream, np.load(stream) as archive:
            metadata = _read_metadata(archive, key)
            splits = {
                name: Split(archive[f"{name}_inputs"], archive[f"{name}_labels"]) for name in SPLITS
            }
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Damaged:
        raise
    except Exception as error:  # a broken zip or array header can raise nearly anything
        raise Damaged(f"{type(error).__name__}: {error}") from error
    for name in SPLITS:
        found, noted = split_checksum(splits[name]), metadata["checksums"].get(name)
        if found != noted:
            raise Damaged(f"expected checksum {noted} of the {name} split, got {found}")
    return Entry(key, metadata["source"], splits, metadata["checksums"], metadata["image_format"])


def write(folder: Any, entry: Entry) -> None:
    """Writes an entry; a reader sees the whole file or none.

    Raises:
        OSError: the folder cannot be written.
    """
    metadata = {
        "format": _FORMAT,
        **entry.key._asdict(),
        "source": entry.source,
        "checksums": entry.checksums,
        "image_format": entry.image_format,
    }
    arrays = {"metadata": np.array(json.dumps(metadata))}
    for name, split in entry.splits.items():
        arrays[f"{name}_inputs"], arrays[f"{name}_labels"] = split
    folder.mkdir(parents=True, exist_ok=True)
    with _files.replacing(folder / entry.key.file_name) as stream:
        # Uncompressed: CIFAR-10 would shrink by 7% only, and take 15 times as long to write.
        np.savez(stream, **arrays)  # type: ignore[arg-type]
