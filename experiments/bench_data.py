"""What `python -m experiments.bench data` times: how an epoch's batches come to the device."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import timing
from experiments.bench_rows import BenchRow
from experiments.timing import Timed
from jdistill import data
from jdistill.sweep import _program
from jdistill.typing import Array

STORE, HOST, LOADER = "store", "host batches", "PyTorch's DataLoader"


def compare(
    num_examples: int,
    *,
    shape: tuple[int, ...] = (28, 28, 1),
    batch_size: int,
    repeats: int,
    missing: str | None,
    after_call: Callable[[int, int], None] = lambda done, total: None,
) -> Timed:
    """Time one epoch's batches, shuffled, out of memory, with nothing done to them.

    Each result is the number of batches and the last of them, inputs and labels.

    Args:
        num_examples: random images and labels.
        shape: of one image.
        batch_size: images a batch.
        repeats: timed epochs of each way, in turn, after one that warms up.
        missing: why there is no PyTorch; None where there is.
        after_call: told how many calls are done, of how many.
    """
    draws = np.random.default_rng(0)
    levels = draws.integers(0, 256, (num_examples, *shape), np.uint8)
    inputs = levels.astype(np.float32) / np.float32(255)
    labels = draws.integers(0, 10, num_examples).astype(np.int32)
    stored = jax.device_put(_program.store(inputs, labels))
    num_batches = data.num_batches(num_examples, batch_size)

    def store() -> Any:
        plan = _program.plan_of([(0,)], 0, num_examples, batch_size)
        return num_batches, jax.block_until_ready(_last_batch(stored, plan.rows[0]))

    def host() -> Any:
        order = data.epoch_order((0,), 0, num_examples)
        count = 0
        for batch in data.batches(inputs, labels, batch_size=batch_size, order=order):
            last = jax.device_put((batch.inputs, batch.labels))
            count += 1
        return count, jax.block_until_ready(last)

    calls: dict[str, Callable[[], Any]] = {STORE: store, HOST: host}
    if missing is None:
        calls[LOADER] = _torch_epoch(inputs, labels, batch_size)
    return timing.interleaved(calls, repeats=repeats, after_call=after_call)


def rows(
    timed: Timed, *, num_examples: int, batch_size: int, missing: str | None
) -> list[BenchRow]:
    """Of what `compare` gave: seconds an epoch."""
    return [
        BenchRow(
            f"an epoch of {num_examples} images in batches of {batch_size}",
            timed.timings[STORE],
            peer,
            timed.timings.get(peer),
            note=(missing or "") if peer == LOADER else "",
        )
        for peer in (HOST, LOADER)
    ]


@jax.jit
def _last_batch(stored: _program.Store, rows: Array) -> tuple[Array, Array]:
    """Makes the batch of each row of `rows [S, B]`; the last is what is left."""

    def batch(number: Array | int, _: Any) -> tuple[Array, Array]:
        return _program._read(stored, rows[number]), stored.labels[rows[number]]

    # As the loop's state each batch is written out, where a sum over it would read in passing.
    return jax.lax.fori_loop(1, rows.shape[0], batch, batch(0, None))


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
