"""Writing whole files or none, and importing the optional packages of the extra `demo`."""

import importlib
import os
from pathlib import Path
from types import ModuleType

PathLike = str | os.PathLike[str]


def write_whole(path: PathLike, data: bytes) -> Path:
    """Writes a file so that a reader sees the old contents or all of the new ones."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, because a rename is only atomic inside one file system.
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def optional(module: str) -> ModuleType:
    """Imports a package of the extra `demo`, or says how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        # A package that is there but broken inside has its own message to give.
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"expected {package} to be installed, got no such package; "
            "pip install 'jdistill[demo]'",
            name=error.name,
        ) from None
