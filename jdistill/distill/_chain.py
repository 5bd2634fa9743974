"""Teacher, assistants and student, one after another."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jdistill import _validate, data, nets, train
from jdistill.distill._labels import softened
from jdistill.distill._lessons import Lesson, lesson_of, periods, within
from jdistill.distill._losses import online_loss, soft_loss
from jdistill.distill._several import together
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
        teachers: numbers of the earlier generations that it learns from; None is the one before,
            and of generation 0 none. `()` are the labels alone, one-hot. Of several the soft
            labels are the mean, and with `online` the teacher is `together` of them.
        loss: its own loss in the place of the chain's `student_loss`, or of `teacher_loss` where
            it learns from the labels.
        online: whether its teachers label each batch as it comes; None is as the chain has it.
        temperature_schedule: `(T, progress) -> temperature` of its loss and its soft labels, epoch
            by epoch, with `T` that of the chain, and a progress of 0 in the first epoch and 1 in
            the last: `annealed` for one. None is `T`.

    Example:
        >>> import flax.linen as nn
        >>> step = train.make_train_step(nets.apply_fn(nn.Dense(2)), train.sgd(0.5))
        >>> params, _ = nets.init(nn.Dense(2), jax.random.key(0), (4,))
        >>> teacher = Generation(step=step, params=params, num_epochs=50)
        >>> student = dataclasses.replace(teacher, hyperparams={"learning_rate": 0.1})
        >>> student.num_epochs, dict(student.hyperparams)
        (50, {'learning_rate': 0.1})
    """

    step: TrainStep
    params: PyTree
    num_epochs: int
    model_state: PyTree = dataclasses.field(default_factory=dict)
    hyperparams: Mapping[str, ArrayLike] = dataclasses.field(default_factory=dict)
    select: Callable[[TrainState], TrainState] | None = None
    teachers: Sequence[int] | None = None
    loss: Callable[..., LossFn] | None = None
    online: bool | None = None
    temperature_schedule: Callable[[float, float], float] | None = None


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
        mode: see `train.fit`.
        devices: see `train.fit`.

    Returns:
        The state; use its `params` and `model_state`.

    Raises:
        ValueError: as `train.fit`.

    Example:
        >>> import flax.linen as nn
        >>> model = nn.Dense(2)
        >>> step = train.make_train_step(nets.apply_fn(model), train.sgd(0.5))
        >>> params, _ = nets.init(model, jax.random.key(0), (2,))
        >>> inputs, labels = np.eye(2, dtype=np.float32), np.arange(2)
        >>> state = initial_weights(step, params, (inputs, labels), jax.random.key(0))
        >>> first = Generation(step=step, params=state.params, num_epochs=5)
        >>> first.num_epochs, int(state.step)
        (5, 1)

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

    A generation may learn otherwise: from several earlier ones, by a loss of its own, at a
    temperature that changes; see `Generation`.

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
            with the generation before as `teacher`, a pytree that gives its outputs in evaluation
            mode (logits, or a pytree with them), and no targets; None is `online_loss`.
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

    Example:
        >>> import flax.linen as nn
        >>> model = nn.Dense(2)
        >>> step = train.make_train_step(nets.apply_fn(model), train.sgd(0.5))
        >>> params, _ = nets.init(model, jax.random.key(0), (2,))
        >>> inputs, labels = np.eye(2, dtype=np.float32), np.arange(2)
        >>> generation = Generation(step=step, params=params, num_epochs=20)
        >>> teacher, assistant, student = chain(
        ...     [generation] * 3, (inputs, labels), jax.random.key(0), temperature=20.0)
        >>> train.predict(train.logits_fn(step, student), inputs).argmax(axis=1).tolist()
        [0, 1]

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
    first = 0 if teacher is None else 1
    defaults: Any = {"teacher_loss": teacher_loss, "student_loss": student_loss, "online": online}
    lessons = [
        lesson_of(generation, number, **defaults)
        for number, generation in enumerate(generations, start=first)
    ]
    networks: list[Taught] = [] if teacher is None else [frozen(teacher)]
    states: list[TrainState] = []
    steps_per_epoch = data.num_batches(len(labels), batch_size)
    for number, generation in enumerate(generations, start=first):
        lesson = lessons[number - first]
        state = _start(generation, jax.random.fold_in(key, number), start[len(states) :][:1])
        num_steps = generation.num_epochs * steps_per_epoch
        own = [networks[teacher] for teacher in lesson.teachers]
        labels_at = None
        if int(state.step) < num_steps and not lesson.online:
            labels_at = _labels_of(generation.step, state, own, inputs, labels)
        stage = stage_name(number, first + len(generations))
        told = with_generation(callback, number)
        for period in periods(
            generation.temperature_schedule,
            temperature,
            generation.num_epochs,
            int(state.step) // steps_per_epoch,
        ):
            state = train.fit(
                generation.step,
                state,
                (inputs, labels, None if labels_at is None else labels_at(period.temperature)),
                loss_at(lesson, period.temperature, own),
                num_epochs=period.num_epochs,
                batch_size=batch_size,
                stage=stage,
                callback=within(told, generation.num_epochs, num_steps),
                mode=mode,
                devices=devices,
            )
        if generation.select is not None:
            state = generation.select(state)
            check_state(state, "the state that select gives")
        states.append(state)
        networks.append(trained(generation.step, state))
        if callback is not None:
            callback({"event": "generation", "stage": stage, "generation": number, "state": state})
    return states


class Taught(NamedTuple):
    """A network that others learn from.

    Attributes:
        logits_fn: for soft labels.
        outputs_fn: for losses that it labels each batch for; all that it returns.
    """

    logits_fn: Any
    outputs_fn: Any


def frozen(teacher: LogitsFn) -> Taught:
    """A network that is not trained here."""
    network = nets.callable_logits_fn(teacher)
    return Taught(network, network)


def trained(step: TrainStep, state: TrainState) -> Taught:
    """The network of a state."""
    return Taught(train.logits_fn(step, state), train.outputs_fn(step, state))


def loss_at(lesson: Lesson, temperature: float, teachers: Sequence[Taught]) -> LossFn:
    """The loss of a generation at a temperature, given the networks that it learns from."""
    if not lesson.online:
        return lesson.loss(temperature)
    own = [each.outputs_fn for each in teachers]
    return lesson.loss(temperature, own[0] if len(own) == 1 else together(own))


def _labels_of(
    step: TrainStep,
    state: TrainState,
    teachers: Sequence[Taught],
    inputs: np.ndarray,
    labels: np.ndarray,
) -> Callable[[float], np.ndarray]:
    """Function from a temperature to the soft labels `[N, K]`; without a teacher, one-hot ones."""
    if not teachers:
        # So that teacher and students share one compiled step.
        hard = _one_hot(step, state, inputs, labels)
        return lambda temperature: hard
    logits = [train.predict(each.logits_fn, inputs) for each in teachers]

    def soft(temperature: float) -> np.ndarray:
        found = [softened(each, temperature) for each in logits]
        return found[0] if len(found) == 1 else np.asarray(np.mean(np.stack(found), axis=0))

    return soft


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

    Args:
        generation: its number, from 0.
        num_generations: of the chain, the teacher included; at least 1.

    Returns:
        The name, as events of `chain` have it in `stage`.

    Raises:
        ValueError: numbers out of range.

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
