"""Networks and images of `.npz` files, for programs that need no run's workdir.

`tests/parity/make_networks.py` writes such files.
"""

import itertools
import os
import zipfile
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import metrics, nets
from jdistill.typing import LogitsFn

_REMEDY = "pass a file such as tests/parity/make_networks.py writes"
Params = dict[str, dict[str, np.ndarray]]


def read_params(path: str | os.PathLike) -> Params:
    """The weights of a `nets.ConvNet`, layer by layer, of a file with an array per `layer/kind`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    params: Params = {}
    for name, value in _arrays(path).items():
        layer, _, kind = name.partition("/")
        params.setdefault(layer, {})[kind] = value
    return params


def read_images(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Inputs `[N, H, W, C]` in [0, 1] and labels `[N]`, of a file that has the inputs as uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    arrays = _arrays(path)
    inputs, labels = arrays.get("inputs"), arrays.get("labels")
    if (
        inputs is None
        or labels is None
        or inputs.dtype != np.uint8
        or inputs.ndim != 4
        or labels.shape != inputs.shape[:1]
    ):
        raise ValueError(
            "expected inputs [N, H, W, C] (uint8) and labels [N], "
            f"got {_listed(arrays)} in {os.fspath(path)}; {_REMEDY}"
        )
    return inputs.astype(np.float32) / 255, labels.astype(np.int32)


def correct_images(
    logits_fn: LogitsFn, inputs: np.ndarray, labels: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` images that the network classifies correctly, and their labels.

    Raises:
        ValueError: the images are too few.
    """
    (right,) = np.nonzero(metrics.correct(logits_fn(jnp.asarray(inputs)), labels))
    if len(right) < count:
        raise ValueError(
            f"expected batch_size <= {len(right)}, which is how many of the images the network "
            f"classifies correctly, got {count}; pass a smaller one, or more images"
        )
    return inputs[right[:count]], labels[right[:count]]


def conv_net(
    params: Mapping[str, Mapping[str, np.ndarray]], shape: tuple[int, ...]
) -> nets.ConvNet:
    """The network that has these weights.

    Args:
        params: layer by layer.
        shape: of one input, `[H, W, C]`.

    Raises:
        ValueError: no `nets.ConvNet` has such weights for such inputs.
    """
    sizes = {layer: len(kinds["bias"]) for layer, kinds in params.items() if "bias" in kinds}

    def numbered(name: str) -> tuple[int, ...]:
        names = (f"{name}_{number}" for number in itertools.count())
        return tuple(sizes[name] for name in itertools.takewhile(sizes.__contains__, names))

    blocks = (numbered(f"conv_{block}") for block in itertools.count())
    model = nets.ConvNet(
        features=tuple(itertools.takewhile(len, blocks)),
        hidden=numbered("dense"),
        num_classes=sizes.get("logits", 1),
    )
    wanted, _ = jax.eval_shape(lambda key: nets.init(model, key, shape), jax.random.key(0))
    if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, wanted):
        flat = {
            f"{layer}/{kind}": v for layer, kinds in params.items() for kind, v in kinds.items()
        }
        raise ValueError(
            f"expected the weights of a nets.ConvNet for inputs of shape {shape}, "
            f"got {_listed(flat)}; {_REMEDY}"
        )
    return model


def _arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"expected an .npz file, got no such file: {os.fspath(path)}; {_REMEDY}"
        )
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile):
        raise ValueError(
            f"expected an .npz file of arrays, got something else in {os.fspath(path)}; {_REMEDY}"
        ) from None


def _listed(arrays: Mapping[str, np.ndarray]) -> str:
    """Names, types and shapes of the first arrays, for an error message."""
    shown = [f"{name} {value.dtype}{list(value.shape)}" for name, value in arrays.items()]
    return ", ".join(shown[:4]) + (", …" if len(shown) > 4 else "") or "no arrays"
