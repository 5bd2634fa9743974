"""Networks and images of the bench: weights of its own, trained once, or files of the user's.

The data are scikit-learn's handwritten digits, enlarged to any size: real images, the same on every
machine, with nothing to download. A network learns them in a few epochs; its weights are kept in
the cache (`JDISTILL_CACHE`, else `jdistill` in the user's), under a name that says by what recipe.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import pathlib
import sys
import zipfile
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.bench.options import NetworkOptions
from jdistill import data, metrics, nets, runtime, train
from jdistill.typing import LogitsFn

Params = Mapping[str, Any]
# Shuffled batches of 64, Adam at 0.002: the papers' network gets 97.5% of the unseen right.
RECIPE = {"num_epochs": 8, "batch_size": 64, "learning_rate": 0.002, "seed": 0}


class Images(NamedTuple):
    """Images `[N, H, W, C]` in [0, 1], and their labels `[N]`."""

    inputs: np.ndarray
    labels: np.ndarray


class Digits(NamedTuple):
    """Digits at some size.

    Attributes:
        learned: the images that networks are trained on.
        all: these and the others, the others first.
    """

    learned: Images
    all: Images


def digits(input_shape: tuple[int, int, int]) -> Digits:
    """Digits enlarged bilinearly, with all channels alike.

    Args:
        input_shape: of one image, `[H, W, C]`.
    """
    from scipy import ndimage

    def enlarged(split: data.Split) -> np.ndarray:
        height, width, channels = input_shape
        zoom = (1, height / split.inputs.shape[1], width / split.inputs.shape[2], 1)
        large = np.clip(ndimage.zoom(split.inputs, zoom, order=1), 0, 1)
        return np.repeat(large, channels, axis=-1)

    there = data.load("digits")
    splits = [
        Images(enlarged(split), split.labels)
        for split in (there.test, there.validation, there.train)
    ]
    return Digits(
        splits[-1], Images(*(np.concatenate(column) for column in zip(*splits, strict=True)))
    )


def trained(
    name: str, model: nn.Module, input_shape: tuple[int, int, int], **recipe: Any
) -> dict[str, Any]:
    """Variables of a network that has learned the digits, from the cache where they are there.

    Args:
        name: of the file, such as the architecture's.
        model: a Linen module.
        input_shape: of one image, `[H, W, C]`.
        **recipe: of `RECIPE`, what differs.
    """
    chosen = RECIPE | recipe
    one = jax.ShapeDtypeStruct((1, *input_shape), np.float32)
    drawn = jax.eval_shape(model.init, jax.random.key(0), one)
    shapes = {name: leaf.shape for name, leaf in flatten_dict(drawn, sep="/").items()}
    made_by = json.dumps([shapes, chosen], sort_keys=True).encode()
    digest = hashlib.blake2b(made_by, digest_size=8).hexdigest()
    path = cache_folder() / f"{name}-{digest}.npz"
    with contextlib.suppress(FileNotFoundError, ValueError):  # none, or a damaged one
        flat = _arrays(path)
        if {key: value.shape for key, value in flat.items()} == shapes:
            return unflatten_dict(flat, sep="/")
    print(f"training {name} on the digits, once; kept in {path}", file=sys.stderr)
    variables = _learn(model, digits(input_shape).learned, chosen)
    stream = io.BytesIO()
    np.savez(stream, **flatten_dict(variables, sep="/"))
    path.parent.mkdir(parents=True, exist_ok=True)
    runtime.atomic_write(path, stream.getvalue())
    return variables


def cache_folder() -> pathlib.Path:
    """Folder of the trained weights."""
    users = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "jdistill"
    return pathlib.Path(os.environ.get("JDISTILL_CACHE") or users).expanduser() / "bench"


def load(options: NetworkOptions) -> tuple[Params, Images]:
    """Weights of a `nets.ConvNet` and images, of the bench's own or of the options' files."""
    images = digits((28, 28, 1)).all if options.images is None else read_images(options.images)
    if options.network is not None:
        return read_params(options.network), images
    model = nets.mnist_net(width=options.width)
    return trained(f"mnist_net-{options.width:g}", model, (28, 28, 1))["params"], images


def read_params(path: str | os.PathLike) -> Params:
    """Weights of a `nets.ConvNet`, layer by layer, of a file with an array per `layer/kind`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    return unflatten_dict(_arrays(path), sep="/")


