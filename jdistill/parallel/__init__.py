"""One pure step, compiled for one device or many: `jit` over a mesh, `shard_map`, or `pmap`.

The batch is split over the devices, the state is the same on all of them, and all modes give the
same result where nothing is of a device's own rows, as batch statistics are in the last two. `jit`
is the one to use. The others run one program per device, in which the step reduces over the data
axis itself: `quantized_psum` then sends gradients as 8-bit numbers.
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
