"""The calls of Orbax; `_orbax_v1` has the same for its newer interface.

Each reads what the other has written. `INTERFACE` is the one in use; CONTRIBUTING.md says why.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import orbax.checkpoint as ocp
from etils import epath

# Of the steps there are, in ascending order, which stay.
Keep = Callable[[Sequence[int]], Sequence[bool]]


class Preservation:
    """Policy of the steps that stay, as both interfaces ask for it."""

    def __init__(self, keep: Keep) -> None:
        self._keep = keep

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Flags of the checkpoints that stay."""
        del context
        return self._keep([checkpoint.step for checkpoint in checkpoints])


class Interface(Protocol):
    """Numbered checkpoints in one folder.

    Args:
        directory: the folder, which is there.
        keep: which checkpoints stay once another is whole.
    """

    def __init__(self, directory: epath.Path, keep: Keep) -> None: ...

    def latest(self) -> int | None:
        """The highest step there is."""

    def save(self, step: int, packed: np.ndarray, sealed: dict[str, Any]) -> None:
        """Begin to save."""

    def wait(self) -> None:
        """Return when what was saved is durable, or raise why it is not."""

    def close(self) -> None:
        """Free the threads."""

    @staticmethod
    def read(folder: epath.Path) -> np.ndarray:
        """The bytes of a checkpoint."""


class V0:
    """`CheckpointManager`."""

    def __init__(self, directory: epath.Path, keep: Keep) -> None:
        self._manager = ocp.CheckpointManager(
            directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=Preservation(keep),
                cleanup_tmp_directories=True,
                save_root_metadata=False,
                # Reads no old step, and so cannot complain of a damaged one.
                lightweight_initialize=True,
            ),
        )

    def latest(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, packed: np.ndarray, sealed: dict[str, Any]) -> None:
        # `force`, because no policy of Orbax may skip a step in silence.
        args = ocp.args.Composite(
            state=ocp.args.StandardSave({"bytes": packed}), metadata=ocp.args.JsonSave(sealed)
        )
        self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

    @staticmethod
    def read(folder: epath.Path) -> np.ndarray:
        # Not through the manager, which would create the folder.
        args = ocp.args.Composite(state=ocp.args.StandardRestore())
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            return np.asarray(reader.restore(folder, args=args)["state"]["bytes"])


INTERFACE: type[Interface] = V0
