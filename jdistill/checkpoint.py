"""Saving and resuming training states: the library's only door to Orbax.

A checkpoint is a numbered folder with two Orbax items:

* `state`: one `uint8` array, `{"bytes": …}`: the bytes of every leaf, in the order of the tree.
  One array, because Orbax reads many at once, and when one of those is damaged it leaves tracebacks
  of the others on stderr; one is also quicker to write and to read than many small ones.
* `metadata`: JSON that holds the caller's own metadata, name, shape and dtype of each leaf, and the
  checksum of the bytes. Storage that changed a byte is found out at restore, and the checkpoint
  before is used instead.

Orbax's v0 interface is used here (`CheckpointManager`, `StandardSave`); moving to v1 touches
nothing but this file.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from jdistill import _validate
from jdistill.typing import PyTree

_logger = logging.getLogger("jdistill")
_FORMAT = 1
_Spec = dict[str, Any]  # name, shape and dtype of one leaf


class Restored(NamedTuple):
    """What `Checkpointer.restore_latest` found.

    Attributes:
        step: the number that the checkpoint was saved under.
        state: the state, bit for bit as it was saved.
        metadata: the JSON-able mapping that was saved beside it, `{}` where there was none.
    """

    step: int
    state: PyTree
    metadata: dict[str, Any]


class _DamagedError(Exception):
    """A checkpoint that cannot be used; its message says why."""


class _OrbaxFilter(logging.Filter):
    """Drops Orbax's chatter, and nothing else that goes through absl's logger.

    Orbax logs a dozen INFO lines a save, some of them from threads of its own, so that raising
    the level around a call would miss them: whoever shows INFO would lose the progress bars.
    """

    threshold = logging.WARNING

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is loud enough, or not Orbax's at all."""
        return record.levelno >= self.threshold or "orbax" not in record.pathname


_orbax_filter = _OrbaxFilter()
logging.getLogger("absl").addFilter(_orbax_filter)


