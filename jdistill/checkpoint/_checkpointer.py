"""Orbax behind a small interface: numbered checkpoints, the latest whole one."""

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from jdistill import _validate, parallel
from jdistill._files import PathLike, as_path, is_remote
from jdistill.checkpoint import _orbax, _packing
from jdistill.checkpoint._quiet import silent_orbax, undisturbed
from jdistill.typing import PyTree

_logger = logging.getLogger("jdistill")
_FORMAT = 1


class Restored(NamedTuple):
    """A checkpoint that was restored.

    Attributes:
        step: the number that the checkpoint was saved under.
        state: the state, bit for bit as it was saved.
        metadata: the JSON-able mapping that was saved beside it, `{}` where there was none.

    Example:
        >>> restored = Restored(step=3, state={"w": 1.0}, metadata={"epoch": 1})
        >>> restored.metadata["epoch"]
        1
    """

    step: int
    state: PyTree
    metadata: dict[str, Any]


class _DamagedError(Exception):
    """A checkpoint that cannot be used; its message says why."""


class Checkpointer:
    """Saves states under growing step numbers in one folder, and restores the latest or best one.

    Nothing is written before the first `save`. `save` returns once the state is copied and writes
    it in the background: it is durable when the next `save`, `wait` or `close` has returned, and
    leaving the `with` block closes. A process that is killed leaves the checkpoints before.

    With several processes every one of them calls every method, on a folder they share.

    Args:
        directory: the folder of this one sequence of checkpoints; a local path or `gs://…`.
        max_to_keep: how many of the latest checkpoints stay. With 1 there is nothing to fall
            back to when it gets damaged.
        keep_best: how many of those with the highest score stay as well; they may be among the
            latest.

    Raises:
        ValueError: `max_to_keep` is below 1, or `keep_best` below 0.

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

        The best of six by a score, which is neither the last nor the one before:

        >>> with Checkpointer(tempfile.mkdtemp(), max_to_keep=1, keep_best=1) as checkpointer:
        ...     for step, accuracy in enumerate([0.5, 0.8, 0.9, 0.7, 0.9, 0.6], start=1):
        ...         checkpointer.save(step, state, score=accuracy)
        ...     best = checkpointer.restore_best(state)
        >>> best.step, checkpointer.steps()
        (3, [3, 6])
    """

    def __init__(self, directory: PathLike, *, max_to_keep: int = 2, keep_best: int = 0) -> None:
        _validate.count(max_to_keep=max_to_keep)
        _validate.count(minimum=0, keep_best=keep_best)
        self.directory = _absolute(directory)
        self._max_to_keep = max_to_keep
        self._keep_best = keep_best
        self._scores: dict[int, float] = {}
        self._manager: _orbax.Interface | None = None
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

    def save(
        self,
        step: int,
        state: PyTree,
        metadata: Mapping[str, Any] | None = None,
        *,
        score: float | None = None,
    ) -> None:
        """Saves a state; older checkpoints go once the new one is whole.

        Args:
            step: a whole number above that of every checkpoint there is.
            state: a pytree of arrays, typed PRNG keys and Python numbers.
            metadata: whatever JSON can hold.
            score: a finite number, the higher the better, such as the accuracy on validation
                examples; None for a state that can never be the best.

        Raises:
            ValueError: the step is not above the latest one, a leaf is neither an array nor a
                number, the metadata is not JSON-able, or the score is not finite. Nothing is
                written.
            OSError: the folder cannot be written (PermissionError where that is why), or an
                earlier save failed in the background.
        """
        _validate.count(minimum=0, step=step)
        step = int(step)
        packed, specs = _packing.pack(state)
        content: dict[str, Any] = {"metadata": _jsonable(metadata), "leaves": specs}
        content["bytes"] = _digest(packed.data)
        if score is not None:
            _validate.scalar(score=score)
            _validate.finite(score=score)
            content["score"] = float(score)
            parallel.check_same(score=content["score"])  # by it each host says what stays
        sealed = _seal(content)
        self.wait()
        self._set_damaged_aside()
        manager = self._open()
        latest = manager.latest()
        if latest is not None and step <= latest:
            raise ValueError(
                f"expected step > {latest}, the latest in {self.directory}, got {step}; "
                "go on from restore_latest(), or choose another folder"
            )
        if score is not None:
            self._scores[step] = content["score"]
        with self._explained():
            manager.save(step, packed, sealed)

    def wait(self) -> None:
        """Waits until everything saved so far is durable.

        Raises:
            OSError: the save in the background failed.
        """
        if self._manager is not None:
            with self._explained():
                self._manager.wait()

    def close(self) -> None:
        """Waits for the last save and frees the threads; saving again reopens.

        Raises:
            OSError: the save in the background failed.
        """
        manager, self._manager = self._manager, None
        if manager is not None:
            with self._explained():
                try:
                    manager.wait()
                finally:
                    manager.close()

    def restore_latest(self, like: PyTree) -> Restored | None:
        """Restores the latest whole checkpoint.

        A damaged checkpoint is skipped with a warning in the log "jdistill", and set aside
        (renamed to `damaged-<step>`) by the next `save`.

        Args:
            like: a pytree of the structure, shapes and dtypes saved: a fresh state, or one
                of `jax.ShapeDtypeStruct` leaves. A leaf's sharding, where it has one, is given to
                the restored leaf.

        Returns:
            Step, state and metadata; None where there is no checkpoint, or none that is whole.

        Raises:
            ValueError: the latest whole checkpoint is of another state; says what differs.
            OSError: the folder cannot be read.
        """
        self.wait()
        self._damaged = []
        found = self._first_whole(self.steps()[::-1], like)
        if self._damaged and found is not None:
            _warn("going on from the whole checkpoint of step %d", found.step)
        elif self._damaged:
            _warn("no whole checkpoint in %s: starting afresh", self.directory)
        return found

    def restore_best(self, like: PyTree) -> Restored | None:
        """Restores the whole checkpoint of the highest score, of equal ones the earliest.

        A damaged checkpoint is skipped and set aside as by `restore_latest`, and the next best of
        those that are there takes its place.

        Args:
            like: as for `restore_latest`.

        Returns:
            Step, state and metadata; None where no whole checkpoint has a score.

        Raises:
            ValueError: the best checkpoint is of another state; says what differs.
            OSError: the folder cannot be read.
        """
        self.wait()
        scores, damaged = self._read_scores()
        for step, error in damaged.items():
            self._skip(step, error)
        best = _by_score(scores)
        found = self._first_whole(best, like)
        if found is not None and (damaged or found.step != best[0]):
            _warn("taking the whole checkpoint of step %d as the best", found.step)
        return found

    def _first_whole(self, steps: Sequence[int], like: PyTree) -> Restored | None:
        """The first of these steps that is not damaged."""
        wanted = [_packing.spec(name, leaf) for name, leaf in _packing.named_leaves(like)]
        found = None
        parallel.check_same(checkpoints=steps)
        for step in steps:
            try:
                with silent_orbax():
                    found = self._restore(step, like, wanted)
                break
            except _DamagedError as error:
                self._skip(step, error)
        parallel.check_same(whole_checkpoint=None if found is None else found.step)
        return found

    def _skip(self, step: int, error: _DamagedError) -> None:
        """Says once that a checkpoint is damaged, and notes it for the next `save`."""
        if step not in self._damaged:
            _warn("skipped the damaged checkpoint %s (%s)", self.directory / str(step), error)
            self._damaged.append(step)

    def _read_scores(self) -> tuple[dict[int, float], dict[int, _DamagedError]]:
        """Scores by step, and why those that are damaged have none."""
        scores, damaged = {}, {}
        for step in self.steps():
            try:
                content = self._unsealed(step)
            except _DamagedError as error:
                damaged[step] = error
                continue
            if "score" in content:
                scores[step] = content["score"]
        return scores, damaged

    def restore(self, step: int, like: PyTree) -> Restored:
        """Restores the checkpoint of one step.

        Args:
            step: one of `steps()`.
            like: as for `restore_latest`.

        Returns:
            Step, state and metadata.

        Raises:
            FileNotFoundError: there is no checkpoint of this step; says which there are.
            ValueError: it is of another state; says what differs.
            OSError: it is damaged, or the folder cannot be read.
        """
        _validate.count(minimum=0, step=step)
        wanted = [_packing.spec(name, leaf) for name, leaf in _packing.named_leaves(like)]
        self.wait()
        steps = self.steps()
        if step not in steps:
            raise FileNotFoundError(
                f"expected a checkpoint of step {step} in {self.directory}, got "
                f"{f'those of {steps}' if steps else 'none'}; pass a step that is there"
            )
        try:
            with silent_orbax():
                return self._restore(step, like, wanted)
        except _DamagedError as error:
            raise OSError(
                f"expected a whole checkpoint in {self.directory / str(step)}, got a damaged one "
                f"({error}); pass another step of {steps}"
            ) from None

    def _restore(self, step: int, like: PyTree, wanted: list[_packing.Spec]) -> Restored:
        """One checkpoint, or `_DamagedError`."""
        folder = self.directory / str(step)
        content = self._unsealed(step)
        _packing.check_same(folder, content["leaves"], wanted)
        with _damage():
            packed = _read(folder)
            if _digest(packed.data) != content["bytes"]:
                raise _DamagedError("the checksum of the state differs")
        return Restored(step, _packing.unpack(packed, like), content["metadata"])

    def _unsealed(self, step: int) -> dict[str, Any]:
        """Content of the metadata item of a checkpoint, or `_DamagedError`."""
        with _damage():
            return _unseal(self.directory / str(step))

    def _open(self) -> _orbax.Interface:
        if self._manager is None:
            with self._explained(), silent_orbax():
                self.directory.mkdir(parents=True, exist_ok=True)
                self._manager = _orbax.INTERFACE(self.directory, self._kept)
                if self._keep_best:
                    self._scores, _ = self._read_scores()
        return self._manager

    def _kept(self, steps: Sequence[int]) -> list[bool]:
        """Flags of the checkpoints that stay, for each of the steps there are."""
        scores = {step: self._scores[step] for step in steps if step in self._scores}
        kept = {*steps[-self._max_to_keep :], *_by_score(scores)[: self._keep_best]}
        return [step in kept for step in steps]

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
        parallel.barrier("damaged checkpoints set aside")
        self._damaged = []

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Failures of the storage, with the folder and the remedy."""
        try:
            with undisturbed():
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


def _by_score(scores: Mapping[int, float]) -> list[int]:
    """Steps, the best first; of equal ones the earlier."""
    return sorted(scores, key=lambda step: (-scores[step], step))


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


def _absolute(directory: PathLike) -> epath.Path:
    """The folder as Orbax wants it: absolute, unless it lies in a bucket."""
    path = as_path(directory)
    return path if is_remote(path) else epath.Path(os.path.abspath(path))


def _read(folder: epath.Path) -> np.ndarray:
    """The bytes of a checkpoint's state."""
    with undisturbed():
        return _orbax.INTERFACE.read(folder)


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


def _unseal(folder: epath.Path) -> dict[str, Any]:
    """The content of a checkpoint's metadata item, which is as it was written."""
    content = json.loads((folder / "metadata" / "metadata").read_text())
    if content.pop("checksum") != _content_digest(content):
        raise _DamagedError("the checksum of the metadata differs")
    if content["format"] != _FORMAT:
        raise _OtherFormatError(
            f"expected a checkpoint of format {_FORMAT}, got format {content['format']}; "
            "use the version of jdistill that wrote it, or choose another `--workdir`"
        )
    return content
