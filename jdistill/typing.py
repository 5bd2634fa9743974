"""Types and the contracts of the callables that users pass in and get back.

Axis letters, used in every docstring of the library:

* `B`: examples in a batch (`N`: examples in a whole set);
* `K`: classes;
* `R`: stacked runs (temperatures, seeds, generations);
* `...`: the axes of one input (`H, W, C` for images).
"""

from typing import Any, Literal, NamedTuple, Protocol, Required, TypedDict

import jax
import numpy as np

__all__ = [
    "AnyArray",
    "ApplyFn",
    "Array",
    "ArrayLike",
    "AttackFn",
    "Batch",
    "Bounds",
    "Callback",
    "Event",
    "LogitsFn",
    "LossFn",
    "Metrics",
    "Norm",
    "PyTree",
    "StepFn",
]

#: Array of JAX, `jax.Array`: what the library's functions return.
Array = jax.Array
#: Array of JAX or NumPy: what functions take that return an `Array`.
AnyArray = jax.Array | np.ndarray
#: Array, or number that JAX makes one of.
ArrayLike = jax.typing.ArrayLike
#: Name of a norm.
Norm = Literal["linf", "l2", "l1", "l0"]
#: Any nesting of tuples, lists, dictionaries, and registered classes whose leaves are arrays.
PyTree = Any
#: Valid values of one input, `(low, high)`: numbers, or arrays that broadcast against the input.
Bounds = tuple[ArrayLike, ArrayLike]
#: Measures by their names.
Metrics = dict[str, Array]


class Batch(NamedTuple):
    """One batch of examples; padded rows carry `mask == 0` and count for nothing.

    Attributes:
        inputs: `[B, ...]` float, inside the data's bounds.
        labels: `[B]` int, the true classes.
        targets: `[B, K]` float, soft labels (rows sum to 1), or None.
        mask: `[B]` float, 1 for a real example and 0 for padding.
    """

    inputs: Any
    labels: Any
    targets: Any
    mask: Any


class LogitsFn(Protocol):
    """`inputs [B, ...] -> logits [B, K]`; pure, and each row depends on its own input alone.

    Pass a pytree that carries its weights (`jdistill.nets.logits_fn`), so that new weights
    compile nothing. A plain callable works too: it is static, so another function object means
    another compilation, and weights that it closes over are compiled in as constants.
    """

    def __call__(self, inputs: Array, /) -> Array: ...


class ApplyFn(Protocol):
    """A network as training sees it.

    `key` is None or holds one PRNG key per example, `[B]`: noise such as dropout must be drawn
    from the example's own key, so that it does not depend on how a batch is split over devices.
    Returns the outputs, logits `[B, K]` or a pytree with `logits` among its keys or attributes,
    and the new model state (batch statistics and the like; `{}` where there are none).
    """

    def __call__(
        self,
        params: PyTree,
        model_state: PyTree,
        inputs: Array,
        /,
        *,
        train: bool,
        key: Array | None,
    ) -> tuple[PyTree, PyTree]: ...


class LossFn(Protocol):
    """`(outputs, batch) -> loss [B]`, one value per example, never a mean.

    The outputs are logits `[B, K]`, or a pytree that holds them beside extras, such as features
    (`jdistill.nets.logits_of` takes them out).

    A pytree (`jax.tree_util.Partial`) that carries what may change without a recompilation:
    the temperature, the weights of its terms, an online teacher.
    """

    def __call__(self, outputs: PyTree, batch: Batch, /) -> Array: ...


class StepFn(Protocol):
    """`(state, batch, loss_fn) -> (state, metrics)`, one optimizer update; pure."""

    def __call__(self, state: Any, batch: Batch, loss_fn: LossFn, /) -> tuple[Any, Metrics]: ...


class AttackFn(Protocol):
    """`(logits_fn, key, inputs, labels) -> AttackResult`: an attack with its settings bound.

    Make one with `functools.partial(jdistill.attacks.pgd, eps=0.1, num_steps=40)`.
    """

    def __call__(
        self, logits_fn: LogitsFn, key: Array | None, inputs: ArrayLike, labels: ArrayLike, /
    ) -> Any: ...


class Event(TypedDict, total=False):
    """Event that a host loop of the library tells its callback.

    Attributes:
        event: what happened: a training `"step"`, an `"epoch"`, the end of a `"generation"`; or
            progress of `"evaluate"`, `"attack"`, `"diagnose"`, `"read"`, or a `"call"`.
        stage: of what, for people.
        done: examples, or epochs of a universal attack; of
        total: such.
        step: of `num_steps`, in training, or in the batch that an attack is at.
        epoch: of `num_epochs`, from 1.
        generation: 0 is the teacher.
        runs: the chunk of a sweep's runs that was trained.
        loss: mean of the epoch; in a sweep `[runs]`, as are
        accuracy: of the epoch, and
        diverged: which runs are no longer finite.
        attack: the attack's name; with
        survivors: how many examples no attack has beaten yet.
        state: to save, a `TrainState` (of a sweep the stack) or an `EnsembleState`.
        unit: what `done` counts, where that is not examples.
        run: of `num_runs` networks of a stack, from 0.
    """

    event: Required[
        Literal["step", "epoch", "generation", "evaluate", "attack", "diagnose", "read", "call"]
    ]
    stage: Required[str]
    done: int
    total: int
    step: int
    num_steps: int
    epoch: int
    num_epochs: int
    generation: int
    runs: slice
    loss: Any
    accuracy: Any
    diverged: np.ndarray
    attack: str
    survivors: int
    state: Any
    unit: str
    run: int
    num_runs: int


class Callback(Protocol):
    """Called by the library's host loops with one event; returns nothing.

    Callbacks are where experiments save, log and show progress: the library does none of that.
    """

    def __call__(self, event: Event, /) -> None: ...