@contextlib.contextmanager
def _silent_orbax() -> Iterator[None]:
    """While a checkpoint that may be damaged is tried, Orbax's own complaints stay unseen."""
    _orbax_filter.threshold = logging.CRITICAL + 1
    try:
        yield
    finally:
        _orbax_filter.threshold = logging.WARNING


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back until Orbax is done, a fraction of a second.

    Raised inside Orbax they end in its tracebacks, and threads left in the middle of a write abort
    the process at its exit. The second signal goes through, for storage that hangs.
    """
    # Other threads receive no signals. A handler that is not Python's raises nothing.
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        both = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handlers = {number: handler for number, handler in both.items() if callable(handler)}
    held: list[int] = []

    def hold(number: int, _: Any) -> None:
        if held:
            signal.signal(number, handlers[number])
            signal.raise_signal(number)
        held.append(number)

    for number in handlers:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in held[:1]:
            signal.raise_signal(number)


class Checkpointer:
    """Saves states under growing step numbers in one folder, and restores the latest whole one.

    Nothing is written before the first `save`. `save` returns once the state is copied and writes
    it in the background: it is durable when the next `save`, `wait` or `close` has returned, and
    leaving the `with` block closes. A process that is killed leaves the checkpoints before.

    With several processes every one of them calls every method, on a folder they share.

    Args:
        directory: the folder of this one sequence of checkpoints; a local path or `gs://…`.
        max_to_keep: how many of the latest checkpoints stay. With 1 there is nothing to fall
            back to when it gets damaged.

    Raises:
        ValueError: `max_to_keep` is below 1.

    Example:
        >>> import tempfile, jax
        >>> state = {"step": jax.numpy.int32(3), "key": jax.random.key(0)}
        >>> folder = tempfile.mkdtemp()
        >>> with Checkpointer(folder) as checkpointer:
        ...     checkpointer.save(3, state, {"stage": "teacher"})
        >>> with Checkpointer(folder) as checkpointer:
        ...     step, state, metadata = checkpointer.restore_latest(state)
        >>> step, int(state["step"]), metadata
        (3, 3, {'stage': 'teacher'})
    """

    def __init__(self, directory: str | os.PathLike[str], *, max_to_keep: int = 2) -> None:
        _validate.count(max_to_keep=max_to_keep)
        self.directory = _absolute(directory)
        self._max_to_keep = max_to_keep
        self._manager: ocp.CheckpointManager | None = None
        self._damaged: list[int] = []

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except OSError as failure:
            if error is None:
                raise
            # The error on its way out (Ctrl-C, say) matters more than the last save.
            _logger.warning("%s", failure)

    def steps(self) -> list[int]:
        """The step numbers that have a folder, in ascending order; some may turn out damaged."""
        if not self.directory.exists():
            return []
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())

    def save(self, step: int, state: PyTree, metadata: Mapping[str, Any] | None = None) -> None:
        """Saves a state; older checkpoints go once the new one is whole.

        Args:
            step: a whole number above that of every checkpoint there is.
            state: a pytree of arrays, typed PRNG keys and Python numbers.
            metadata: whatever JSON can hold.

        Raises:
            ValueError: the step is not above the latest one, a leaf is neither an array nor a
                number, or the metadata is not JSON-able. Nothing is written.
            OSError: the folder cannot be written (PermissionError where that is why), or an
                earlier save failed in the background.
        """
        _validate.count(minimum=0, step=step)
        step = int(step)
        packed, specs = _pack(state)
        sealed = _seal(
            {"metadata": _jsonable(metadata), "leaves": specs, "bytes": _digest(packed.data)}
        )
        self.wait()
        self._set_damaged_aside()
        manager = self._open()
        latest = manager.latest_step()
        if latest is not None and step <= latest:
            raise ValueError(
                f"expected step > {latest}, the latest in {self.directory}, got {step}; "
                "go on from restore_latest(), or choose another folder"
            )
        args = ocp.args.Composite(
            state=ocp.args.StandardSave({"bytes": packed}), metadata=ocp.args.JsonSave(sealed)
        )
        with self._explained():
            # `force`, because the step is checked above: no policy of Orbax may skip it in silence.
            manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Waits until everything saved so far is durable.

        Raises:
            OSError: the save in the background failed.
        """
        if self._manager is not None:
            with self._explained():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for the last save and frees the threads; saving again reopens.

        Raises:
            OSError: the save in the background failed.
        """
        manager, self._manager = self._manager, None
        if manager is not None:
            with self._explained():
                try:
                    manager.wait_until_finished()
                finally:
                    manager.close()

    def restore_latest(self, like: PyTree) -> Restored | None:
        """Restores the latest whole checkpoint.

        A damaged checkpoint is skipped with a warning in the log "jdistill", and set aside
        (renamed to `damaged-<step>`) by the next `save`.

        Args:
            like: a pytree of the structure, shapes and dtypes saved: a fresh state, or its
                `jax.ShapeDtypeStruct`s. A leaf's sharding, where it has one, is given to the
                restored leaf.

        Returns:
            Step, state and metadata; None where there is no checkpoint, or none that is whole.

        Raises:
            ValueError: the latest whole checkpoint is of another state; says what differs.
            OSError: the folder cannot be read.
        """
        wanted = [_spec(name, leaf) for name, leaf in _named_leaves(like)]
        self.wait()
        skipped: list[int] = []
        found = None
        for step in reversed(self.steps()):
            try:
                with _silent_orbax():
                    found = self._restore(step, like, wanted)
                break
            except _DamagedError as error:
                skipped.append(step)
                _warn("skipped the damaged checkpoint %s (%s)", self.directory / str(step), error)
        self._damaged = skipped
        if skipped and found is not None:
            _warn("going on from the whole checkpoint of step %d", found.step)
        elif skipped:
            _warn("no whole checkpoint in %s: starting afresh", self.directory)
        return found

    def _restore(self, step: int, like: PyTree, wanted: list[_Spec]) -> Restored:
        """One checkpoint, or `_DamagedError`."""
        folder = self.directory / str(step)
        with _damage():
            content = _unseal(_read(folder, "metadata", ocp.args.JsonRestore()))
        _check_same(folder, content["leaves"], wanted)
        with _damage():
            packed = np.asarray(_read(folder, "state", ocp.args.StandardRestore())["bytes"])
            if _digest(packed.data) != content["bytes"]:
                raise _DamagedError("the checksum of the state differs")
        return Restored(step, _unpack(packed, like), content["metadata"])

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            with self._explained():
                self.directory.mkdir(parents=True, exist_ok=True)
                self._manager = ocp.CheckpointManager(
                    self.directory,
                    options=ocp.CheckpointManagerOptions(
                        preservation_policy=checkpoint_managers.LatestN(self._max_to_keep),
                        cleanup_tmp_directories=True,
                        save_root_metadata=False,
                        # Reads no old step, and so cannot complain of a damaged one.
                        lightweight_initialize=True,
                    ),
                )
        return self._manager

    def _set_damaged_aside(self) -> None:
        """Makes room for the steps to come, and loses nothing that somebody could still repair."""
        if not self._damaged:
            return
        self.close()
        if jax.process_index() == 0:
            with self._explained():
                for step in self._damaged:
                    aside = self.directory / f"damaged-{step}"
                    if aside.exists():
                        aside.rmtree()
                    (self.directory / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("jdistill: damaged checkpoints set aside")
        self._damaged = []

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Failures of the storage, with the folder and the remedy."""
        try:
            with _undisturbed():
                yield
        # TensorStore reports a full disk or a missing right as a ValueError or a RuntimeError.
        # What a caller can get wrong is checked before, so that anything here is the storage's.
        except Exception as error:
            reason = " ".join(str(error).split())
            kind = PermissionError if isinstance(error, PermissionError) else OSError
            raise kind(
                f"expected a writable workdir, got {self.directory} ({reason}); "
                "make room or change its permissions, or choose another `--workdir`"
            ) from error


