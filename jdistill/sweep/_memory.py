"""How many runs fit into a device's memory, by the compiled program's own account."""

from collections.abc import Callable
from typing import Any

import jax

# Of the memory that a device reports, the part that a program may take; what the process holds
# besides, and the allocator's fragments, live in the rest.
SHARE = 0.9


def limit(device: jax.Device) -> int | None:
    """The bytes that a program may use on a device; None where it does not say (CPU)."""
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return None
    return int(SHARE * stats["bytes_limit"])


def bytes_of(sizes: Any) -> int:
    """The peak on each device by a compiled program's account: arguments, results, and between."""
    return int(
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        + sizes.temp_size_in_bytes
        - sizes.alias_size_in_bytes
    )


def chunks(
    num_runs: int,
    num_devices: int,
    bytes_needed: Callable[[int], int],
    limit: int | None,
) -> list[tuple[slice, int]]:
    """Equal chunks of runs, each with how many runs of padding it takes.

    Args:
        num_runs: R.
        num_devices: a chunk with its padding is a multiple of it.
        bytes_needed: of a chunk of that many runs, on each device.
        limit: bytes a device may use; None is no limit.

    Raises:
        MemoryError: one run a device is too much.
    """
    size = _rounded(num_runs, num_devices)
    if limit is not None:
        number = 1
        while not _fits(bytes_needed, size, limit):
            if size == num_devices:
                raise MemoryError(
                    f"expected a run to fit into {limit:,} bytes of a device, got a program that "
                    "needs more; train with a smaller batch_size, or raise memory_limit"
                )
            number = min(2 * number, num_runs)
            size = _rounded(-(-num_runs // number), num_devices)
    starts = range(0, num_runs, size)
    slices = [slice(start, min(start + size, num_runs)) for start in starts]
    return [(runs, size - (runs.stop - runs.start)) for runs in slices]


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _fits(bytes_needed: Callable[[int], int], size: int, limit: int) -> bool:
    try:
        return bytes_needed(size) <= limit
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):  # what the TPU compiler says of itself
            return False
        raise
