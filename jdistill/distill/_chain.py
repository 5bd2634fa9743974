"""Teacher, assistants and student, one after another."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jdistill import _validate, data, nets, train
from jdistill.distill._labels import soft_labels
from jdistill.distill._losses import online_loss, soft_loss
from jdistill.train import TrainState, TrainStep
from jdistill.train._fit import check_examples
from jdistill.train._step import check_state, check_step
from jdistill.typing import Array, ArrayLike, Callback, Event, LogitsFn, LossFn, PyTree

# Folded into the run's key for the shared initial weights; no generation has this number.
_INITIAL_WEIGHTS = 2**31 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """One network of a chain, and how it learns.

    Attributes:
        step: its training step (`train.make_train_step`): network and optimizer.
        params: its initial weights; share them within an architecture, as the paper does.
        model_state: its initial model state; `{}` where there is none.
        num_epochs: passes over the data, at least 0.
        hyperparams: numbers for the optimizer, such as `{"learning_rate": 0.1}`.
        select: given the state after the last epoch, the one that the generation ends with, such
            as that of its best epoch; None takes the last. `start` of a later run wants the last
            all the same. `sweep.chain` refuses it.
    """

    step: TrainStep
    params: PyTree
    num_epochs: int
    model_state: PyTree = dataclasses.field(default_factory=dict)
    hyperparams: Mapping[str, ArrayLike] = dataclasses.field(default_factory=dict)
    select: Callable[[TrainState], TrainState] | None = None


def initial_weights(
    step: TrainStep,
    params: PyTree,
    examples: tuple[np.ndarray, np.ndarray],
    key: Array,
    *,
    model_state: PyTree | None = None,
    num_epochs: int = 1,
    hyperparams: Mapping[str, float] | None = None,
    start: TrainState | None = None,
    batch_size: int = 128,
    callback: Callback | None = None,
    mode: str = "jit",
    devices: Sequence[jax.Device] | None = None,
) -> TrainState:
    """The shared start of the released recipe: an epoch at `T = 1` on hard labels.

    Every generation of the architecture, at every temperature, starts from these weights (with a
    fresh optimizer).

    Args:
        step: the architecture's training step.
        params: freshly drawn weights.
        examples: `(inputs [N, ...], labels [N])`.
        key: the run's key.
        model_state: None is `{}`.
        num_epochs: at least 0.
        hyperparams: numbers for the optimizer.
        start: a state to go on from, from an earlier run of this function.
        batch_size: examples a step, at least 1.
        callback: see `train.fit`.
        mode: likewise.
        devices: likewise.

    Returns:
        The state; use its `params` and `model_state`.

    Raises:
        ValueError: as `train.fit`.

    References:
        Carlini & Wagner, released code `train_models.py`; Mandal & Gao 2023 keep it.
    """
    inputs, labels = _validate.examples(examples, 2)
    if start is None:
        start = train.create_state(
            step,
            params,
            jax.random.fold_in(_one_key(key), _INITIAL_WEIGHTS),
            model_state=model_state,
            hyperparams=hyperparams,
        )
    check_step(step)
    check_state(start, "start")
    targets = _one_hot(step, start, inputs, labels)
    return train.fit(
        step,
        start,
        (inputs, labels, targets),
        soft_loss(1.0),
        num_epochs=num_epochs,
        batch_size=batch_size,
        mode=mode,
        devices=devices,
        callback=callback,
        stage="initial weights",
    )


def chain(
    generations: Sequence[Generation],
    examples: tuple[np.ndarray, np.ndarray],
    key: Array,
    *,
    temperature: float,
    teacher_loss: Callable[[float], LossFn] = soft_loss,
    student_loss: Callable[..., LossFn] | None = None,
    online: bool = False,
    teacher: LogitsFn | None = None,
    start: Sequence[TrainState] = (),
    batch_size: int = 128,
    callback: Callback | None = None,
    mode: str = "jit",
    devices: Sequence[jax.Device] | None = None,
) -> list[TrainState]:
    """Train teacher, assistants and student, each on the soft labels of the one before.

    Generation `g` takes its randomness from `fold_in(key, g)`, so it does not depend on how long
    the chain is, and a chain can be made longer later.

    Args:
        generations: teacher first, student last; at least 1. Plain defensive distillation has
            two, the paper's teacher assistant three.
        examples: `(inputs [N, ...], labels [N])`, NumPy.
        key: the run's key.
        temperature: `T`, above 0, of the teacher's loss, of all soft labels and of all students.
        teacher_loss: `T -> loss_fn` of the first generation, whose `batch.targets` are the labels,
            one-hot. In TAKD, `lambda T: soft_loss(1.0)`.
        student_loss: `T -> loss_fn` of the later ones, whose `batch.targets` are the soft labels of
            the generation before; None is `soft_loss`. In TAKD, `functools.partial(soft_loss,
            hard_weight=0.3, temperature_squared=True)`. With `online`, `(T, teacher) -> loss_fn`,
            with the generation before as `teacher`, and no targets; None is `online_loss`.
        online: whether the generation before labels each batch as it comes, as augmentation needs.
        teacher: a trained network in the place of generation 0; `generations` then begin with
            generation 1.
        start: states of `generations` from an earlier run: finished ones are not trained again,
            and the last may be anywhere on its way.
        batch_size: examples a step, at least 1.
        callback: see `train.fit`; every event also has `generation`. An event
            `"generation"` with the final `state` ends each, finished ones included.
        mode: see `train.fit`.
        devices: likewise.

    Returns:
        One state per generation, in order.

    Raises:
        ValueError: no generation, numbers out of range, or a `start` in which a generation that
            is not the last is unfinished; and as `train.fit`.
        FloatingPointError: a generation that has diverged.

    References:
        Mandal & Gao 2023, "Improving Defensive Distillation using Teacher Assistant", released
        code `train_models.py`, `train_models_multidistill.py`; Mirzadeh et al. 2020.
    """
    check_chain(generations, start)
    inputs, labels = _validate.examples(examples, 2)
    _validate.inputs_in_box(inputs, (-np.inf, np.inf))
    _validate.class_indices(labels, batch_size=len(inputs))
    _validate.count(batch_size=batch_size)
    _validate.callback(callback)
    _check_temperature(temperature)
    student_loss = check_losses(teacher_loss, student_loss, online, teacher)
    for place, state in enumerate(start[:-1]):
        num_steps = _num_steps(generations[place], len(labels), batch_size)
        if int(state.step) < num_steps:
            # Those after it have learned from a teacher that this run would train on.
            raise ValueError(
                f"expected all states in start but the last to be finished, got generation "
                f"{place} at step {int(state.step)} of {num_steps}; pass start[:{place + 1}]"
            )
    key = _one_key(key)
    before = None if teacher is None else nets.callable_logits_fn(teacher)
    first = 0 if teacher is None else 1
    states: list[TrainState] = []
    for number, generation in enumerate(generations, start=first):
        targets = None
        state = _start(generation, jax.random.fold_in(key, number), start[len(states) :][:1])
        finished = int(state.step) >= _num_steps(generation, len(labels), batch_size)
        if before is None:
            # The same loss on one-hot labels, so that teacher and students share one compiled step.
            loss_fn = teacher_loss(temperature)
        else:
            loss_fn = student_loss(temperature, before) if online else student_loss(temperature)
        if not finished and before is None:
            targets = _one_hot(generation.step, state, inputs, labels)
        elif not finished and before is not None and not online:
            targets = soft_labels(before, inputs, temperature=temperature)
        stage = stage_name(number, first + len(generations))
        state = train.fit(
            generation.step,
            state,
            (inputs, labels, targets),
            loss_fn,
            num_epochs=generation.num_epochs,
            batch_size=batch_size,
            stage=stage,
            callback=with_generation(callback, number),
            mode=mode,
            devices=devices,
        )
        if generation.select is not None:
            state = generation.select(state)
            check_state(state, "the state that select gives")
        states.append(state)
        before = train.logits_fn(generation.step, state)
        if callback is not None:
            callback({"event": "generation", "stage": stage, "generation": number, "state": state})
    return states


def _check_temperature(temperature: Any) -> None:
    if isinstance(temperature, (list, tuple, np.ndarray)) and np.shape(
        _validate.numbers(temperature=temperature)
    ):
        raise ValueError(
            f"expected one temperature, got {np.shape(temperature)[0]}; call chain for each, or "
            "sweep.chain for all at once"
        )
    _validate.scalar(temperature=temperature)
    _validate.positive(temperature=temperature)


def check_losses(
    teacher_loss: Any, student_loss: Any, online: bool, teacher: Any
) -> Callable[..., LossFn]:
    """The students' loss, after an error for what is no factory of losses."""
    _validate.flag(online=online)
    if teacher is not None:
        _validate.function(teacher=teacher)
    if student_loss is None:
        student_loss = online_loss if online else soft_loss
    remedy = "pass a function of the temperature, such as distill.soft_loss"
    for name, value in (("teacher_loss", teacher_loss), ("student_loss", student_loss)):
        _validate.function(remedy=remedy, **{name: value})
    factory: Callable[..., LossFn] = student_loss
    return factory


