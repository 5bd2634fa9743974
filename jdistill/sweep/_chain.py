"""Teacher, assistants and students of every run."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jdistill import _validate, distill, nets, train
from jdistill.distill import Generation, with_generation
from jdistill.sweep import _program
from jdistill.sweep._fit import Labeler, Options, train_stack
from jdistill.sweep._program import Kind
from jdistill.sweep._states import checked_keys, create_state, spread
from jdistill.train import TrainState, TrainStep
from jdistill.train._fit import check_examples
from jdistill.typing import Array, ArrayLike, Callback


class SweepResult(NamedTuple):
    """What `chain` returns.

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
    teacher_temperature: ArrayLike | None = None,
    hard_weight: ArrayLike = 0.0,
    temperature_squared: bool = False,
    start: Sequence[TrainState] = (),
    batch_size: int = 128,
    callback: Callback | None = None,
    **fit_options: Any,
) -> SweepResult:
    """Train the chains of all runs, generation by generation, each generation as one stack.

    Run `r` is what `distill.chain` trains from the same weights with `keys[r]` at
    `temperature[r]`, to float tolerance; but a run that diverges does not end the others.

    Args:
        generations: teacher first, student last; as in `distill.chain`, with `params` and
            `model_state` stacked (every leaf `[R, ...]`) and `hyperparams` scalars or `[R]`.
        examples: `(inputs [N, ...], labels [N])`, NumPy.
        keys: `[R]` PRNG keys, `jax.vmap(jax.random.key)(seeds)` for one.
        temperature: a scalar or `[R]`, above 0.
        teacher_temperature: of the teachers' loss alone; None is `temperature`.
        hard_weight: a scalar or `[R]`, in `[0, 1]`.
        temperature_squared: whether the soft term is multiplied by `T²`.
        start: stacks of generations 0, 1, … from an earlier call: all but the last finished.
        batch_size: examples a step of each run.
        callback: see `fit`; every event also has `generation`. An event `"generation"` with the
            final `state` and `diverged` `[R]` ends each.
        **fit_options: `vmapped`, `devices`, `memory_limit`, `steps_per_call`, `augment` of `fit`.

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
    distill._check_chain(generations, start)
    inputs, labels = _validate.examples(examples, 2)
    _validate.callback(callback)
    options = Options(batch_size=batch_size, **fit_options)
    keys = checked_keys(keys)
    num_runs = len(keys)
    temperature = spread(temperature, num_runs, "temperature")
    if teacher_temperature is None:
        teacher_temperature = temperature
    teacher_temperature = spread(teacher_temperature, num_runs, "teacher_temperature")
    _validate.positive(teacher_temperature=teacher_temperature)
    teacher_loss = _stacked_loss(teacher_temperature, 0.0, False, num_runs)
    student_loss = _stacked_loss(temperature, hard_weight, temperature_squared, num_runs)
    first = start[0] if len(start) else _start(generations[0], keys, 0)
    check_examples(generations[0].step, nets.index(first, 0), inputs, labels, None)
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    teacher = train.logits_fn(generations[0].step, nets.index(first, 0))
    hard = np.eye(jax.eval_shape(teacher, inputs[:1]).shape[-1], dtype=np.float32)[labels]
    store = _program.store(inputs, labels)

    def hard_labels(kind: Kind, runs: np.ndarray) -> Any:
        return _program.placed(kind, np.broadcast_to(hard, (len(runs), *hard.shape)), stacked=True)

    def labels_by(step: TrainStep, teachers: TrainState) -> Labeler:
        """The soft labels of a stack of teachers."""

        def soft_labels(kind: Kind, runs: np.ndarray) -> Any:
            kind = kind._replace(step=step, augment=None)
            shared = (_program.placed(kind, store, stacked=False),)
            program = _program.labels_program(kind, min(512, len(labels)))
            return program(shared, *_program.placed_stack(kind, (teachers, temperature), runs))

        return soft_labels

    states: list[TrainState] = []
    alive = np.ones(num_runs, bool)
    diverged = []
    labels_of: Labeler = hard_labels
    for number, generation in enumerate(generations):
        state = start[number] if number < len(start) else _start(generation, keys, number)
        stage = distill.stage_name(number, len(generations))
        state, behind = train_stack(
            generation.step,
            state,
            store,
            teacher_loss if number == 0 else student_loss,
            labels_of,
            hard.shape[-1],
            num_epochs=generation.num_epochs,
            options=options,
            callback=with_generation(callback, number),
            stage=stage,
            alive=alive,
        )
        # A chain whose teacher has diverged has no student.
        alive = alive & ~behind
        states.append(state)
        labels_of = labels_by(generation.step, state)
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


def _stacked_loss(
    temperature: ArrayLike, hard_weight: ArrayLike, squared: bool, num_runs: int
) -> Any:
    """The chain's loss with every number `[R]`."""
    return distill.soft_loss(
        spread(temperature, num_runs, "temperature"),
        hard_weight=spread(hard_weight, num_runs, "hard_weight"),
        temperature_squared=squared,
    )


def _start(generation: Generation, keys: Array, number: int) -> TrainState:
    return create_state(
        generation.step,
        generation.params,
        jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number),
        model_state=generation.model_state or None,
        hyperparams=generation.hyperparams,
    )
