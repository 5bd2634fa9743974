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

    Example:
        >>> batch = Batch(np.zeros((4, 8, 8, 1)), np.arange(4), targets=None, mask=np.ones(4))
        >>> batch.inputs.shape, int(batch.mask.sum())
        ((4, 8, 8, 1), 4)
    """

    inputs: Any
    labels: Any
    targets: Any
    mask: Any


class LogitsFn(Protocol):
    """Network as attacks and measures take it: inputs to logits.

    It is pure, and each row of the logits depends on its own input alone.

    Pass a pytree that carries its weights (`jdistill.nets.logits_fn`), so that new weights
    compile nothing. A plain callable works too: it is static, so another function object means
    another compilation, and weights that it closes over are compiled in as constants.

    Args:
        inputs: `[B, ...]` float, inside the data's bounds.

    Returns:
        Logits `[B, K]` float.

    Example:
        >>> from jdistill import nets
        >>> logits_fn = nets.callable_logits_fn(lambda weights, x: x @ weights, np.eye(3))
        >>> logits_fn(np.ones((2, 3), np.float32)).shape
        (2, 3)
    """

    def __call__(self, inputs: Array, /) -> Array: ...


class ApplyFn(Protocol):
    """Network as training sees it: weights and inputs to outputs and the new model state.

    `jdistill.nets.apply_fn` makes one of a Flax Linen module, `jdistill.nets.nnx_model` one of an
    NNX module.

    Args:
        params: pytree of the weights, which the optimizer changes.
        model_state: pytree of what training changes otherwise, such as batch statistics; `{}` where
            there is none.
        inputs: `[B, ...]` float.
        train: True in training, where there is dropout and batch statistics are of the batch.
        key: None, or one PRNG key per example, `[B]`: noise such as dropout must be drawn from the
            example's own key, so that it does not depend on how a batch is split over devices.

    Returns:
        The outputs, logits `[B, K]` or a pytree with `logits` among its keys or attributes; and the
        new model state, of the structure of the old one.

    Example:
        >>> from jdistill import train
        >>> def linear(params, model_state, inputs, *, train, key):
        ...     return inputs @ params["weights"], model_state
        >>> step = train.make_train_step(linear, train.sgd(0.1))
        >>> state = train.create_state(step, {"weights": np.eye(3)}, jax.random.key(0))
        >>> train.logits_fn(step, state)(np.ones((2, 3))).shape
        (2, 3)
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
    """Loss as training takes it: one value per example, never a mean.

    It is a pytree (`jax.tree_util.Partial`) that carries what may change without a recompilation:
    the temperature, the weights of its terms, an online teacher.

    Args:
        outputs: logits `[B, K]`, or a pytree that holds them beside extras, such as features
            (`jdistill.nets.logits_of` takes them out).
        batch: the examples that they are of.

    Returns:
        `[B]` float.

    Example:
        >>> from jdistill import losses, nets
        >>> def with_weight(weight, outputs, batch):
        ...     return weight * losses.cross_entropy(nets.logits_of(outputs), batch.labels)
        >>> loss_fn = jax.tree_util.Partial(with_weight, 0.5)
        >>> batch = Batch(None, np.array([1]), targets=None, mask=np.ones(1))
        >>> round(float(loss_fn(np.zeros((1, 2), np.float32), batch)[0]), 3)  # log(2) / 2
        0.347
    """

    def __call__(self, outputs: PyTree, batch: Batch, /) -> Array: ...


class StepFn(Protocol):
    """Step of training or evaluation, which `jdistill.parallel.compile_step` compiles; pure.

    Args:
        state: pytree of all that a step changes, a `jdistill.train.TrainState` for one.
        batch: the examples.
        loss_fn: the loss, as a pytree.

    Returns:
        The state after one update (after an evaluation the same), and sums over the batch by name.

    Example:
        >>> from jdistill import parallel
        >>> def count(state, batch, loss_fn):
        ...     return state + 1, {"count": batch.mask.sum()}
        >>> batch = parallel.Batch(np.zeros((3, 2)), np.zeros(3, int), None, mask=np.ones(3))
        >>> compiled, loss_fn = parallel.compile_step(count), jax.tree_util.Partial(max)
        >>> state, sums = compiled(np.int32(0), batch, loss_fn)
        >>> int(state), float(sums["count"])
        (1, 3.0)
    """

    def __call__(self, state: Any, batch: Batch, loss_fn: LossFn, /) -> tuple[Any, Metrics]: ...


class AttackFn(Protocol):
    """Attack with its settings bound, as evaluation, training, and diagnosis take it.

    Args:
        logits_fn: the network, inputs `[B, ...]` to logits `[B, K]`.
        key: one PRNG key, or `[B]` keys; None is enough where nothing is random.
        inputs: `[B, ...]` float inside the bounds.
        labels: `[B]` int, the true classes.

    Returns:
        A `jdistill.attacks.AttackResult`, every array of which leads with `[B]`.

    Example:
        >>> import functools
        >>> from jdistill import attacks
        >>> attack = functools.partial(attacks.pgd, eps=0.6, num_steps=5)
        >>> inputs = np.eye(2, dtype=np.float32)
        >>> result = attack(lambda x: x, jax.random.key(0), inputs, np.arange(2))
        >>> result.success.tolist()
        [True, True]
    """

    def __call__(
        self, logits_fn: LogitsFn, key: Array | None, inputs: ArrayLike, labels: ArrayLike, /
    ) -> Any: ...


class Event(TypedDict, total=False):
    """Event that a host loop of the library tells its callback: a dictionary.

    Which keys there are, beside `event` and `stage`, depends on the event; the docstring of the
    loop says it.

    Attributes:
        event: what happened: a training `"step"`, an `"epoch"`, the end of a `"generation"`; or
            progress of `"evaluate"`, `"attack"`, `"diagnose"`, `"read"`, or a `"call"`.
        stage: name, for people, of what it happened in.
        done: examples that are done, or epochs of a universal attack.
        total: examples, or epochs of a universal attack, that there are.
        step: number of steps done, in training, or in the batch that an attack is at.
        num_steps: number of steps of the whole training, or of the attack.
        epoch: number of the epoch, from 1.
        num_epochs: number of epochs of the whole training.
        generation: number of the generation in its chain; 0 is the teacher.
        runs: the chunk of a sweep's runs that was trained.
        loss: mean training loss of the epoch; of a sweep `[runs]`.
        accuracy: training accuracy of the epoch; of a sweep `[runs]`.
        diverged: `[runs]` bool, the runs of a sweep that are no longer finite.
        attack: name of the attack that an ensemble is at.
        survivors: number of examples that no attack of an ensemble has beaten yet.
        state: to save: a `TrainState`, of a sweep a stack of them, or an `EnsembleState`.
        unit: what `done` counts, where that is not examples.
        run: number of the network of a stack, from 0.
        num_runs: number of networks of the stack.

    Example:
        >>> event: Event = {"event": "epoch", "stage": "student", "epoch": 1, "loss": 0.25}
        >>> event["stage"], event.get("accuracy")
        ('student', None)
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
    """Function that the library's host loops call with each event.

    Callbacks are where experiments save, log and show progress: the library does none of that.

    Args:
        event: what happened.

    Example:
        >>> def show(event: Event) -> None:
        ...     if event["event"] == "epoch":
        ...         print(f"{event['stage']}: loss {event['loss']:.2f}")
        >>> show({"event": "epoch", "stage": "student", "epoch": 1, "loss": 0.25})
        student: loss 0.25
    """

    def __call__(self, event: Event, /) -> None: ...
