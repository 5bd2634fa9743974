"""Writing an export."""

import importlib.metadata
import io
import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

import jdistill
from jdistill import _files, _validate, nets
from jdistill._files import PathLike
from jdistill.export import _folder, _network, _probe, _program
from jdistill.export._load import window
from jdistill.typing import LogitsFn

_log = logging.getLogger("jdistill")


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

    The library's own networks (`nets.ConvNet`, `nets.ResNet`, `nets.ViT`, and so on) are read back
    from the folder alone. Of any other network the weights are written under their paths, and
    `load` takes the network itself as `model`; the program needs neither.

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
        >>> from jdistill import export, nets
        >>> model = nets.digits_net(width=0.25)
        >>> params, model_state = nets.init(model, jax.random.key(0), (8, 8, 1))
        >>> student = nets.logits_fn(model, {"params": params, **model_state})
        >>> folder = export.save(tempfile.mkdtemp(), student, input_shape=(8, 8, 1))
        >>> sorted(file.name for file in folder.iterdir())
        ['config.json', 'model.stablehlo', 'weights.npz']
        >>> inputs = np.ones((3, 8, 8, 1), np.float32)
        >>> bool((export.load(folder)(inputs) == student(inputs)).all())
        True
    """
    folder = _files.as_path(path)
    shape = _validate.shape(input_shape=input_shape)
    low, high = _validate.bounds(bounds, shape, open_box=True)
    _validate.flag(stablehlo=stablehlo)
    _folder.check_free(folder)
    network = nets.callable_logits_fn(logits_fn)
    parts = _network.parts(network)
    leaves = _network.named(parts.weights)
    weights = {name: np.asarray(_network.raw(leaf)) for name, leaf in leaves.items()}
    if not weights:
        raise ValueError(
            "expected a network whose weights are leaves of its pytree, got one without any; pass "
            "nets.callable_logits_fn(function, weights)"
        )
    logits = _probe.logits(network, shape, (low, high))
    if np.isnan(logits).any():
        raise ValueError(
            "expected a network with finite logits, got NaN for inputs within its bounds; export "
            "one whose training has not diverged"
        )
    program, convention = _program.written(parts, shape) if stablehlo else (b"", 0)
    stream = io.BytesIO()
    # What NumPy knows by an extension alone, such as bfloat16, is written as its bits.
    np.savez(stream, **{name: _bits(array) for name, array in weights.items()})  # type: ignore[arg-type]
    config: dict[str, Any] = {
        "format": _folder.FORMAT,
        "network": parts.record(),
        "input_shape": shape,
        "dtype": "float32",
        "bounds": [np.asarray(end).tolist() for end in (low, high)],
        "num_classes": logits.shape[1],
        "probe_logits": logits.astype(float).tolist(),
        "weights": {
            "file": "weights.npz",
            "sha256": _folder.sha256(stream.getvalue()),
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
            "sha256": _folder.sha256(program),
            "arguments": "weights by name, then inputs",
            "platforms": _program.PLATFORMS,
            "calling_convention_version": convention,
            "window": "JAX up to 6 months newer and up to 3 weeks older than the one of `versions`",
        }
    config["sha256"] = _folder.checksum(config)
    if jax.process_index() == 0:
        _folder.write(
            folder, config, {"weights.npz": stream.getvalue(), "model.stablehlo": program}
        )
        _log.info("wrote %s", window(folder) if stablehlo else folder)
    return folder


def _bits(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.isbuiltin == 1 else array.view(f"u{array.dtype.itemsize}")
