"""What a program around the library needs: caches, flags, files that survive a crash, exit codes.

Importing this module initialises no JAX backend, so that `add_cpu_flags` can still take effect.
"""

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import signal
import sys
import threading
import traceback
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental.compilation_cache import compilation_cache

PathLike = str | os.PathLike[str]

logger = logging.getLogger("jdistill")
"""The library's logger. The library adds no handler and sets no level: the program does."""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
_CPU_FLAG_VALUE = "-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
_CPU_FLAG_VERSIONS = ("0.10.",)  # jaxlib 0.7.2 aborts on the flag; extend it for a version tried
_STOPPED = "stopped; run the same command again to go on"


# --- JAX ---


def _setting(name: str) -> Any:
    """One of JAX's settings, whose names JAX's own types do not know."""
    return getattr(jax.config, name)


def enable_compilation_cache(directory: PathLike | None = None) -> epath.Path | None:
    """Keeps compiled programs on disk, so that the next process need not compile them again.

    Small programs are kept too: a run compiles hundreds of them, and reading one back takes a few
    milliseconds where compiling takes tens.

    Args:
        directory: the folder of the cache, a local path or `gs://…`. By default the one that JAX
            is configured with (`JAX_COMPILATION_CACHE_DIR`), else `xla` in `JDISTILL_CACHE`, else
            `~/.cache/jdistill/xla`.

    Returns:
        The folder; None, after a warning in the log, where it cannot be written.

    Example:
        >>> import tempfile
        >>> enable_compilation_cache(tempfile.mkdtemp()) is not None
        True
        >>> jax.config.update("jax_compilation_cache_dir", None)  # off again
    """
    home = os.environ.get("JDISTILL_CACHE") or "~/.cache/jdistill"
    chosen = directory or _setting("jax_compilation_cache_dir") or os.path.join(home, "xla")
    try:
        path = check_writable(chosen, remedy="going on without the compilation cache")
    except OSError as error:
        logger.warning("%s", error)
        return None
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # JAX opens its cache once, at the first compilation, which may lie behind us.
    compilation_cache.reset_cache()
    return path


