"""Teacher, assistants and students of every run."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate, data, distill, nets, train
from jdistill.distill import Generation
from jdistill.distill._chain import (
    Taught,
    check_chain,
    check_losses,
    frozen,
    loss_at,
    trained,
    with_generation,
)
from jdistill.distill._lessons import Lesson, lesson_of, periods, within
from jdistill.sweep import _program
from jdistill.sweep._fit import Labeler, Options, train_stack
from jdistill.sweep._program import Kind
from jdistill.sweep._states import checked_keys, create_state, spread
from jdistill.train import TrainState, TrainStep
from jdistill.train._fit import check_examples
from jdistill.typing import Array, ArrayLike, Callback, LogitsFn, LossFn


class SweepResult(NamedTuple):
    """Result of `chain`.

    Attributes:
        states: one stack a generation, every leaf `[R, ...]`.
        diverged: `[G, R]` bool, whether a run had diverged by the end of that generation. Its
            state is the last with finite weights, and its later generations were not trained.
    """

    states: list[TrainState]
    diverged: np.ndarray


def chain(
    generations: Sequence[Generation],
    examples: tuple[np.ndarray, np.ndarray],
    keys: Array,
    *,
    temperature: ArrayLike,
    teacher_loss: Callable[[float], LossFn] = distill.soft_loss,
    student_loss: Callable[..., LossFn] | None = None,
    online: bool = False,
    teacher: LogitsFn | None = None,
    start: Sequence[TrainState] = (),
    batch_size: int = 128,
    callback: Callback | None = None,
    vmapped: bool | None = None,
    devices: Sequence[jax.Device] | None = None,
    memory_limit: int | None = None,
    steps_per_call: int | None = None,
) -> SweepResult:
    """Train the chains of all runs, generation by generation, each generation as one stack.

    Run `r` is what `distill.chain` trains from the same weights with `keys[r]` at
    `temperature[r]`, to float tolerance; but a run that diverges does not end the others.

    Args:
        generations: teacher first, student last; as in `distill.chain`, with `params` and
            `model_state` stacked (every leaf `[R, ...]`), `hyperparams` scalars or `[R]`, and
            without `select`.
        examples: `(inputs [N, ...], labels [N])`, NumPy.
        keys: `[R]` PRNG keys, `jax.vmap(jax.random.key)(seeds)` for one.
        temperature: a scalar or `[R]`, above 0.
        teacher_loss: as in `distill.chain`; made for each run, so it must give a pytree of one
            structure (`jax.tree_util.Partial`) that carries what differs between the runs.
        student_loss: likewise.
        online: as in `distill.chain`.
        teacher: a trained network in the place of generation 0, the same for all runs.
        start: stacks of generations 0, 1, … from an earlier call: all but the last finished.
        batch_size: examples a step of each run.
        callback: see `fit`; every event also has `generation`. An event `"generation"` with the
            final `state` and `diverged` `[R]` ends each.
        vmapped: see `fit`; likewise
        devices: of `fit`,
        memory_limit: of `fit`,
        steps_per_call: of `fit`.

    Returns:
        The stacks and what diverged.

    Raises:
        ValueError: no generation, numbers out of range, or shapes that do not fit `[R]`.
        MemoryError: one run alone does not fit.

    Example:
        >>> from jdistill import data, nets, sweep, train
        >>> digits = data.load("digits")
        >>> examples = digits.train.inputs[:64], digits.train.labels[:64]
        >>> model = nets.digits_net(width=0.25)
        >>> step = train.make_train_step(nets.apply_fn(model), train.sgd(0.1))
        >>> temperature = np.float32([1, 20, 100])
        >>> keys = jax.vmap(jax.random.key)(np.zeros(3, int))
        >>> params, _ = nets.init(model, keys[0], (8, 8, 1))
        >>> generation = distill.Generation(
        ...     step=step,
        ...     params=nets.stack([params] * 3),
        ...     num_epochs=1,
        ...     hyperparams={"learning_rate": 0.02 * temperature**0.5},
        ... )
        >>> result = sweep.chain([generation] * 3, examples, keys, temperature=temperature)
        >>> len(result.states), result.diverged.any()
        (3, np.False_)

    References:
        Mandal & Gao 2023, released code `train_models_multidistill.py`: a run for each.
    """
    check_chain(generations, start)
    if any(generation.select is not None for generation in generations):
        # The runs of a stack end at one epoch each, which would have to be put together.
        raise ValueError(
            "expected generations without select in a sweep, got one with it; use distill.chain"
        )
    inputs, labels = _validate.examples(examples, 2)
    _validate.callback(callback)
    options = Options(
        batch_size=batch_size,
        vmapped=vmapped,
        devices=devices,
        memory_limit=memory_limit,
        steps_per_call=steps_per_call,
    )
    keys = checked_keys(keys)
    num_runs = len(keys)
    # As they were given for the losses, which may tell 0.7 from the float32 next to it.
    given = temperature
    temperature = spread(temperature, num_runs, "temperature")
    exact = np.broadcast_to(np.asarray(given), (num_runs,)).tolist()
    _validate.positive(temperature=temperature)
    student_loss = check_losses(teacher_loss, student_loss, online, teacher)
    first_number = 0 if teacher is None else 1
    defaults: Any = {"teacher_loss": teacher_loss, "student_loss": student_loss, "online": online}
    lessons = [
        lesson_of(generation, number, **defaults)
        for number, generation in enumerate(generations, start=first_number)
    ]
    first = start[0] if len(start) else _start(generations[0], keys, first_number)
    check_examples(generations[0].step, nets.index(first, 0), inputs, labels, None)
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    network = train.logits_fn(generations[0].step, nets.index(first, 0))
    hard = np.eye(jax.eval_shape(network, inputs[:1]).shape[-1], dtype=np.float32)[labels]
    store = _program.store(inputs, labels)

    def hard_labels(kind: Kind, runs: np.ndarray) -> Any:
        return _program.placed(kind, np.broadcast_to(hard, (len(runs), *hard.shape)), stacked=True)

    def labels_by(step: TrainStep, teachers: TrainState, temperature: Any) -> Labeler:
        """The soft labels of a stack of teachers."""
        temperature = spread(temperature, num_runs, "temperature")

        def soft_labels(kind: Kind, runs: np.ndarray) -> Any:
            kind = kind._replace(step=step)
            shared = (_program.placed(kind, store, stacked=False),)
            program = _program.labels_program(kind, min(512, len(labels)))
            return program(shared, *_program.placed_stack(kind, (teachers, temperature), runs))

        return soft_labels

    def labels_at(lesson: Lesson, temperature: Any) -> Labeler:
        """The labels of a generation at the runs' temperatures."""
        if lesson.online:
            return _no_labels
        if not lesson.teachers:
            return hard_labels
        found = []
        for number in lesson.teachers:
            if number < first_number:
                assert teacher is not None
                given = [distill.soft_labels(teacher, inputs, temperature=T) for T in temperature]
                found.append(_given(np.stack(given)))
            else:
                place = number - first_number
                found.append(labels_by(generations[place].step, states[place], temperature))
        return found[0] if len(found) == 1 else _mean(found)

    def loss_of(lesson: Lesson, temperature: Any) -> Any:
        """The losses of all runs at their temperatures, as one."""
        name = "student_loss" if lesson.teachers else "teacher_loss"
        networks = [
            [network_of(number, run) for number in lesson.teachers] if lesson.online else []
            for run in range(num_runs)
        ]
        pairs = zip(temperature, networks, strict=True)
        return _stacked([loss_at(lesson, T, own) for T, own in pairs], name)

    def network_of(number: int, run: int) -> Taught:
        if number < first_number:
            assert teacher is not None
            return frozen(teacher)
        place = number - first_number
        return trained(generations[place].step, nets.index(states[place], run))

    states: list[TrainState] = []
    alive = np.ones(num_runs, bool)
    diverged = []
    steps_per_epoch = data.num_batches(len(labels), batch_size)
    for place, (generation, lesson) in enumerate(zip(generations, lessons, strict=True)):
        number = first_number + place
        state = start[place] if place < len(start) else _start(generation, keys, number)
        stage = distill.stage_name(number, first_number + len(generations))
        told = with_generation(callback, number)
        # Runs that are ahead wait for the others.
        furthest_behind = int(np.min(np.asarray(state.step)[alive], initial=2**31 - 1))
        for period in periods(
            generation.temperature_schedule,
            exact,
            generation.num_epochs,
            furthest_behind // steps_per_epoch,
        ):
            state, behind = train_stack(
                generation.step,
                state,
                store,
                loss_of(lesson, period.temperature),
                labels_at(lesson, period.temperature),
                None if lesson.online else hard.shape[-1],
                num_epochs=period.num_epochs,
                options=options,
                callback=within(
                    told, generation.num_epochs, generation.num_epochs * steps_per_epoch
                ),
                stage=stage,
                alive=alive,
            )
            # A chain whose teacher has diverged has no student.
            alive = alive & ~behind
        states.append(state)
        diverged.append(~alive)
        if callback is not None:
            callback(
                {
                    "event": "generation",
                    "stage": stage,
                    "generation": number,
                    "state": state,
                    "diverged": ~alive,
                }
            )
    return SweepResult(states, np.stack(diverged))


