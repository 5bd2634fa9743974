"""Trained networks as files that outlive the versions they were written with.

`save` writes a folder with three files:

* `weights.npz`: every weight under its path in the network, as NumPy's own types, no pickle;
* `config.json`: what the network is (class and fields of the library's own networks), its input
  shape, bounds, and number of classes, the versions it was written with, the checksums of the
  files, and the logits of two fixed inputs;
* `model.stablehlo`: the same network as a program of `jax.export`, for batches of any size on CPU,
  CUDA GPUs, and TPUs.

Weights and configuration are the truth: `load` makes the network from them on any version of JAX.
The program is a convenience for where this library is not: JAX promises to read it within a window
of versions, which `window` says, and `load_stablehlo` refuses it clearly outside of that. Both
compare the checksums, and the logits of the fixed inputs.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import io
import json
import logging
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import export as jax_export
from jax.tree_util import Partial

import jdistill
from jdistill import _files, _fingerprint, _jax, _validate, nets
from jdistill._files import PathLike
from jdistill.nets._adapters import _LinenApply, _LinenLogits
from jdistill.train._step import _Evaluation
from jdistill.typing import Array, LogitsFn, PyTree

__all__ = ["load", "load_stablehlo", "save", "window"]

_log = logging.getLogger("jdistill")

_FORMAT = 1
_PLATFORMS = ("cpu", "cuda", "tpu")

# The networks that can be made from a configuration, and the functions among their fields.
_NETWORKS: dict[str, Callable[..., Any]] = {
    "ConvNet": nets.ConvNet,
    "PlainNet": nets.PlainNet,
    "ResNet": nets.ResNet,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "jdistill.nets.conv_general_dilated": nets.conv_general_dilated,
    "jax.lax.conv_general_dilated": jax.lax.conv_general_dilated,
}

# Of the largest logit, what another platform or version may move the logits of the fixed inputs by:
# far above rounding, far below what another activation or constant does.
_TOLERANCE = 1e-3


def save(
    path: PathLike,
    logits_fn: LogitsFn,
    *,
    input_shape: Sequence[int],
    bounds: Any = (0.0, 1.0),
    stablehlo: bool = True,
) -> epath.Path:
    """Writes a network in evaluation mode: weights, configuration, and a portable program.

    For one of `study.networks`: `save(path, trained.logits_fn, input_shape=(28, 28, 1))`. The
    window of versions is logged.

    The library's own networks (`nets.ConvNet`, `nets.PlainNet`, `nets.ResNet`) are read back from
    the folder alone. Of any other network the weights are written under their paths, and `load`
    takes the network itself as `model`; the program needs neither.

    Args:
        path: the folder, local or `gs://…`, made if need be. An export there is replaced; a
            process that is killed meanwhile leaves none. On several hosts the first one writes.
        logits_fn: the network, as `nets.logits_fn`, `nets.nnx_logits_fn`, `train.logits_fn`, and
            `nets.callable_logits_fn` make it: a pytree whose leaves are the weights.
        input_shape: of one input, without the batch axis.
        bounds: `(low, high)` of the inputs, numbers or an end per feature; kept for who attacks
            the network, and the range of the two inputs whose logits are kept.
        stablehlo: False leaves the program out: for a network that cannot be traced for a batch of
            unknown size, or that calls back into Python.

    Returns:
        The folder.

    Raises:
        ValueError: a network without weights as leaves, one that cannot take such inputs or gives
            NaN, or whose program cannot be written; nothing has changed then.
        ImportError: no package `flatbuffers`, with which JAX writes programs.
        OSError: the folder cannot be written.

    Example:
        >>> import tempfile
        >>> model = nets.digits_net(width=0.25)
        >>> params, model_state = nets.init(model, jax.random.key(0), (8, 8, 1))
        >>> student = nets.logits_fn(model, {"params": params, **model_state})
        >>> folder = save(tempfile.mkdtemp(), student, input_shape=(8, 8, 1))
        >>> sorted(file.name for file in folder.iterdir())
        ['config.json', 'model.stablehlo', 'weights.npz']
        >>> inputs = jnp.ones((3, 8, 8, 1))
        >>> bool((load(folder)(inputs) == student(inputs)).all())
        True
    """
    folder = _files.as_path(path)
    shape = _validate.shape(input_shape=input_shape)
    low, high = _validate.bounds(bounds, shape, open_box=True)
    _validate.flag(stablehlo=stablehlo)
    _check_free(folder)
    network = nets.callable_logits_fn(logits_fn)
    parts = _parts(network)
    weights = {name: np.asarray(_raw(leaf)) for name, leaf in _named(parts.weights).items()}
    if not weights:
        raise ValueError(
            "expected a network whose weights are leaves of its pytree, got one without any; pass "
            "nets.callable_logits_fn(function, weights)"
        )
    logits = _logits_of_probe(network, shape, (low, high))
    if np.isnan(logits).any():
        raise ValueError(
            "expected a network with finite logits, got NaN for inputs within its bounds; export "
            "one whose training has not diverged"
        )
    program, convention = _export(parts, shape) if stablehlo else (b"", 0)
    stream = io.BytesIO()
    # What NumPy knows by an extension alone, such as bfloat16, is written as its bits.
    np.savez(stream, **{name: _bits(array) for name, array in weights.items()})  # type: ignore[arg-type]
    config: dict[str, Any] = {
        "format": _FORMAT,
        "network": parts.record(),
        "input_shape": shape,
        "dtype": "float32",
        "bounds": [np.asarray(end).tolist() for end in (low, high)],
        "num_classes": logits.shape[1],
        "probe_logits": logits.astype(float).tolist(),
        "weights": {
            "file": "weights.npz",
            "sha256": _sha256(stream.getvalue()),
            "arrays": {
                name: {"shape": array.shape, "dtype": array.dtype.name}
                for name, array in weights.items()
            },
        },
        "program": None,
        "versions": {
            "jdistill": jdistill.__version__,
            **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        },
    }
    if stablehlo:
        config["program"] = {
            "file": "model.stablehlo",
            "sha256": _sha256(program),
            "arguments": "weights by name, then inputs",
            "platforms": _PLATFORMS,
            "calling_convention_version": convention,
            "window": "JAX up to 6 months newer and up to 3 weeks older than the one of `versions`",
        }
    config["sha256"] = _checksum(config)
    if jax.process_index() == 0:
        _write(folder, config, {"weights.npz": stream.getvalue(), "model.stablehlo": program})
        _log.info("wrote %s", window(folder) if stablehlo else folder)
    return folder


def load(path: PathLike, model: Any = None) -> Partial:
    """The network that `save` wrote, from its weights and configuration, on any version of JAX.

    Args:
        path: the folder.
        model: of a network that is not the library's own: the Flax Linen module that it was, or
            any network of that structure as a pytree, such as `nets.nnx_logits_fn(Mine(rngs))` or
            `nets.callable_logits_fn(function, other_weights)`, whose weights are replaced.

    Returns:
        A pytree that maps inputs `[B, ...]` to logits `[B, K]`, as `nets.logits_fn` gives it.

    Raises:
        FileNotFoundError: no export in the folder.
        ValueError: a damaged file, one of a newer version of the library, or another model than
            was written.

    Example:
        >>> import tempfile
        >>> def linear(weights, inputs):
        ...     return inputs @ weights["kernel"]
        >>> network = nets.callable_logits_fn(linear, {"kernel": jnp.eye(3)})
        >>> folder = save(tempfile.mkdtemp(), network, input_shape=(3,))
        >>> blank = nets.callable_logits_fn(linear, {"kernel": jnp.zeros((3, 3))})
        >>> load(folder, blank)(jnp.array([[0.0, 1.0, 0.5]])).tolist()
        [[0.0, 1.0, 0.5]]
    """
    folder, config = _read_config(path)
    weights = _read_weights(folder, config)
    parts = _blank(folder, config, model)
    network = parts.network(_filled(parts.weights, weights, folder))
    _check_probe(network, folder, config)
    return network


def load_stablehlo(path: PathLike) -> Partial:
    """The network that `save` wrote, from its program, within the window of versions.

    Its logits and gradients are those of the network at full float32 precision, and every attack
    and measure takes it. Its convolutions are XLA's own, whose gradients are slow on CPU; use
    `load` there. It has first derivatives, in reverse mode.

    Args:
        path: the folder.

    Returns:
        A pytree that maps inputs `[B, ...]` with `B >= 1` to logits `[B, K]`; its leaves are the
        weights. One program serves all batch sizes; JAX compiles it for each.

    Raises:
        FileNotFoundError: no export in the folder.
        ValueError: a damaged file, an export without a program, or a program outside the window.
        ImportError: no package `flatbuffers`, with which JAX reads programs.

    Example:
        >>> import tempfile
        >>> model = nets.digits_net(width=0.25)
        >>> params, model_state = nets.init(model, jax.random.key(0), (8, 8, 1))
        >>> student = nets.logits_fn(model, {"params": params, **model_state})
        >>> network = load_stablehlo(save(tempfile.mkdtemp(), student, input_shape=(8, 8, 1)))
        >>> network(jnp.ones((3, 8, 8, 1))).shape, network(jnp.ones((7, 8, 8, 1))).shape
        ((3, 10), (7, 10))
    """
    folder, config = _read_config(path)
    record = _program_of(folder, config)
    data = _read_file(folder, record)
    weights = _read_weights(folder, config)
    _check_flatbuffers()
    least = jax_export.minimum_supported_calling_convention_version
    most = jax_export.maximum_supported_calling_convention_version
    version = record["calling_convention_version"]
    try:
        if not least <= version <= most:
            raise ValueError(f"calling convention {version}, not {least} to {most}")
        exported = jax_export.deserialize(bytearray(data))
        shape = tuple(config["input_shape"])
        network = Partial(_Program(record["sha256"], shape, exported), weights)
        jax.block_until_ready(network(_probe(shape, config["bounds"])))
    # What another version wrote fails in many ways, from unknown operations to mixed-up fields.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"expected a program that JAX {jax.__version__} reads, got {folder / record['file']}, "
            f"which it does not ({type(error).__name__}: {reason:.200}); use export.load, or a "
            f"version within the window: {window(folder)}"
        ) from error
    _check_probe(network, folder, config)
    return network


def window(path: PathLike) -> str:
    """The versions of JAX that read an export's program, and the one at hand, as a sentence.

    JAX promises its exports 6 months of backward and 3 weeks of forward compatibility, by the dates
    of the releases. Weights and configuration have no such limit.

    Args:
        path: the folder.

    Returns:
        The text, for people.

    Raises:
        FileNotFoundError: no export in the folder.
        ValueError: a damaged configuration, or an export without a program.

    Example:
        >>> import tempfile
        >>> network = nets.callable_logits_fn(lambda weights, inputs: inputs @ weights, jnp.eye(2))
        >>> print(window(save(tempfile.mkdtemp(), network, input_shape=(2,))))
        /...: written with JAX ... (calling convention ...), read by the JAX releases up to 6 months
        newer and up to 3 weeks older; this is JAX ... (calling conventions ... to ...).

    References:
        JAX's documentation, "Exporting and serializing staged-out computations", section
        "Compatibility guarantees".
    """
    folder, config = _read_config(path)
    version = _program_of(folder, config)["calling_convention_version"]
    least = jax_export.minimum_supported_calling_convention_version
    most = jax_export.maximum_supported_calling_convention_version
    return (
        f"{folder}: written with JAX {config['versions']['jax']} (calling convention {version}), "
        "read by the JAX releases up to 6 months newer and up to 3 weeks older; this is JAX "
        f"{jax.__version__} (calling conventions {least} to {most})."
    )


class _Parts(NamedTuple):
    """A network, its weights apart."""

    model: Any  # the Linen module; None for any other network, which is all weights and structure
    weights: PyTree  # the leaves are arrays, or their shapes

    def network(self, weights: PyTree) -> Any:
        """The network with these weights."""
        return weights if self.model is None else nets.logits_fn(self.model, weights)

    def record(self) -> dict[str, Any]:
        """Entry of the configuration, in the types of JSON."""
        if self.model is None:
            return {"kind": "pytree"}
        kind: Any = type(self.model)
        is_known = _NETWORKS.get(kind.__name__) is kind
        functions = {function: name for name, function in _FUNCTIONS.items()}
        fields = {}
        for field in dataclasses.fields(self.model):
            held = getattr(self.model, field.name)
            if field.name not in ("parent", "name"):
                fields[field.name] = functions.get(held, held) if callable(held) else held
        # A convolution of the user's own has no name that it could be found by.
        if is_known and not any(map(callable, fields.values())):
            text = json.dumps({"kind": kind.__name__, **fields}, default=_number)
            record: dict[str, Any] = json.loads(text)
            return record
        return {"kind": "linen", "class": f"{kind.__module__}.{kind.__qualname__}"}


def _number(value: Any) -> Any:
    return np.asarray(value).item()


def _parts(network: Any) -> _Parts:
    """The parts of a network, whoever of the library has made it."""
    function = getattr(network, "func", None)
    function = getattr(function, "fun", function)
    if isinstance(function, _LinenLogits):
        return _Parts(function.model, network.args[0])
    if isinstance(function, _Evaluation):
        apply_fn = getattr(function.apply_fn, "fun", function.apply_fn)
        if isinstance(apply_fn, _LinenApply):
            params, model_state = network.args
            return _Parts(apply_fn.model, {"params": params, **model_state})
    return _Parts(None, network)


def _blank(folder: epath.Path, config: Mapping[str, Any], model: Any) -> _Parts:
    """The parts of the configuration's network, or of the user's own; the weights are any."""
    record = dict(config["network"])
    if model is not None and not jax.tree_util.all_leaves([model]):
        return _parts(nets.callable_logits_fn(model))
    if model is None:
        kind = record.pop("kind")
        if kind not in _NETWORKS:
            what = f"a module {record['class']}" if kind == "linen" else "no Linen module"
            raise ValueError(
                f"expected the model of {folder}, which is {what}, got None; pass it as load(path, "
                "model): a Linen module, or any other network, whose weights are replaced"
            )
        fields = {
            name: _FUNCTIONS.get(held, held) if isinstance(held, str) else held
            for name, held in record.items()
        }
        try:
            model = _NETWORKS[kind](**fields)
        except TypeError as error:
            raise ValueError(
                f"expected the fields of {kind}, got {', '.join(fields)} in {folder} ({error}); "
                f"install jdistill {config['versions']['jdistill']} or newer"
            ) from error
    else:
        nets.apply_fn(model)  # says so, where it is no module
        held = _Parts(model, None).record()
        if record["kind"] in _NETWORKS and held != record:
            different = _fingerprint.differences(held["kind"], record["kind"], "kind")
            different = different or _fingerprint.differences(held, record)
            raise ValueError(
                f"expected the model that was written to {folder}, got one with "
                f"{'; '.join(different)}; leave the model out"
            )
    key, shape = jax.random.key(0), config["input_shape"]
    params, model_state = jax.eval_shape(lambda: nets.init(model, key, shape))
    return _Parts(model, {"params": params, **model_state})


def _portable(network: Any) -> Any:
    """The network by the operations of JAX itself.

    The library's convolution for CPUs asks more of the batch's size than a symbol tells.
    """
    parts = _parts(network)
    if hasattr(parts.model, "conv_general_dilated"):
        plain = parts.model.clone(conv_general_dilated=jax.lax.conv_general_dilated)
        return nets.logits_fn(plain, parts.weights)
    if isinstance(network, Partial):  # it may hold a network, as `nets.with_temperature` does
        return Partial(network.func, *map(_portable, network.args), **network.keywords)
    return network


def _named(tree: PyTree) -> dict[str, Any]:
    """The leaves by their paths, as `params/conv_0_0/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = jax.tree_util.keystr
    named = {name(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError(
            "expected weights whose paths differ, got two that are written alike; give them names "
            "without '/'"
        )
    return named


def _filled(tree: PyTree, weights: Mapping[str, Any], folder: Any) -> PyTree:
    """The tree with these weights as its leaves."""

    def described(shapes: Mapping[str, Any]) -> dict[str, str]:
        return {name: str(list(np.shape(each))) for name, each in shapes.items()}

    named = _named(tree)
    raw = {name: jax.eval_shape(_raw, leaf) for name, leaf in named.items()}
    there, here = described(weights), described(raw)
    if there != here:
        different = [
            f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
            for name in {**here, **there}
            if there.get(name) != here.get(name)
        ]
        more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
        raise ValueError(
            f"expected a model with the weights of {folder}, got another one: "
            f"{'; '.join(different[:3])}{more}; pass the model that was written"
        )
    leaves = [_as_leaf(weights[name], leaf) for name, leaf in named.items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _raw(leaf: Any) -> Array:
    """A leaf as an array of numbers: of a PRNG key, which a module's dropout may hold, its data."""
    return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)


def _as_leaf(value: Any, like: Any) -> Any:
    if _is_key(like):
        return jax.random.wrap_key_data(value, impl=jax.random.key_impl(like))
    return jnp.asarray(value)


def _bits(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.isbuiltin == 1 else array.view(f"u{array.dtype.itemsize}")


def _probe(shape: Sequence[int], bounds: Any) -> np.ndarray:
    """Two inputs within the bounds, the same everywhere: `[2, ...]`, of a low-discrepancy row."""
    low, high = (np.asarray(end, float) for end in bounds)
    low = np.where(np.isfinite(low), low, np.where(np.isfinite(high), high - 1.0, -1.0))
    high = np.where(np.isfinite(high), high, low + 1.0)
    shares = np.arange(2 * math.prod(shape)) * 0.6180339887498949 % 1.0
    return (low + shares.reshape(2, *shape) * (high - low)).astype(np.float32)


def _logits_of_probe(network: Any, shape: Sequence[int], bounds: Any) -> np.ndarray:
    inputs = jnp.asarray(_probe(shape, bounds))
    _jax.logits_shape(network, inputs)
    with _jax.full_precision():
        return np.asarray(_jax.call(network, inputs))


def _check_probe(network: Any, folder: epath.Path, config: Mapping[str, Any]) -> None:
    """The network gives the logits that were written."""
    logits = _logits_of_probe(network, config["input_shape"], config["bounds"])
    expected = np.asarray(config["probe_logits"])
    tolerance = max(_TOLERANCE, 8 * float(jnp.finfo(logits.dtype).eps))
    size = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    same = logits.shape == expected.shape
    if not same or not np.allclose(logits.astype(float), expected, rtol=0, atol=tolerance * size):
        raise ValueError(
            f"expected the logits that {folder / 'config.json'} holds for two fixed inputs, such "
            f"as {expected[0, :3]}, got {logits[0, :3]}; pass the model that was written, or use "
            f"the versions that wrote it, jdistill {config['versions']['jdistill']} and JAX "
            f"{config['versions']['jax']}"
        )


def _check_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401
    except ImportError:
        raise ImportError(
            "expected the package flatbuffers, with which JAX reads and writes programs, got none; "
            "run pip install 'jdistill[export]', or use save(..., stablehlo=False) and load"
        ) from None


def _export(parts: _Parts, shape: tuple[int, ...]) -> tuple[bytes, int]:
    """The program of weights by name and inputs, with its gradient; its calling convention."""
    _check_flatbuffers()
    weights = {name: jax.eval_shape(_raw, leaf) for name, leaf in _named(parts.weights).items()}

    def logits(weights: dict[str, Array], inputs: Array) -> Array:
        network = parts.network(_filled(parts.weights, weights, "the network"))
        out: Array = nets.fast_on_cpu(_portable(network), enabled=False)(inputs)
        return out

    try:
        (size,) = jax_export.symbolic_shape("b")
        inputs = jax.ShapeDtypeStruct((size, *shape), jnp.float32)
        with _jax.full_precision(), _without_source_paths():
            exported = jax_export.export(jax.jit(logits), platforms=_PLATFORMS)(weights, inputs)
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


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _checksum(config: Mapping[str, Any]) -> str:
    """Of all that a configuration says."""
    rest = {name: value for name, value in config.items() if name != "sha256"}
    return _sha256(json.dumps(rest, sort_keys=True).encode())


def _write(folder: epath.Path, config: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """The configuration last: with it a folder is an export, and without it none."""
    (folder / "config.json").unlink(missing_ok=True)
    for name, data in files.items():
        if data:
            _files.write_whole(folder / name, data)
        else:
            (folder / name).unlink(missing_ok=True)
    _files.write_whole(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def _check_free(folder: epath.Path) -> None:
    """No other configuration, such as a study's, would be overwritten."""
    place = folder / "config.json"
    try:
        is_export = "probe_logits" in json.loads(place.read_bytes())
    except FileNotFoundError:
        return
    except ValueError:
        is_export = False
    if not is_export:
        raise ValueError(
            f"expected a folder for an export alone, got {folder}, whose config.json is of another "
            "kind; choose another folder, or delete that file"
        )


def _read_config(path: PathLike) -> tuple[epath.Path, dict[str, Any]]:
    folder = _files.as_path(path)
    place = folder / "config.json"
    try:
        text = place.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"expected the folder of an export, got {folder}, which has no config.json; check the "
            "path, or write one with export.save"
        ) from None
    try:
        config = json.loads(text)
    except ValueError:
        raise _damaged(place, "no JSON") from None
    number = config.get("format") if isinstance(config, dict) else None
    if number is None:
        raise ValueError(
            f"expected the configuration of an export, got another one in {place}; pass the folder "
            "that export.save wrote"
        )
    if number != _FORMAT:
        raise ValueError(
            f"expected an export of format {_FORMAT}, got {number!r} in {place}; install a version "
            "of jdistill that knows it"
        )
    if config.get("sha256") != _checksum(config):
        raise _damaged(place, "another content than its checksum says")
    return folder, config


def _read_file(folder: epath.Path, record: Mapping[str, Any]) -> bytes:
    place = folder / record["file"]
    try:
        data = place.read_bytes()
    except FileNotFoundError:
        raise _damaged(place, "no file") from None
    if _sha256(data) != record["sha256"]:
        raise _damaged(place, "another content than its checksum in config.json says")
    return data


def _read_weights(folder: epath.Path, config: Mapping[str, Any]) -> dict[str, Array]:
    record = config["weights"]
    data = _read_file(folder, record)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as held:
            return {
                name: jnp.asarray(held[name].view(jnp.dtype(spec["dtype"])))
                for name, spec in record["arrays"].items()
            }
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise _damaged(folder / record["file"], f"unreadable content ({error})") from error


def _program_of(folder: epath.Path, config: Mapping[str, Any]) -> Any:
    if config["program"] is None:
        raise ValueError(
            f"expected an export with a program, got {folder}, which was written with "
            "stablehlo=False; use export.load"
        )
    return config["program"]


def _damaged(place: epath.Path, what: str) -> ValueError:
    return ValueError(
        f"expected {place} as export.save wrote it, got {what}: the file is damaged; copy the "
        "whole folder again, or write it again with export.save"
    )
