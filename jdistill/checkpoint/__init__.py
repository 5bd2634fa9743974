"""Saving and resuming training states: the library's only door to Orbax.

A checkpoint is a numbered folder with two Orbax items:

* `state`: one `uint8` array, `{"bytes": …}`: the bytes of every leaf, in the order of the tree.
  One array, because Orbax reads many at once, and when one of those is damaged it leaves tracebacks
  of the others on stderr; one is also quicker to write and to read than many small ones.
* `metadata`: JSON that holds the caller's own metadata, name, shape and dtype of each leaf, and the
  checksum of the bytes. Storage that changed a byte is found out at restore, and the checkpoint
  before is used instead.

Orbax is called in `_orbax` alone; `_orbax_v1` has the same for its newer interface, for the tests.
"""

from jdistill.checkpoint._checkpointer import Checkpointer, Restored

__all__ = ["Checkpointer", "Restored"]
