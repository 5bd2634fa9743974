"""The precision of what is measured."""

import contextlib
from typing import Any

import jax


def full_precision() -> contextlib.AbstractContextManager[Any]:
    """Full float32 matrix products unless the user chose a precision.

    JAX's defaults are bfloat16 on TPU and TF32 on recent GPUs; that alone moves robust accuracy.
    """
    configured: str | None = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if configured is None:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()
