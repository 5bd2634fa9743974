"""A run's files: JSON that is whole at any moment, logs that survive a kill, hashes."""

import contextlib
import json
import os
import uuid
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from jdistill import _files, _validate
from jdistill._files import PathLike


def check_writable(
    directory: PathLike,
    *,
    remedy: str = "choose another `--workdir`, or change its permissions",
) -> epath.Path:
    """Makes the folder, if need be, and tries to write in it.

    Args:
        directory: a local path or `gs://…`.
        remedy: what the error tells the user to do.

    Returns:
        The folder as a path that works for buckets too.

    Raises:
        OSError: the folder cannot be written (PermissionError, NotADirectoryError, … where that is
            why); whatever was made on the way is gone again.

    Example:
        >>> import tempfile
        >>> check_writable(tempfile.mkdtemp() + "/new/folder").is_dir()
        True
    """
    _validate.text(**{"the remedy": remedy})
    path = _files.as_path(directory)
    probe = path / f".writable-{uuid.uuid4().hex}"  # every host of a job may try at once
    made: list[epath.Path] = []
    try:
        made += [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        for leftover in (probe.unlink, *(folder.rmdir for folder in made)):
            with contextlib.suppress(OSError):
                leftover()
        reason = error.strerror or str(error)
        raise type(error)(
            f"expected a writable folder, got {os.fspath(directory)} ({reason}); {remedy}"
        ) from error
    return path


def atomic_write(path: PathLike, content: bytes) -> None:
    """Writes a file that is, at any moment, the old one or the new one, whole.

    Args:
        path: the file, local or `gs://…`; its folder must exist.
        content: what it will hold.

    Raises:
        ValueError: the content is no bytes.
        OSError: the file cannot be written; the old one stays.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "weights.bin"
        >>> atomic_write(path, bytes([1, 2, 3]))
        >>> len(path.read_bytes())
        3
    """
    _validate.instance((bytes, bytearray), "bytes", content=content)
    with _files.replacing(path) as stream:
        stream.write(content)


def atomic_write_text(path: PathLike, text: str) -> None:
    """Writes a text file that is, at any moment, the old one or the new one, whole.

    Args:
        path: the file, local or `gs://…`; its folder must exist.
        text: what it will hold, in UTF-8.

    Raises:
        ValueError: `text` is no text.
        OSError: the file cannot be written; the old one stays.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "note.txt"
        >>> atomic_write_text(path, "hello")
        >>> path.read_text()
        'hello'
    """
    _validate.text(text=text)
    atomic_write(path, text.encode())


def write_json(path: PathLike, content: Any) -> None:
    """Writes a JSON file, indented, as `atomic_write_text` does.

    Args:
        path: the file, local or `gs://…`.
        content: what JSON can hold; NumPy and JAX numbers and arrays become numbers and lists,
            paths become strings.

    Raises:
        ValueError: the content is not JSON-able; nothing is written.
        OSError: the file cannot be written; the old one stays.

    Example:
        >>> import pathlib, tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "run.json"
        >>> write_json(path, {"accuracy": np.float32(0.5), "order": np.arange(3)})
        >>> json.loads(path.read_text())
        {'accuracy': 0.5, 'order': [0, 1, 2]}
    """
    atomic_write_text(path, _dumps(content, indent=2) + "\n")


def append_jsonl(path: PathLike, record: Mapping[str, Any]) -> None:
    """Appends one record to a JSON-lines file, which it makes if need be.

    A last line that a killed process left half-written is dropped first: glued to it, the new
    record would be lost as well. One process writes a file.

    Args:
        path: the file, local or `gs://…`; its folder must exist.
        record: what JSON can hold, see `write_json`.

    Raises:
        ValueError: the record is not JSON-able; nothing is written.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/metrics.jsonl"
        >>> append_jsonl(path, {"epoch": 1, "loss": np.float32(0.5)})
        >>> read_jsonl(path)
        [{'epoch': 1, 'loss': 0.5}]
    """
    _validate.mapping(record=record)
    line = _dumps(record) + "\n"
    target = _files.as_path(path)
    if _files.is_remote(path):  # a bucket cannot append
        old = target.read_text() if target.exists() else ""
        target.write_text(old[: old.rfind("\n") + 1] + line)
        return
    with open(target, "ab+") as file:
        _drop_half_line(file)
        # In one call, so that a kill leaves as little chance as may be of half a line.
        file.write(line.encode())


def _drop_half_line(file: Any) -> None:
    """Truncates the file, opened as `ab+`, behind its last newline."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def read_jsonl(path: PathLike) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, such as a workdir's `metrics.jsonl`.

    A last line without its newline was half-written when its process was killed: it is left out.

    Args:
        path: the file, local or `gs://…`.

    Returns:
        The records in their order; none if there is no file.

    Raises:
        ValueError: another line is not JSON.

    Example:
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/metrics.jsonl"
        >>> for epoch in (1, 2):
        ...     append_jsonl(path, {"epoch": epoch})
        >>> [record["epoch"] for record in read_jsonl(path)]
        [1, 2]
    """
    source = _files.as_path(path)
    if not source.exists():
        return []
    # A kill can cut a character in two; a file that others wrote may hold anything.
    *lines, _ = source.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError:
            raise ValueError(
                f"expected JSON on every line, got {line[:60]!r} in line {number} of "
                f"{os.fspath(path)}; remove that line"
            ) from None
    return records


def _dumps(content: Any, **options: Any) -> str:
    try:
        return json.dumps(content, default=_plain, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected JSON-able content, got {content!r:.200} ({error}); "
            "use numbers, strings, lists and mappings with string keys"
        ) from None


def _plain(value: Any) -> Any:
    """A value that JSON does not know, as one that it does."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} is not JSON-able")
