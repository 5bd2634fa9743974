"""The calls of Orbax, through either of its interfaces; each reads what the other has written.

`V0` is `CheckpointManager`; `V1` is `orbax.checkpoint.v1`, which still lies in a package
`experimental` and works through that manager. Both classes have the same methods and write the
same files, and `INTERFACE` is the one in use. CONTRIBUTING.md says why.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import v1

# Of the steps there are, in ascending order, which stay.
Keep = Callable[[Sequence[int]], Sequence[bool]]


class _Preservation:
    """What stays, as both interfaces ask for it."""

    def __init__(self, keep: Keep) -> None:
        self._keep = keep

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Whether each checkpoint stays."""
        del context
        return self._keep([checkpoint.step for checkpoint in checkpoints])


class V0:
    """Numbered checkpoints in one folder.

    Args:
        directory: the folder, which is there.
        keep: which checkpoints stay once another is whole.
    """

    def __init__(self, directory: epath.Path, keep: Keep) -> None:
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Preservation(keep),
                cleanup_tmp_directories=True,
                save_root_metadata=False,
                # Reads no old step, and so cannot complain of a damaged one.
                lightweight_initialize=True,
            ),
        )

    def latest(self) -> int | None:
        """The highest step there is."""
        return self._manager.latest_step()

    def save(self, step: int, packed: np.ndarray, sealed: dict[str, Any]) -> None:
        """Begin to save; `force`, because no policy of Orbax may skip a step in silence."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave({"bytes": packed}), metadata=ocp.args.JsonSave(sealed)
        )
        self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Return when what was saved is durable, or raise why it is not."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Free the threads."""
        self._manager.close()

    @staticmethod
    def read(folder: epath.Path) -> np.ndarray:
        """The bytes of a checkpoint; not through the manager, which would create the folder."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            return np.asarray(reader.restore(folder, args=args)["state"]["bytes"])


class _Metadata(v1.handlers.JsonHandler):
    """JSON in a file of the name that version 0 gives it."""

    def __init__(self) -> None:
        super().__init__("metadata")


def _context() -> v1.Context:
    """A context in which the metadata are JSON, and no tree of arrays."""
    context = v1.Context()
    registry = v1.handlers.local_registry(include_global_registry=True)
    context.checkpointables.registry = registry.add(_Metadata, checkpointable_name="metadata")
    return context


class V1:
    """As `V0`."""

    def __init__(self, directory: epath.Path, keep: Keep) -> None:
        self._checkpointer = v1.training.Checkpointer(
            directory,
            context=_context(),
            preservation_policy=_Preservation(keep),
            cleanup_tmp_directories=True,
            # Not `lightweight_initialize`: steps without a time make `latest` fail (0.12.8).
        )
        self._saving: v1.AsyncResponse[bool] | None = None

    def latest(self) -> int | None:
        """The highest step there is."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, packed: np.ndarray, sealed: dict[str, Any]) -> None:
        """Begin to save."""
        items = {"state": {"bytes": packed}, "metadata": sealed}
        self._saving = self._checkpointer.save_checkpointables_async(step, items, force=True)

    def wait(self) -> None:
        """Return when what was saved is durable, or raise why it is not."""
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()
        finally:
            # Both have the error, and each keeps it until it has been raised.
            self._checkpointer.wait()

    def close(self) -> None:
        """Free the threads."""
        self._checkpointer.close()

    @staticmethod
    def read(folder: epath.Path) -> np.ndarray:
        """The bytes of a checkpoint."""
        return np.asarray(v1.load(folder, checkpointable_name="state")["bytes"])


INTERFACE: type[V0] | type[V1] = V0
