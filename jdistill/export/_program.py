"""Programs of `jax.export`: written for batches of any size, and read as a network."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from jdistill import _jax, nets
from jdistill.export import _network
from jdistill.typing import Array

PLATFORMS = ("cpu", "cuda", "tpu")

_LEAST = jax_export.minimum_supported_calling_convention_version
_MOST = jax_export.maximum_supported_calling_convention_version
CONVENTIONS = f"{_LEAST} to {_MOST}"  # that this version of JAX reads


def check_flatbuffers() -> None:
    """An error where JAX could neither write nor read a program."""
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        raise ImportError(
            "expected the package flatbuffers, with which JAX reads and writes programs, got none; "
            "run pip install 'jdistill[export]', or use save(..., stablehlo=False) and load"
        ) from None


def written(parts: _network.Parts, shape: tuple[int, ...]) -> tuple[bytes, int]:
    """The program of weights by name and inputs, with its gradient; its calling convention."""
    check_flatbuffers()
    weights = _network.shapes(parts.weights)

    def logits(weights: dict[str, Array], inputs: Array) -> Array:
        network = _network.portable(parts.filled(weights, "the network"))
        out: Array = nets.fast_on_cpu(network, enabled=False)(inputs)
        return out

    try:
        (size,) = jax_export.symbolic_shape("b")
        inputs = jax.ShapeDtypeStruct((size, *shape), jnp.float32)
        with _jax.full_precision(), _without_source_paths():
            exported = jax_export.export(jax.jit(logits), platforms=PLATFORMS)(weights, inputs)
            return bytes(exported.serialize(vjp_order=1)), exported.calling_convention_version
    except Exception as error:  # of any kind, as the network is anyone's
        reason = str(error).partition("\n")[0]
        raise ValueError(
            "expected a network that jax.export can write for batches of any size, got "
            f"{type(error).__name__} ({reason:.200}); pass stablehlo=False for weights and "
            "configuration alone"
        ) from error


@contextlib.contextmanager
def _without_source_paths() -> Iterator[None]:
    """Programs without the files and lines that they were traced from, which name the machine."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def read(data: bytes, record: Mapping[str, Any], shape: tuple[int, ...]) -> "_Program":
    """The function `(weights by name, inputs) -> logits` that was written."""
    version = record["calling_convention_version"]
    if not _LEAST <= version <= _MOST:
        raise ValueError(f"calling convention {version}, not {CONVENTIONS}")
    return _Program(record["sha256"], shape, jax_export.deserialize(bytearray(data)))


@dataclasses.dataclass(frozen=True)
class _Program:
    """A program that was read; equal where the programs are, so that they share a trace."""

    sha256: str
    shape: tuple[int, ...]
    exported: dataclasses.InitVar[jax_export.Exported]

    def __post_init__(self, exported: jax_export.Exported) -> None:
        object.__setattr__(self, "_function", _differentiable(exported))

    def __call__(self, weights: dict[str, Array], inputs: Array) -> Array:
        """The logits."""
        if np.shape(inputs)[1:] != self.shape or not np.ndim(inputs):
            sizes = ", ".join(map(str, ("B", *self.shape)))
            raise ValueError(
                f"expected inputs of shape [{sizes}], got {np.shape(inputs)}; reshape them, or "
                "export the network for that input_shape"
            )
        function: Any = self._function  # type: ignore[attr-defined]
        out: Array = function(weights, jnp.asarray(inputs, jnp.float32))
        return out


def _differentiable(exported: jax_export.Exported) -> Callable[..., Any]:
    """The program with its gradient, which `jax.vmap` maps one after the other.

    JAX itself maps no exported program, and attacks that need a Jacobian do.
    """
    one_by_one = jax.custom_batching.sequential_vmap
    forward = one_by_one(exported.call)

    @one_by_one
    def backward(weights: Any, inputs: Any, cotangent: Any) -> Any:
        leaves, structure = jax.tree.flatten((weights, inputs))
        return jax.tree.unflatten(structure, exported.vjp().call(*leaves, cotangent))

    function = jax.custom_vjp(forward)
    function.defvjp(
        lambda weights, inputs: (forward(weights, inputs), (weights, inputs)),
        lambda saved, cotangent: backward(*saved, cotangent),
    )
    return function
