"""The calls of `orbax.checkpoint.v1`, as `_orbax.Interface`, tested beside those in use.

The package still lies in one named `experimental`; nothing imports this module, so that nothing
breaks when that moves.
"""

from typing import Any

import numpy as np
from etils import epath
from orbax.checkpoint import v1

from jdistill.checkpoint._orbax import Keep, Preservation


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
    """`Checkpointer` of the newer interface."""

    def __init__(self, directory: epath.Path, keep: Keep) -> None:
        self._checkpointer = v1.training.Checkpointer(
            directory,
            context=_context(),
            preservation_policy=Preservation(keep),
            cleanup_tmp_directories=True,
            # Not `lightweight_initialize`: steps without a time make `latest` fail (0.12.8).
        )
        self._saving: v1.AsyncResponse[bool] | None = None

    def latest(self) -> int | None:
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, packed: np.ndarray, sealed: dict[str, Any]) -> None:
        items = {"state": {"bytes": packed}, "metadata": sealed}
        self._saving = self._checkpointer.save_checkpointables_async(step, items, force=True)

    def wait(self) -> None:
        saving, self._saving = self._saving, None
        try:
            if saving is not None:
                saving.result()
        finally:
            # Both have the error, and each keeps it until it has been raised.
            self._checkpointer.wait()

    def close(self) -> None:
        self._checkpointer.close()

    @staticmethod
    def read(folder: epath.Path) -> np.ndarray:
        return np.asarray(v1.load(folder, checkpointable_name="state")["bytes"])