def read_images(path: str | os.PathLike) -> Images:
    """Images in [0, 1] and labels, of a file that has the inputs as uint8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    arrays = _arrays(path)
    inputs, labels = (arrays.get(name, np.zeros(())) for name in Images._fields)
    if inputs.dtype != np.uint8 or inputs.ndim != 4 or labels.shape != inputs.shape[:1]:
        raise ValueError(
            "expected inputs [N, H, W, C] (uint8) and labels [N], "
            f"got {_listed(arrays)} in {os.fspath(path)}; write such a file with np.savez"
        )
    return Images(inputs.astype(np.float32) / 255, labels.astype(np.int32))


def correct_images(logits_fn: LogitsFn, images: Images, count: int) -> Images:
    """First `count` images that the network classifies correctly.

    Toolkits differ in what they do with an image that is wrong to begin with.

    Raises:
        ValueError: the images are too few.
    """
    logits = train.predict(logits_fn, images.inputs, batch_size=min(512, len(images.labels)))
    (right,) = np.nonzero(metrics.correct(logits, images.labels))
    if len(right) < count:
        raise ValueError(
            f"expected batch_size <= {len(right)}, which is how many of the images the network "
            f"classifies correctly, got {count}; pass a smaller one, or more images"
        )
    return Images(images.inputs[right[:count]], images.labels[right[:count]])


def conv_net(params: Params, input_shape: tuple[int, ...]) -> nets.ConvNet:
    """Network that has these weights.

    Args:
        params: layer by layer.
        input_shape: of one image, `[H, W, C]`.

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
    wanted, _ = jax.eval_shape(lambda key: nets.init(model, key, input_shape), jax.random.key(0))
    if jax.tree.map(np.shape, dict(params)) != jax.tree.map(np.shape, wanted):
        raise ValueError(
            f"expected the weights of a nets.ConvNet for inputs of shape {input_shape}, "
            f"got {_listed(flatten_dict(params, sep='/'))}; pass the file of such a network"
        )
    return model


def logits_fn(params: Params, input_shape: tuple[int, ...]) -> LogitsFn:
    """Network of these weights as attacks take it."""
    variables = {"params": jax.tree.map(jnp.asarray, params)}
    return nets.logits_fn(conv_net(params, input_shape), variables)


def _learn(model: nn.Module, images: Images, recipe: Mapping[str, Any]) -> dict[str, Any]:
    key = jax.random.key(recipe["seed"])
    step = train.make_train_step(nets.apply_fn(model), optax.adam(recipe["learning_rate"]))
    # Not `nets.init`, which compiles for minutes where there are as many layers as in a ResNet.
    model_state = dict(jax.jit(model.init)(key, images.inputs[:1]))
    params = model_state.pop("params")
    sizes = {name: recipe[name] for name in ("num_epochs", "batch_size")}
    state = train.fit(
        step,
        train.create_state(step, params, key, model_state=model_state),
        (images.inputs, images.labels),
        train.hard_loss(),
        devices=jax.devices()[:1],
        **sizes,
    )
    return jax.device_get({"params": state.params, **state.model_state})


def _arrays(path: str | os.PathLike) -> dict[str, np.ndarray]:
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"expected an .npz file, got no such file: {os.fspath(path)}; check the path"
        )
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile):
        raise ValueError(
            f"expected an .npz file of arrays, got something else in {os.fspath(path)}; write one "
            "with np.savez"
        ) from None


def _listed(arrays: Mapping[str, np.ndarray]) -> str:
    """Names, types and shapes of the first arrays, for an error message."""
    shown = [f"{name} {value.dtype}{list(value.shape)}" for name, value in arrays.items()]
    return ", ".join(shown[:4]) + (", …" if len(shown) > 4 else "") or "no arrays"
