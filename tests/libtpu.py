"""TPU compiler for tests: beside JAX, or in the folder that `make .venv/tpu/installed` fills."""

import contextlib
import importlib.util
import os
import pathlib
import sys

import jax
import pytest

from jdistill.runtime import tpu

_LIBRARY = pathlib.Path(sys.prefix) / "tpu" / "libtpu" / "libtpu.so"
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None or _LIBRARY.exists()
needs_libtpu = pytest.mark.skipif(
    not HAS_LIBTPU, reason="needs the package libtpu: make .venv/tpu/installed"
)


@contextlib.contextmanager
def compiler():
    """Context in which the compiler is found, and optimizes as it does for users."""
    own = {name: os.environ.get(name) for name in (*tpu.ENVIRONMENT, "TPU_LIBRARY_PATH")}
    if importlib.util.find_spec("libtpu") is None:
        os.environ["TPU_LIBRARY_PATH"] = str(_LIBRARY)
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", True)
        for name, value in own.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
