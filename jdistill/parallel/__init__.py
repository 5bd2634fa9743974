"""One pure step, compiled for one device or many: `jit` over a mesh, `shard_map`, or `pmap`.

All modes give the same result: the batch is split over the devices, the state is the same on all of
them. `jit` is the one to use. The others run one program a device, in which the step reduces over
the data axis itself: `quantized_psum` then sends gradients as 8-bit numbers.
"""

from jdistill.parallel._devices import (
    DATA_AXIS,
    example_indices,
    local,
    make_mesh,
    replicate,
    split,
)
from jdistill.parallel._exchange import QuantizedSum, quantized_psum
from jdistill.parallel._hosts import barrier, check_same
from jdistill.parallel._step import compile_step, pad_batch
from jdistill.typing import Batch

__all__ = [
    "DATA_AXIS",
    "Batch",
    "QuantizedSum",
    "barrier",
    "check_same",
    "compile_step",
    "example_indices",
    "local",
    "make_mesh",
    "pad_batch",
    "quantized_psum",
    "replicate",
    "split",
]
