"""Paths, local or in a bucket, and files that are whole at any moment."""

import contextlib
import io
import os
import uuid
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

PathLike = str | os.PathLike[str]


def as_path(location: PathLike) -> epath.Path:
    """A path that works for `gs://` and its like as well; `~` is the user's folder.

    Example:
        >>> as_path("gs://bucket") / "runs"
        PosixGPath('gs://bucket/runs')
    """
    if not isinstance(location, (str, os.PathLike)):
        raise ValueError(
            f"expected a path or directory, got {location!r}; pass a str or a pathlib.Path"
        )
    return epath.Path(location).expanduser()


def read_whole(path: PathLike) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: there is none.
    """
    source = as_path(path)
    try:
        return source.read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"expected a file at the path {source}, got none; write it first"
        ) from None


def is_remote(location: PathLike) -> bool:
    """Whether the path lies in a bucket: its writes are atomic, it cannot append or rename.

    Example:
        >>> is_remote("gs://bucket/runs"), is_remote("runs")
        (True, False)
    """
    return "://" in os.fspath(location)


def user_cache() -> epath.Path:
    """Where jdistill keeps what it can make again: `JDISTILL_CACHE`, or in the user's cache."""
    if chosen := os.environ.get("JDISTILL_CACHE"):
        return as_path(chosen)
    return as_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "jdistill"


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[BinaryIO]:
    """A stream to write to; the file is replaced when the block ends, and stays if it raises.

    Args:
        path: the file; its folder must exist.

    Raises:
        OSError: the file cannot be written; the old one stays.

    Example:
        >>> import tempfile
        >>> path = as_path(tempfile.mkdtemp()) / "note"
        >>> with replacing(path) as stream:
        ...     _ = stream.write(b"whole")
        >>> path.read_bytes()
        b'whole'
    """
    target = as_path(path)
    if is_remote(target):
        whole = io.BytesIO()
        yield whole
        target.write_bytes(whole.getvalue())
        return
    # Beside the target, because a rename is atomic within one file system only; and each writer
    # its own, because the hosts of a job may write the same file at once: the last one stays.
    temporary = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except BaseException:  # Ctrl-C too must leave nothing half-written behind
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_whole(path: PathLike, data: bytes) -> epath.Path:
    """Writes a file as `replacing` does, and makes its folder if need be."""
    target = as_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as stream:
        stream.write(data)
    return target
