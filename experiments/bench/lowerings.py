"""Steps that everything here consists of, written one way and another, to look at and not to run.

A step is a function to compile and the shapes of its arguments.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.bench.networks import plain_net
from jdistill import losses, nets, norms, sweep, train
from jdistill.typing import ApplyFn, Array, Batch, PyTree

StepName = Literal["training", "sweep", "pgd"]


class Step(NamedTuple):
    """Function to compile, and pytrees of `jax.ShapeDtypeStruct`."""

    call: Callable[..., Any]
    arguments: tuple[Any, ...]


class Written(NamedTuple):
    """Network as training takes it, and as `(variables, inputs) -> logits` for attacks."""

    model: nn.Module
    apply_fn: ApplyFn
    logits: Callable[[PyTree, Array], Any]


class Lowering(NamedTuple):
    """Way to write a step.

    Attributes:
        name: as in the table.
        write: gives the network, out of the library's.
        precision: of an attack's products.
    """

    name: str
    write: Callable[[nets.ConvNet], Written]
    precision: str = "highest"


def by_library(model: nn.Module) -> Written:
    """Network by the library's adapters, with whatever rules these bring."""
    return Written(model, nets.apply_fn(model), lambda v, x: nets.logits_fn(model, v)(x))


def by_flax(model: nn.Module) -> Written:
    """Network by Flax alone."""

    def apply_fn(params: PyTree, model_state: PyTree, inputs: Array, /, **mode: Any) -> Any:
        return model.apply({"params": params}, inputs), model_state

    return Written(model, nets.fast_on_cpu(apply_fn, enabled=False), model.apply)


def patches_convolution(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: Any,
    *,
    precision: Any = None,
    **options: Any,
) -> Array:
    """A 'valid' convolution without strides as shifted inputs side by side times the weights.

    Under `vmap` over weights that is a batched product, where XLA's convolution is a grouped one.
    """
    del window_strides, padding, options
    rows, columns, _, features = rhs.shape
    height, width = lhs.shape[1] - rows + 1, lhs.shape[2] - columns + 1
    patches = [
        lhs[:, row : row + height, column : column + width]
        for row in range(rows)
        for column in range(columns)
    ]
    kernel = jnp.reshape(rhs, (-1, features))
    return jnp.matmul(jnp.concatenate(patches, axis=-1), kernel, precision=precision)


def _xla(model: nets.ConvNet) -> Written:
    return by_flax(plain_net(model))


def _patches(model: nets.ConvNet) -> Written:
    return by_flax(plain_net(model, conv_general_dilated=patches_convolution))


# The first is what the others are compared with.
LOWERINGS = (
    Lowering("XLA's convolution and pooling", _xla),
    Lowering("jdistill's, as it is", by_library),
    Lowering("patches × weights", _patches),
)
PRECISIONS = (
    Lowering("XLA's, precision high (3 bfloat16 products)", _xla, "high"),
    Lowering("XLA's, precision default (1 bfloat16 product)", _xla, "default"),
)


def step(
    name: StepName, lowering: Lowering, *, width: float, batch_size: int, num_runs: int
) -> Step:
    """Step of the papers' MNIST network, without dropout, written that way."""
    network = lowering.write(nets.mnist_net(width=width, dropout_rate=0.0))
    sizes = ((28, 28, 1), batch_size)
    if name == "pgd":
        return ascending(network, *sizes, lowering.precision)
    return training(network, *sizes) if name == "training" else sweeping(network, *sizes, num_runs)


def training(network: Written, input_shape: tuple[int, ...], batch_size: int) -> Step:
    """Step of `train.fit`: SGD with Nesterov momentum."""
    step = train.make_train_step(network.apply_fn, train.sgd(0.01))

    def state(key: Array) -> train.TrainState:
        return train.create_state(step, nets.init(network.model, key, input_shape)[0], key)

    shapes = jax.eval_shape(state, jax.random.key(0)), _batch(input_shape, batch_size)
    return Step(step, (*shapes, jax.eval_shape(train.hard_loss)))


def sweeping(
    network: Written, input_shape: tuple[int, ...], batch_size: int, num_runs: int
) -> Step:
    """Training step of many runs under `vmap`, as in `sweep.fit`: each has its own batch and T."""
    step = train.make_train_step(network.apply_fn, train.sgd(0.01))
    _, *others = training(network, input_shape, batch_size).arguments

    def states(seeds: Array) -> train.TrainState:
        keys = jax.vmap(jax.random.key)(seeds)
        params = jax.vmap(lambda key: nets.init(network.model, key, input_shape)[0])(keys)
        return sweep.create_state(step, params, keys)

    stacked = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((num_runs, *leaf.shape), leaf.dtype), others
    )
    seeds = jax.ShapeDtypeStruct((num_runs,), jnp.uint32)
    return Step(jax.vmap(step), (jax.eval_shape(states, seeds), *stacked))


def ascending(
    network: Written, input_shape: tuple[int, ...], batch_size: int, precision: str = "highest"
) -> Step:
    """Step of PGD in an L-infinity ball: gradient, sign step, into ball and box.

    Args:
        network: the network.
        input_shape: of one image.
        batch_size: images.
        precision: of matrix products; attacks have `"highest"`; `"default"` is the device's own.
    """

    def call(variables: Any, images: Array, inputs: Array, labels: Array, eps: Array) -> Array:
        def total(images: Array) -> Array:
            return jnp.sum(losses.cross_entropy(network.logits(variables, images), labels))

        with jax.default_matmul_precision(precision):
            gradient = jax.grad(total)(images)
        bounds = (jnp.zeros(()), jnp.ones(()))
        moved = norms.ascend(images, gradient, eps / 4, "linf", bounds)
        return norms.into_ball_and_box(moved, inputs, eps, "linf", bounds)

    draw = functools.partial(nets.init, network.model, input_shape=input_shape)
    params, _ = jax.eval_shape(lambda key: draw(key=key), jax.random.key(0))
    batch = _batch(input_shape, batch_size)
    return Step(call, ({"params": params}, batch.inputs, batch.inputs, batch.labels, batch.mask))


def _batch(input_shape: tuple[int, ...], batch_size: int) -> Batch:
    numbers = jax.ShapeDtypeStruct((batch_size,), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return Batch(
        jax.ShapeDtypeStruct((batch_size, *input_shape), jnp.float32), labels, None, numbers
    )