def add_cpu_flags() -> bool:
    """Adds to `XLA_FLAGS` what makes convolutions on CPU faster, where JAX accepts it.

    A lone convolution takes 50 ms in XLA's YNN library where Eigen takes 9 (26×26×32→32, batch
    128), and a gradient is made of lone ones. The flag sends them to Eigen; it more than halves
    a step of an attack. Call it before the first JAX computation.

    Returns:
        Whether the flag was added. It is not where it might be unknown, since XLA aborts the
        process on an unknown flag: on another jaxlib than 0.10, beside an accelerator's
        plugin (which parses `XLA_FLAGS` with an XLA of its own), after a backend has started, or
        where `XLA_FLAGS` already sets it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    known = importlib.metadata.version("jaxlib").startswith(_CPU_FLAG_VERSIONS)
    if not known or _CPU_FLAG in flags or not _only_cpu() or _backend_started():
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {_CPU_FLAG}={_CPU_FLAG_VALUE}".strip()
    return True


def _only_cpu() -> bool:
    """Whether JAX can start no other backend than its own CPU."""
    if platforms := _setting("jax_platforms"):
        return platforms == "cpu"
    plugins = importlib.metadata.entry_points(group="jax_plugins")
    found = (importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins"))
    return not plugins and not any(found)


def _backend_started() -> bool:
    """Whether JAX has read its flags already; JAX has no public way to ask."""
    try:
        from jax._src import xla_bridge

        return xla_bridge.backends_are_initialized()
    except (ImportError, AttributeError):
        return True  # not to be known: then a flag would be set in vain, or half


def is_main_process() -> bool:
    """Whether this process is the one that writes and talks (number 0). Starts the backend.

    Example:
        >>> is_main_process()
        True
    """
    return jax.process_index() == 0


def describe() -> dict[str, Any]:
    """What a result may depend on, JSON-able, for `run.json`. Starts the backend.

    Returns:
        `versions`; `platform`; `devices`, a list of `platform`, `kind` and `count`;
        `process_count`; `matmul_precision` (None: JAX's default); `x64`; `xla_flags`. Nothing that
        names the machine or its user.

    Example:
        >>> sorted(describe()["devices"][0])
        ['count', 'kind', 'platform']
    """
    from jdistill import __version__

    versions = {"jdistill": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    kinds = Counter((device.platform, device.device_kind) for device in jax.devices())
    return {
        "versions": versions,
        "platform": f"{platform.system()} {platform.machine()}",
        "devices": [
            {"platform": name, "kind": kind, "count": count}
            for (name, kind), count in sorted(kinds.items())
        ],
        "process_count": jax.process_count(),
        "matmul_precision": _setting("jax_default_matmul_precision"),
        "x64": _setting("jax_enable_x64"),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


# --- Files ---


def _path(path: PathLike) -> epath.Path:
    return epath.Path(path).expanduser()


def _is_remote(path: PathLike) -> bool:
    """Whether the path lies in a bucket: its writes are atomic, and it knows no folders."""
    return "://" in os.fspath(path)


def check_writable(
    directory: PathLike, *, remedy: str = "choose another `--workdir`, or change its permissions"
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
    path = _path(directory)
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


def atomic_write_text(path: PathLike, text: str) -> None:
    """Writes a text file that is, at any moment, the old one or the new one, whole.

    Raises:
        OSError: the file cannot be written; the old one stays.

    Example:
        >>> import tempfile
        >>> path = _path(tempfile.mkdtemp()) / "note.txt"
        >>> atomic_write_text(path, "hello")
        >>> path.read_text()
        'hello'
    """
    target = _path(path)
    if _is_remote(path):
        target.write_text(text)
        return
    # Beside the target, because a rename is atomic within one file system only.
    temporary = target.parent / f".{target.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_json(path: PathLike, content: Any) -> None:
    """Writes a JSON file, indented, as `atomic_write_text` does.

    Args:
        path: the file, local or `gs://…`.
        content: what JSON can hold; NumPy and JAX numbers and arrays become numbers and lists,
            paths become strings.

    Raises:
        ValueError: the content is not JSON-able; nothing is written.
        OSError: the file cannot be written; the old one stays.
    """
    atomic_write_text(path, _dumps(content, indent=2) + "\n")


def append_jsonl(path: PathLike, record: Mapping[str, Any]) -> None:
    """Appends one record to a JSON-lines file, which it makes if need be.

    A last line that a killed process left half-written is dropped first: glued to it, the new
    record would be lost as well. One process writes a file.

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
    line = _dumps(record) + "\n"
    target = _path(path)
    if _is_remote(path):  # a bucket cannot append
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
    """The records of a JSON-lines file; none if there is no file.

    A last line without its newline was half-written when its process was killed: it is left out.

    Raises:
        ValueError: another line is not JSON.
    """
    source = _path(path)
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
    """What JSON does not know, as what it does."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} is not JSON-able")


def fingerprint(content: Any) -> str:
    """A short hash of JSON-able content, the same in every process and on every machine.

    The order of keys, and whether a sequence is a list or a tuple, make no difference; 1 and 1.0
    differ, so convert numbers to the type that the setting has.

    Returns:
        16 hexadecimal digits.

    Raises:
        ValueError: the content is not JSON-able.

    Example:
        >>> fingerprint({"temperature": 20.0, "seed": 0})
        'b78c3befef22277f'
    """
    text = _dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


# --- Programs ---


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, as an exception: whatever cleans up after Ctrl-C cleans up after this as well."""


def run_main(main: Callable[..., int | None], *args: Any, **kwargs: Any) -> None:
    """Runs a program's main function and ends the process as a command should end.

    | `main` | exit code | on stderr |
    |---|---|---|
    | returns None or 0 | 0: `run_main` returns | |
    | returns another number | that number | |
    | is stopped by Ctrl-C / by SIGTERM | 130 / 143 | how to go on |
    | raises ValueError, OSError, FloatingPointError or ImportError | 2 | `error: …`, one line |
    | raises anything else | 1 | the traceback: a bug |

    With `JDISTILL_DEBUG=1` in the environment, the third and fourth show their traceback first.

    Raises:
        SystemExit: with the exit code, unless that is 0.

    Example:
        >>> def main():
        ...     print("trained")
        >>> run_main(main)
        trained
    """
    try:
        with _sigterm_raises():
            code = main(*args, **kwargs)
    except KeyboardInterrupt as error:
        _show(_STOPPED)
        code = 143 if isinstance(error, _TerminatedError) else 130
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        _show(f"error: {' '.join(str(error).split()) or type(error).__name__}")
        code = 2
    if code:
        sys.exit(code)


def _show(line: str) -> None:
    """The line on stderr, behind what is on stdout and, on request, the traceback."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if os.environ.get("JDISTILL_DEBUG") == "1":
        traceback.print_exc()
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM raises `_TerminatedError` inside, and does what it did before outside."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone, and lets no other set handlers
        return

    def stop(*_: Any) -> None:
        raise _TerminatedError

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
