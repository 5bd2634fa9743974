"""Batches of an epoch, beside PyTorch's DataLoader."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from experiments.bench import timing, torch_side
from experiments.bench.options import Options, command
from experiments.bench.rows import Row
from experiments.bench.timing import AfterCall, Calls
from jdistill import data

OURS, LOADER = "data.batches", "PyTorch's DataLoader"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Options):
    """Shuffled batches of an epoch on the device: `data.batches` against PyTorch's DataLoader.

    Each of our batches is put on the device, as `train.fit` does. PyTorch has a DataLoader over a
    TensorDataset of the same floats, in this process.
    """

    num_examples: int = 60_000
    """Random images of 28 x 28 pixels."""
    batch_size: int = 128
    """Images per batch."""
    peers: bool = True
    """Time PyTorch beside us."""


def run(options: Data, after_call: AfterCall) -> Iterator[list[Row]]:
    """Rows of the command."""
    missing = torch_side.missing() if options.peers else None
    beside_torch = options.peers and missing is None
    found = calls(options, (28, 28, 1), beside_torch=beside_torch)
    timed = timing.interleaved(found, repeats=options.repeats, after_call=after_call)
    yield [
        Row(
            f"an epoch of {options.num_examples} images in batches of {options.batch_size}",
            timed.timings[OURS],
            LOADER if options.peers else "none",
            timed.timings.get(LOADER),
            command(options),
            compiles=False,
            note=missing or "",
        )
    ]


def calls(options: Data, input_shape: tuple[int, ...], *, beside_torch: bool) -> Calls:
    """Calls of one epoch; each returns the number of its batches, and the last of them.

    Args:
        options: the sizes.
        input_shape: of one image.
        beside_torch: whether PyTorch does it, too.
    """
    draws = np.random.default_rng(0)
    levels = draws.integers(0, 256, (options.num_examples, *input_shape), np.uint8)
    inputs = levels.astype(np.float32) / np.float32(255)
    labels = draws.integers(0, 10, options.num_examples).astype(np.int32)

    def ours() -> Any:
        order = data.epoch_order((0,), 0, len(labels))
        count = 0
        for batch in data.batches(inputs, labels, batch_size=options.batch_size, order=order):
            last = jax.device_put((batch.inputs, batch.labels))
            count += 1
        return count, jax.block_until_ready(last)

    found: dict[str, Callable[[], Any]] = {OURS: ours}
    if beside_torch:
        found[LOADER] = _torch_epoch(inputs, labels, options.batch_size)
    return found


def _torch_epoch(inputs: np.ndarray, labels: np.ndarray, batch_size: int) -> Callable[[], Any]:
    """An epoch of a loader; on an accelerator its batches go there, on a CPU they are there."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    examples = TensorDataset(torch.from_numpy(inputs), torch.from_numpy(labels))
    loader = DataLoader(examples, batch_size=batch_size, shuffle=True)
    on_cpu = jax.default_backend() == "cpu"

    def epoch() -> Any:
        count = 0
        for batch in loader:
            last = batch if on_cpu else jax.device_put([column.numpy() for column in batch])
            count += 1
        return count, tuple(last if on_cpu else jax.block_until_ready(last))

    return epoch
