"""Processes on several hosts: JAX's own runtime, started with errors that say what to do."""

import os
import signal
import sys
import threading

import jax

from jdistill import _validate

_PORT = 8476


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout_s: int = 300,
    heartbeat_s: int = 100,
) -> None:
    """Join this process to those on the other hosts; on every host, before any computation.

    Where not all processes are there in time, the process ends with exit code 2 and a line that
    says what keeps them apart; where one of them dies later, JAX ends the others.

    On Cloud TPU, Slurm, Kubernetes and Open MPI the three arguments are found by JAX. Elsewhere
    they are needed, all three.

    Args:
        coordinator_address: `"host:port"` of process 0; without a port, 8476. Where JAX finds the
            host, it finds the port too; `JAX_COORDINATOR_PORT` names another.
        num_processes: how many there are, one per host; at least 1.
        process_id: number of this process, from 0.
        timeout_s: seconds in which all processes have to be there.
        heartbeat_s: seconds after which a silent process counts as dead, and the others end.

    Raises:
        ValueError: some of the three arguments are missing, or out of range.
        RuntimeError: JAX has computed or was started already.

    Example:
        >>> initialize("localhost", 2, 2)
        Traceback (most recent call last):
        ...
        ValueError: expected process_id in 0..1, got 2; number the 2 processes from 0

    References:
        JAX documentation, "Introduction to multi-controller JAX".
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"expected coordinator_address, num_processes and process_id, got no "
            f"{' and no '.join(missing)}; pass all three, or none where JAX finds them"
        )
    _validate.count(timeout_s=timeout_s, heartbeat_s=heartbeat_s)
    if coordinator_address is not None:
        _validate.text(coordinator_address=coordinator_address)
        _validate.count(num_processes=num_processes)
        _validate.count(minimum=0, process_id=process_id)
        assert num_processes is not None
        assert process_id is not None
        if process_id >= num_processes:
            raise ValueError(
                f"expected process_id in 0..{num_processes - 1}, got {process_id}; number the "
                f"{num_processes} processes from 0"
            )
        if ":" not in coordinator_address:
            coordinator_address = f"{coordinator_address}:{_PORT}"
    where = coordinator_address or "the coordinator that JAX has found"
    missing_ones = (
        f"expected {num_processes or 'all'} processes at {where} within {timeout_s} s, got fewer; "
        "start the same command on every host, let the port through the firewall, and name a "
        "process 0 that the others reach"
    )
    # JAX aborts the process at its own time limit, from C++ and without an exception.
    watch = threading.Timer(timeout_s, _end, [missing_ones])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            initialization_timeout=timeout_s + 30,
            heartbeat_timeout_seconds=heartbeat_s,
        )
    except ValueError as error:
        raise ValueError(
            f"expected a cluster that JAX knows (Cloud TPU, Slurm, Kubernetes, Open MPI), got none "
            f"({error}); pass coordinator_address, num_processes and process_id"
        ) from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise RuntimeError(
            f"expected one start before any computation, got {reason:.300}; call it once and first"
        ) from error
    finally:
        watch.cancel()
    if threading.current_thread() is threading.main_thread():
        # JAX has put a handler of its own, which does not end the process, over this one.
        handler = signal.getsignal(signal.SIGTERM)
        if handler is not None:
            signal.signal(signal.SIGTERM, handler)


def _end(message: str) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(2)
