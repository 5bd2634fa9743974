"""The three steps that everything here consists of, as functions and the shapes of their arguments.

For programs that look at a step without running it: the TPU compiler's view, the roofline.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdistill import losses, nets, norms, sweep, train
from jdistill.typing import Array, Batch, LossFn, Metrics


class Step(NamedTuple):
    """A function to compile.

    Attributes:
        call: the step.
        arguments: pytrees of `jax.ShapeDtypeStruct`.
    """

    call: Callable[..., Any]
    arguments: tuple[Any, ...]


def training(model: nets.ConvNet, input_shape: tuple[int, ...], batch_size: int) -> Step:
    """The step of `train.fit`: dropout on, SGD with Nesterov momentum."""
    step = _train_step(model)

    def state(key: Array) -> train.TrainState:
        return train.create_state(step, nets.init(model, key, input_shape)[0], key)

    def call(
        state: train.TrainState, batch: Batch, loss_fn: LossFn
    ) -> tuple[train.TrainState, Metrics]:
        return step(state, batch, loss_fn)

    shapes = jax.eval_shape(state, jax.random.key(0))
    return Step(call, (shapes, _batch(input_shape, batch_size), _shapes(train.hard_loss())))


def sweeping(
    model: nets.ConvNet, input_shape: tuple[int, ...], batch_size: int, num_runs: int
) -> Step:
    """The same of many runs under `vmap`, as in `sweep.fit`: each has its own batch and T."""
    step = _train_step(model)

    def states(seeds: Array) -> train.TrainState:
        keys = jax.vmap(jax.random.key)(seeds)
        params = jax.vmap(lambda key: nets.init(model, key, input_shape)[0])(keys)
        return sweep.create_state(step, params, keys)

    seeds = jax.ShapeDtypeStruct((num_runs,), jnp.uint32)
    stacked = (
        jax.eval_shape(states, seeds),
        *_stacked((_batch(input_shape, batch_size), _shapes(train.hard_loss())), num_runs),
    )

    def call(*arguments: Any) -> Any:
        return jax.vmap(step)(*arguments)

    return Step(call, stacked)


def ascending(
    model: nets.ConvNet,
    input_shape: tuple[int, ...],
    batch_size: int,
    precision: str = "highest",
) -> Step:
    """A step of PGD in an L-infinity ball: gradient, sign step, into ball and box.

    Args:
        model: the network.
        input_shape: of one image.
        batch_size: images.
        precision: of matrix products; attacks have `"highest"`; `"default"` is the device's own.
    """

    def call(variables: Any, images: Array, inputs: Array, labels: Array, eps: Array) -> Array:
        def total(images: Array) -> Array:
            logits: Any = model.apply(variables, images)
            return jnp.sum(losses.cross_entropy(logits, labels))

        with jax.default_matmul_precision(precision):
            gradient = jax.grad(total)(images)
        bounds = (jnp.zeros(()), jnp.ones(()))
        moved = norms.ascend(images, gradient, eps / 4, "linf", bounds)
        return norms.into_ball_and_box(moved, inputs, eps, "linf", bounds)

    params, _ = jax.eval_shape(lambda key: nets.init(model, key, input_shape), jax.random.key(0))
    batch = _batch(input_shape, batch_size)
    eps = jax.ShapeDtypeStruct((batch_size,), jnp.float32)
    return Step(call, ({"params": params}, batch.inputs, batch.inputs, batch.labels, eps))


def _train_step(model: nets.ConvNet) -> train.TrainStep:
    # A network with another convolution is there to be looked at as it is.
    own = model.conv_general_dilated is nets.conv_general_dilated
    return train.make_train_step(
        nets.fast_on_cpu(nets.apply_fn(model), enabled=own), train.sgd(0.01)
    )


def _batch(input_shape: tuple[int, ...], batch_size: int) -> Batch:
    return Batch(
        jax.ShapeDtypeStruct((batch_size, *input_shape), jnp.float32),
        jax.ShapeDtypeStruct((batch_size,), jnp.int32),
        None,
        jax.ShapeDtypeStruct((batch_size,), jnp.float32),
    )


def _shapes(tree: Any) -> Any:
    return jax.eval_shape(lambda: tree)


def _stacked(tree: Any, num_runs: int) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct((num_runs, *leaf.shape), leaf.dtype), tree
    )