def _stacked(losses: Sequence[Any], name: str) -> Any:
    """The losses of all runs as one, every leaf `[R, ...]`."""
    try:
        structures: list[Any] = [jax.tree.structure(loss) for loss in losses]
        if len(set(structures)) > 1 or not jax.tree.leaves(losses[0]):
            raise ValueError("they differ in more than in arrays")
        return nets.stack([jax.tree.map(jnp.asarray, loss) for loss in losses])
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"expected {name}(T) to be a pytree that carries T as an array, got "
            f"{type(losses[0]).__name__} ({error}); return jax.tree_util.Partial(fun, T, ...)"
        ) from None


def _given(labels: np.ndarray) -> Labeler:
    """Soft labels `[R, N, K]` that are there."""
    return lambda kind, runs: _program.placed(kind, labels[runs], stacked=True)


def _mean(labelers: Sequence[Labeler]) -> Labeler:
    """The mean of several teachers' soft labels."""

    def labels_of(kind: Kind, runs: np.ndarray) -> Any:
        found = [labeler(kind, runs) for labeler in labelers]
        return sum(found[1:], start=found[0]) / np.float32(len(found))

    return labels_of


def _no_labels(kind: Kind, runs: np.ndarray) -> None:
    """None: an online teacher labels each batch."""


def _start(generation: Generation, keys: Array, number: int) -> TrainState:
    return create_state(
        generation.step,
        generation.params,
        jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number),
        model_state=generation.model_state or None,
        hyperparams=generation.hyperparams,
    )