def _warn(message: str, *values: Any) -> None:
    """A warning by one process: all of them read the same folder."""
    if jax.process_index() == 0:
        _logger.warning(message, *values)


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """Turns whatever a damaged file makes the readers raise into `_DamagedError`."""
    try:
        yield
    # Not damage: these must not cost anybody a checkpoint that is whole.
    except (_DamagedError, _OtherFormatError, PermissionError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise _DamagedError(f"{type(error).__name__}: {reason:.200}") from error


class _OtherFormatError(ValueError):
    """A checkpoint in a layout that this version does not know."""


def _absolute(directory: str | os.PathLike[str]) -> epath.Path:
    """The folder as Orbax wants it: absolute, unless it lies in a bucket."""
    text = os.fspath(directory)
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def _read(folder: epath.Path, item: str, args: Any) -> Any:
    """One item of a checkpoint; not through the manager, which must not create the folder."""
    with _undisturbed(), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        return reader.restore(folder, args=ocp.args.Composite(**{item: args}))[item]


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves under their path, in the order of the tree."""
    leaves = [
        (f"state{jax.tree_util.keystr(path)}", leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    if not leaves:
        raise ValueError(f"expected a state with leaves, got {tree!r}; pass the arrays to save")
    for name, leaf in leaves:
        arrays = (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic)
        number = _is_number(leaf) and np.asarray(leaf).dtype != object
        if not number and (not isinstance(leaf, arrays) or leaf.dtype == np.dtype(object)):
            raise ValueError(
                f"expected arrays and numbers as leaves of the state, got {leaf!r} at {name}; "
                "convert it to a numeric array, or save it in the metadata"
            )
    return leaves


def _is_number(leaf: Any) -> bool:
    """A Python number, and no NumPy scalar (np.float64 is a float)."""
    return isinstance(leaf, (bool, int, float)) and not isinstance(leaf, np.generic)


def _spec(name: str, leaf: Any) -> _Spec:
    """Of a leaf what is compared between a checkpoint and the state it is restored to."""
    if _is_number(leaf):
        return {"name": name, "shape": [], "dtype": type(leaf).__name__}
    return {"name": name, "shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _to_host(leaf: Any) -> np.ndarray:
    """The values of a leaf, all of them.

    As NumPy, because Orbax refuses the host-local arrays that `pmap` leaves on many hosts.
    """
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if leaf.is_fully_replicated:
            leaf = leaf.addressable_data(0)
        else:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _pack(state: PyTree) -> tuple[np.ndarray, list[_Spec]]:
    """The bytes of all leaves, and their specs.

    The bytes are a copy: they are written in the background, while the caller's next step donates
    the buffers of the state.
    """
    leaves = _named_leaves(state)
    parts = [np.ravel(_to_host(leaf)).view(np.uint8) for _, leaf in leaves]
    return np.concatenate(parts), [_spec(name, leaf) for name, leaf in leaves]


def _unpack(packed: np.ndarray, like: PyTree) -> PyTree:
    """The state in the form of `like`, whose specs are those of the packed one."""
    leaves, structure = jax.tree.flatten(like)
    values, start = [], 0
    for leaf in leaves:
        stored = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        shape, dtype = np.shape(stored), np.dtype(getattr(stored, "dtype", type(stored)))
        stop = start + math.prod(shape) * dtype.itemsize
        # The copy is aligned as the type wants it, and the leaf's own.
        value = packed[start:stop].copy().view(dtype).reshape(shape)
        values.append(_as_like(value, leaf))
        start = stop
    return jax.tree.unflatten(structure, values)


def _as_like(value: np.ndarray, like: Any) -> Any:
    """A leaf of the kind of `like`, on the devices of `like`."""
    if _is_number(like):
        return value.item()
    if isinstance(like, np.generic):
        return value[()]
    if isinstance(like, np.ndarray):
        return value
    array = _to_device(value, like)
    return jax.random.wrap_key_data(array, impl=_key_impl(like)) if _is_key(like) else array


def _key_impl(like: Any) -> Any:
    """The PRNG of a key; `jax.random.key_impl` alone refuses a `jax.ShapeDtypeStruct`."""
    impl: list[Any] = []
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), like)
    return impl[0]


def _digest(data: memoryview | bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _jsonable(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """The metadata as JSON will give it back (tuples become lists)."""
    try:
        return json.loads(json.dumps(dict(metadata or {})))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected JSON-able metadata, got {metadata!r} ({error}); "
            "convert arrays with .tolist() and paths with str()"
        ) from None


def _content_digest(content: Mapping[str, Any]) -> str:
    return _digest(json.dumps(content, sort_keys=True).encode())


def _seal(content: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata item: its checksum guards the one of the bytes."""
    content = {"format": _FORMAT, **content}
    return {**content, "checksum": _content_digest(content)}


def _unseal(item: dict[str, Any]) -> dict[str, Any]:
    """The content of the metadata item, which is as it was written."""
    content = dict(item)
    if content.pop("checksum") != _content_digest(content):
        raise _DamagedError("the checksum of the metadata differs")
    if content["format"] != _FORMAT:
        raise _OtherFormatError(
            f"expected a checkpoint of format {_FORMAT}, got format {content['format']}; "
            "use the version of jdistill that wrote it, or choose another `--workdir`"
        )
    return content


def _check_same(folder: epath.Path, saved: list[_Spec], wanted: list[_Spec]) -> None:
    """The checkpoint is of a state like the one asked for, leaf by leaf and in order."""
    if saved == wanted:
        return

    def described(specs: list[_Spec]) -> dict[str, str]:
        return {spec["name"]: f"{spec['dtype']}{spec['shape']}" for spec in specs}

    there, here = described(saved), described(wanted)
    differing = [
        f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
        for name in {**here, **there}
        if there.get(name) != here.get(name)
    ] or ["the leaves are in another order"]
    more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
    raise ValueError(
        f"expected a checkpoint of this state, got another one in {folder}: "
        f"{'; '.join(differing[:4])}{more}; "
        "use the settings that it was saved with, or choose another `--workdir`"
    )


def _to_device(value: np.ndarray, like: Any) -> jax.Array:
    """The value laid out as `like` is.

    An array that was on no device in particular must stay so: committed to one, it could not meet
    arrays that lie on a mesh.
    """
    if like.sharding is None or not getattr(like, "committed", True):
        return jnp.asarray(value)
    if like.sharding.is_fully_addressable:
        return jax.device_put(value, like.sharding)
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])