def check_chain(generations: Sequence[Generation], start: Sequence[TrainState]) -> None:
    """An error for what is no chain, or for more states than it has generations."""
    if isinstance(generations, Generation):
        raise ValueError(
            "expected generations to be a sequence, got one Generation; pass [generation] * 3 for "
            "a chain with one assistant"
        )
    _validate.sequence(generations=generations, start=start)
    if not generations:
        raise ValueError(
            "expected generations, at least one generation, got none; pass the teacher's"
        )
    if len(start) > len(generations):
        raise ValueError(
            f"expected at most {len(generations)} states in start (one a generation), got "
            f"{len(start)}; pass those of this chain"
        )
    for generation in generations:
        _validate.instance(Generation, "of distill.Generation", generations=generation)
        if generation.select is not None:
            _validate.function(select=generation.select)
    for state in start:
        check_state(state, "start")


def _one_key(key: Array) -> Array:
    key = _validate.prng_key(key)
    _validate.rank(0, key=key)
    return key


def stage_name(generation: int, num_generations: int) -> str:
    """Name of a generation in a chain of that many: `teacher`, `assistant 1`, `student`.

    Example:
        >>> [stage_name(g, 3) for g in range(3)]
        ['teacher', 'assistant 1', 'student']
    """
    _validate.count(minimum=0, generation=generation)
    _validate.count(num_generations=num_generations)
    if generation == 0:
        return "teacher"
    return "student" if generation == num_generations - 1 else f"assistant {generation}"


def _start(generation: Generation, key: Array, given: Sequence[TrainState]) -> TrainState:
    if given:
        return given[0]
    return train.create_state(
        generation.step,
        generation.params,
        key,
        model_state=generation.model_state,
        hyperparams=generation.hyperparams,
    )


def _num_steps(generation: Generation, num_examples: int, batch_size: int) -> int:
    return generation.num_epochs * data.num_batches(num_examples, batch_size)


def _one_hot(
    step: TrainStep, state: TrainState, inputs: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Hard labels as soft ones, `[N, K]` float32."""
    check_examples(step, state, inputs, labels, None)
    num_classes = jax.eval_shape(train.logits_fn(step, state), inputs[:1]).shape[-1]
    return np.eye(num_classes, dtype=np.float32)[labels]


def with_generation(callback: Callback | None, number: int) -> Callback | None:
    """The callback, told of which generation its events are."""
    _validate.callback(callback)
    _validate.count(minimum=0, number=number)
    if callback is None:
        return None

    def told(event: Event) -> None:
        callback({**event, "generation": number})

    return told
