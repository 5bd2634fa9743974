"""A folder of arrays that looks like a dict: what a long evaluation goes on from."""

import contextlib
import io
import logging
import urllib.parse
from collections.abc import Iterator, Mapping, MutableMapping

import numpy as np
from etils import epath

from jdistill import _files
from jdistill._files import PathLike

_SUFFIX = ".npz"
_log = logging.getLogger("jdistill")


class ShardFolder(MutableMapping[str, Mapping[str, np.ndarray]]):
    """A mapping from names to arrays by name, each entry a file `.npz` of a folder.

    A file is whole or not there: it is written beside its place and then renamed. One that cannot
    be read all the same is as good as missing, with a warning to the logger `"jdistill"`.

    Args:
        path: the folder, local or `gs://…`; it is made with the first entry. A name with slashes
            is a file in folders of its own.

    Example:
        >>> import tempfile
        >>> shards = ShardFolder(tempfile.mkdtemp())
        >>> shards["pgd/network-0/00000"] = {"success": np.array([True, False])}
        >>> list(shards), shards["pgd/network-0/00000"]["success"].tolist()
        (['pgd/network-0/00000'], [True, False])
    """

    def __init__(self, path: PathLike) -> None:
        self.path = _files.as_path(path)

    def __getitem__(self, name: str) -> Mapping[str, np.ndarray]:
        """The arrays of an entry.

        Raises:
            KeyError: there is no such file, or it cannot be read.
        """
        path = self._path(name)
        try:
            content = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise KeyError(name) from None
        try:
            with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
                return {entry: arrays[entry] for entry in arrays.files}
        # A flipped bit in a header makes the readers raise whatever they like: NotImplementedError,
        # RuntimeError, tokenize.TokenError, even MemoryError.
        except Exception as error:
            _log.warning("%s cannot be read (%s); it counts as missing", path, error)
            raise KeyError(name) from None

    def __setitem__(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes an entry, in one piece.

        Raises:
            OSError: the file cannot be written.
        """
        stream = io.BytesIO()
        np.savez_compressed(stream, **dict(arrays))  # type: ignore[arg-type]
        _files.write_whole(self._path(name), stream.getvalue())

    def __delitem__(self, name: str) -> None:
        """Removes an entry's file.

        Raises:
            KeyError: there is none.
        """
        try:
            self._path(name).unlink()
        except (FileNotFoundError, NotADirectoryError):
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        """The names, sorted, of all files, also of those that cannot be read."""
        return iter(sorted(self._names(self.path, "")))

    def __len__(self) -> int:
        """How many files there are."""
        return len(self._names(self.path, ""))

    def _names(self, folder: epath.Path, prefix: str) -> list[str]:
        names = []
        with contextlib.suppress(FileNotFoundError):
            for path in folder.iterdir():
                if path.name.endswith(_SUFFIX):
                    names.append(prefix + urllib.parse.unquote(path.name[: -len(_SUFFIX)]))
                elif not path.name.startswith(".") and path.is_dir():
                    names += self._names(path, f"{prefix}{urllib.parse.unquote(path.name)}/")
        return names

    def _path(self, name: str) -> epath.Path:
        """The entry's file; what a file system might not take in a name is quoted."""
        parts = [urllib.parse.quote(part, safe=" ") for part in name.split("/")]
        if any(part == "" or part.startswith(".") for part in parts):
            raise ValueError(
                f"expected a name such as 'pgd/network-0/00000', got {name!r}; no part of it may "
                "be empty or begin with a dot"
            )
        return self.path.joinpath(*parts[:-1], parts[-1] + _SUFFIX)
