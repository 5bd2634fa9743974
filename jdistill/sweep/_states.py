"""Stacks of states, and what has one number a run."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jdistill import _validate, nets, train
from jdistill.train import TrainState, TrainStep
from jdistill.train._step import check_hyperparams, check_step
from jdistill.typing import Array, ArrayLike, PyTree


def create_state(
    step: TrainStep,
    params: PyTree,
    keys: Array,
    *,
    model_state: PyTree | None = None,
    hyperparams: Mapping[str, ArrayLike] | None = None,
) -> TrainState:
    """A stack of states at step 0, each with a fresh optimizer.

    Args:
        step: whose optimizer starts.
        params: the initial weights, every leaf `[R, ...]` (`nets.stack`).
        keys: `[R]` PRNG keys, one a run; equal keys visit the examples in one order.
        model_state: every leaf `[R, ...]`; None is `{}`.
        hyperparams: as in `train.create_state`; each a scalar or `[R]`, one number a run.

    Returns:
        The stack, every leaf `[R, ...]`.

    Raises:
        ValueError: as `train.create_state`; or shapes that do not fit `[R]`.

    Example:
        >>> from jdistill import nets, sweep, train
        >>> model = nets.digits_net(width=0.25)
        >>> step = train.make_train_step(nets.apply_fn(model), train.sgd(0.1))
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> params, _ = jax.vmap(lambda key: nets.init(model, key, (8, 8, 1)))(keys)
        >>> state = sweep.create_state(step, params, keys, hyperparams={"learning_rate": 0.2})
        >>> state.step.tolist()
        [0, 0, 0]
    """
    keys = checked_keys(keys)
    num_runs = len(keys)
    check_step(step)
    _validate.arrays(params=params)
    if hyperparams is not None:
        _validate.mapping(hyperparams=hyperparams)
    if model_state:
        _validate.arrays(model_state=model_state)
    for name, tree in (("params", params), ("model_state", model_state)):
        check_runs(tree, num_runs, name)
    numbers = {name: spread(value, num_runs, name) for name, value in (hyperparams or {}).items()}
    # For the errors, which a number that is traced cannot raise.
    check_hyperparams(numbers)
    first = {name: values[0] for name, values in numbers.items()}
    train.create_state(step, nets.index(params, 0), keys[0], hyperparams=first)

    def one(params: PyTree, key: Array, model_state: PyTree, values: PyTree) -> TrainState:
        return train.create_state(
            step, params, key, model_state=model_state, hyperparams=values or None
        )

    return jax.vmap(one)(params, keys, {} if model_state is None else model_state, numbers)


def check_runs(tree: PyTree, num_runs: int, name: str) -> None:
    """An error for a tree whose leaves do not lead with `[R]`."""
    shapes = [np.shape(leaf) for leaf in jax.tree.leaves(tree)]
    if any(shape[:1] != (num_runs,) for shape in shapes):
        raise ValueError(
            f"expected {name} of R = {num_runs} runs, one a key, got leaves of shapes {shapes}; "
            "every leaf leads with [R]: pass nets.stack([...])"
        )


def checked_keys(keys: Any) -> Array:
    """One key a run, `[R]`."""
    keys = _validate.prng_key(keys)
    if keys.ndim != 1:
        raise ValueError(
            f"expected keys of shape [R], one a run, got shape {keys.shape}; "
            "pass jax.random.split(key, R) or jax.vmap(jax.random.key)(seeds)"
        )
    return keys


def spread(value: ArrayLike, num_runs: int, name: str) -> np.ndarray:
    """A number a run, `[R]`."""
    values = _validate.numbers(**{name: value})
    if values.shape not in ((), (num_runs,)):
        raise ValueError(
            f"expected {name} to be a scalar or of shape [R] = ({num_runs},), got shape "
            f"{values.shape}; pass one number, or one per run"
        )
    return np.broadcast_to(values, (num_runs,)).astype(np.float32)
