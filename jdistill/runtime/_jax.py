"""JAX's caches and flags, and what a result may depend on."""

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
from collections import Counter
from typing import Any

import jax
from etils import epath
from jax import monitoring
from jax.experimental.compilation_cache import compilation_cache

from jdistill import _files
from jdistill._jax import CPU_FLAG, CPU_FLAG_VALUE
from jdistill.runtime import _flags
from jdistill.runtime._records import check_writable

logger = logging.getLogger("jdistill")

_CACHE_EVENTS = {
    "/jax/compilation_cache/cache_hits": "from_cache",
    "/jax/compilation_cache/cache_misses": "compiled",
}
_programs: Counter[str] = Counter()

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def _setting(name: str) -> Any:
    """One of JAX's settings, whose names JAX's own types do not know."""
    return getattr(jax.config, name)


def enable_compilation_cache(directory: _files.PathLike | None = None) -> epath.Path | None:
    """Keeps compiled programs on disk, so that the next process need not compile them again.

    Small programs are kept too: a run compiles hundreds of them, and reading one back takes a few
    milliseconds where compiling takes tens.

    Args:
        directory: the folder of the cache, a local path or `gs://…`. By default the one that JAX
            is configured with (`JAX_COMPILATION_CACHE_DIR`), else `xla` in `JDISTILL_CACHE` or in
            jdistill's part of the user's cache folder.

    Returns:
        The folder; None, after a warning in the log, where it cannot be written.

    Example:
        >>> import tempfile
        >>> enable_compilation_cache(tempfile.mkdtemp()) is not None
        True
        >>> jax.config.update("jax_compilation_cache_dir", None)  # off again
    """
    configured = _setting("jax_compilation_cache_dir")
    chosen = directory or configured or _files.user_cache() / "xla"
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
    if not _programs:
        _programs.update(dict.fromkeys(_CACHE_EVENTS.values(), 0))
        monitoring.register_event_listener(_count)
    return path


def _count(event: str, **_: Any) -> None:
    if event in _CACHE_EVENTS:
        _programs[_CACHE_EVENTS[event]] += 1


def programs() -> dict[str, int]:
    """Numbers of programs since `enable_compilation_cache`.

    Returns:
        How many were `compiled`, and how many read `from_cache`; empty before that call.

    Example:
        >>> sorted(programs()) in ([], ["compiled", "from_cache"])
        True
    """
    return dict(_programs)


def add_cpu_flags() -> bool:
    """Adds to `XLA_FLAGS` what makes convolutions on CPU faster, where JAX accepts it.

    A lone convolution takes 50 ms in XLA's YNN library where Eigen takes 9 (26×26×32→32, batch
    128; jaxlib 0.10.2), and a gradient is made of lone ones. The flag sends them to Eigen; there it
    more than halves a step of an attack. Call it before the first JAX computation.

    Whether this jaxlib knows the flag is tried once, in a process of its own, which takes about two
    seconds; the answer is kept in `JDISTILL_CACHE`, or in jdistill's part of the user's cache
    folder.

    Returns:
        Whether the flag was added. It is not where it might be unknown, since XLA aborts the
        process on an unknown flag: on a jaxlib that refused it (0.7 does) or could not be asked,
        beside an accelerator's plugin (which parses `XLA_FLAGS` with an XLA of its own), after a
        backend has started, or where `XLA_FLAGS` already sets it.

    Example:
        >>> jax.device_count() > 0  # the first computation: JAX reads its flags
        True
        >>> add_cpu_flags()  # too late
        False
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if CPU_FLAG in flags or not _only_cpu() or _backend_started():
        return False
    flag = f"{CPU_FLAG}={CPU_FLAG_VALUE}"
    if not _flags.accepted(flag):
        return False
    os.environ["XLA_FLAGS"] = f"{flags} {flag}".strip()
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
    """Main process, number 0, or not: that process alone writes and talks. Starts the backend.

    Returns:
        True of one process of a job, and of any process that is alone.

    Example:
        >>> is_main_process()
        True
    """
    return jax.process_index() == 0


def describe() -> dict[str, Any]:
    """Versions and devices that a result may depend on, for `run.json`. Starts the backend.

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
