"""Several processes on this machine, each with some of the devices, as on several hosts."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent


def start(arguments, *, num_devices=2, **environment):
    """A process of this interpreter, on CPU."""
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    settings = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **settings},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def address():
    """A free port of this machine, for process 0."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return f"localhost:{one.getsockname()[1]}"


def finished(processes, seconds=300):
    """Exit code, output, and errors of each; none is left behind."""
    try:
        return [(each, *each.communicate(timeout=seconds)) for each in processes]
    finally:
        for each in processes:
            each.kill()
