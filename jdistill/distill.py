"""Defensive distillation through teacher assistants.

A chain is generations 0, 1, 2, …: the teacher learns from hard labels at temperature `T`; every
later generation learns from `softmax(z / T)` of the one before, at the same `T`; all are tested
at `T = 1`. The student of `n` assistants is generation `n + 1`, so every chain contains the
shorter ones: generation 1 is the student of plain defensive distillation.

Generations of equal size give the chain of Mandal & Gao 2023; shrinking ones with a hard-label
weight and the factor `T²` give the teacher assistants of Mirzadeh et al. 2020 (TAKD).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate, data, losses, nets, train
from jdistill.train import TrainState, TrainStep
from jdistill.train._fit import check_examples
from jdistill.train._step import check_state, check_step
from jdistill.typing import Array, ArrayLike, Batch, Callback, Event, LogitsFn, LossFn, PyTree

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


def soft_labels(
    logits_fn: LogitsFn, inputs: np.ndarray, *, temperature: float, batch_size: int = 512
) -> np.ndarray:
    """A network's predictions at a temperature, `softmax(z / T)`, for a whole set.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        inputs: `[N, ...]` float.
        temperature: above 0.
        batch_size: examples at a time.

    Returns:
        `[N, K]` float32 on the host; rows sum to 1.

    Raises:
        ValueError: a temperature that is not above 0.
        FloatingPointError: predictions that are not finite; a student would learn nothing from
            them, without a word.

    Example:
        >>> soft_labels(lambda x: x, np.array([[0.0, 20.0]], np.float32), temperature=20.0).round(2)
        array([[0.27, 0.73]], dtype=float32)

    References:
        Papernot et al. 2016, section IV.A.
    """
    _validate.scalar(temperature=temperature)
    _validate.positive(temperature=temperature)
    logits = train.predict(logits_fn, inputs, batch_size=batch_size)
    predictions = np.asarray(jax.nn.softmax(logits / np.float32(temperature), axis=-1))
    bad = ~np.isfinite(predictions).all(axis=-1)
    if bad.any():
        raise FloatingPointError(
            f"expected finite predictions, got {predictions[bad][0]} for {bad.sum()} of "
            f"{len(bad)} examples; the network has diverged: train it with a lower learning rate"
        )
    return predictions


def soft_loss(
    temperature: ArrayLike,
    *,
    hard_weight: ArrayLike = 0.0,
    temperature_squared: bool = False,
) -> LossFn:
    """The distillation loss against the batch's soft labels (offline: `batch.targets`).

        (1 - λ) · s · H(q, softmax(z / T)) + λ · H(y, softmax(z)),    s = T² or 1

    with `H(q, p) = -Σ_k q_k log p_k`, a sum over classes; the step takes the mean over the batch.
    `λ = 0` and `s = 1` are defensive distillation; TAKD and Hinton's take `λ` in (0, 1), `s = T²`.

    Args:
        temperature: above 0.
        hard_weight: λ in `[0, 1]`, the weight of the hard labels, whose term is at `T = 1`.
        temperature_squared: whether the soft term is multiplied by `T²`, which keeps its
            gradients comparable to the hard term's.

    Returns:
        `(outputs, batch) -> [B]`, a pytree: other numbers compile nothing.

    Raises:
        ValueError: numbers out of range.

    Example:
        >>> batch = Batch(None, jnp.array([1]), jnp.array([[0.5, 0.5]]), jnp.ones(1))
        >>> float(soft_loss(20.0)(jnp.zeros((1, 2)), batch)[0])
        0.693...

    References:
        Papernot et al. 2016, section IV; Hinton, Vinyals & Dean 2015, section 2; Mirzadeh et al.
        2020, equation 3.
    """
    return jax.tree_util.Partial(
        _soft_loss, *_weights(temperature, hard_weight, temperature_squared)
    )


def online_loss(
    temperature: ArrayLike,
    teacher: LogitsFn,
    *,
    hard_weight: ArrayLike = 0.0,
    temperature_squared: bool = False,
) -> LossFn:
    """The distillation loss against a teacher that labels each batch as it comes.

    For inputs that change from epoch to epoch (augmentation), where soft labels cannot be
    computed beforehand. No gradient flows into the teacher. Otherwise as `soft_loss`.

    Args:
        temperature: above 0.
        teacher: inputs `[B, ...]` to logits `[B, K]`, in evaluation mode.
        hard_weight: λ in `[0, 1]`.
        temperature_squared: whether the soft term is multiplied by `T²`.

    Returns:
        `(outputs, batch) -> [B]`, a pytree that carries the teacher's weights.

    Raises:
        ValueError: numbers out of range.

    Example:
        >>> batch = Batch(jnp.zeros((1, 2)), jnp.array([1]), None, jnp.ones(1))
        >>> float(online_loss(20.0, lambda x: x)(jnp.zeros((1, 2)), batch)[0])
        0.693...
    """
    _validate.function(teacher=teacher)
    weights = _weights(temperature, hard_weight, temperature_squared)
    return jax.tree_util.Partial(_online_loss, nets.callable_logits_fn(teacher), *weights)


def standardized_loss(
    temperature: ArrayLike, teacher: LogitsFn, *, hard_weight: ArrayLike = 0.0
) -> LossFn:
    """The distillation loss on standardized logits, against a teacher that labels each batch.

        (1 - λ) · KL(softmax(s(z_t) / T) || softmax(s(z) / T)) + λ · H(y, softmax(z))

    with `s` the logits' standardization over classes (`losses.standardize`). With `λ = 0` neither
    the scale of the student's logits nor that of the teacher's changes it, so that nothing makes
    the student as confident as its teacher. No gradient flows into the teacher. As a `student_loss`
    of `chain` or of a study it wants `online=True`.

    Args:
        temperature: above 0.
        teacher: inputs `[B, ...]` to logits `[B, K]`, in evaluation mode.
        hard_weight: λ in `[0, 1]`, the weight of the hard labels, whose term is at `T = 1` and not
            standardized.

    Returns:
        `(outputs, batch) -> [B]`, a pytree that carries the teacher's weights: other numbers
        compile nothing.

    Raises:
        ValueError: numbers out of range.

    Example:
        >>> batch = Batch(jnp.array([[2.0, 8.0]]), jnp.array([1]), None, jnp.ones(1))
        >>> loss = standardized_loss(2.0, lambda x: x)
        >>> bool(loss(jnp.array([[0.1, 0.2]]), batch)[0] < 1e-6)
        True

    References:
        Sun, Ren, Li, Wang & Cao 2024, "Logit Standardization in Knowledge Distillation",
        arXiv:2403.01427. Its released code multiplies the first term by `T²`, and weighs the two
        terms by numbers that do not add up to 1.
    """
    _validate.function(teacher=teacher)
    temperature, hard_weight, _ = _weights(temperature, hard_weight, False)
    network = nets.callable_logits_fn(teacher)
    return jax.tree_util.Partial(_standardized_loss, network, temperature, hard_weight)


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
    _check_chain(generations, start)
    inputs, labels = _validate.examples(examples, 2)
    _validate.inputs_in_box(inputs, (-np.inf, np.inf))
    _validate.class_indices(labels, batch_size=len(inputs))
    _validate.count(batch_size=batch_size)
    _validate.callback(callback)
    _check_temperature(temperature)
    student_loss = _check_losses(teacher_loss, student_loss, online, teacher)
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


def _check_losses(
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


def _check_chain(generations: Sequence[Generation], start: Sequence[TrainState]) -> None:
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


def _weights(
    temperature: ArrayLike, hard_weight: ArrayLike, temperature_squared: bool
) -> tuple[Array, Array, Array]:
    """Temperature, hard weight and the soft term's factor as arrays, checked."""
    _validate.positive(temperature=temperature)
    _validate.within(0.0, 1.0, hard_weight=hard_weight)
    _validate.flag(temperature_squared=temperature_squared)
    temperature = jnp.asarray(temperature, jnp.float32)
    factor = jnp.square(temperature) if temperature_squared else jnp.ones_like(temperature)
    return temperature, jnp.asarray(hard_weight, jnp.float32), factor


def _mixed(
    temperature: Array,
    hard_weight: Array,
    factor: Array,
    outputs: Any,
    batch: Batch,
    targets: Array,
) -> Array:
    logits = nets.logits_of(outputs)
    soft = losses.soft_cross_entropy(logits, targets, temperature=temperature)
    hard = losses.cross_entropy(logits, batch.labels)
    return (1 - hard_weight) * factor * soft + hard_weight * hard


def _soft_loss(
    temperature: Array, hard_weight: Array, factor: Array, outputs: Any, batch: Batch
) -> Array:
    if batch.targets is None:
        raise ValueError(
            "expected soft labels in batch.targets, got None; pass them to train.fit as "
            "(inputs, labels, targets), or use distill.online_loss"
        )
    return _mixed(temperature, hard_weight, factor, outputs, batch, batch.targets)


def _online_loss(
    teacher: LogitsFn,
    temperature: Array,
    hard_weight: Array,
    factor: Array,
    outputs: Any,
    batch: Batch,
) -> Array:
    targets = jax.nn.softmax(jax.lax.stop_gradient(teacher(batch.inputs)) / temperature, axis=-1)
    return _mixed(temperature, hard_weight, factor, outputs, batch, targets)


def _standardized_loss(
    teacher: LogitsFn, temperature: Array, hard_weight: Array, outputs: Any, batch: Batch
) -> Array:
    logits = nets.logits_of(outputs)
    its = jax.lax.stop_gradient(teacher(batch.inputs))
    soft = losses.standardized_kl(logits, its, temperature=temperature)
    hard = losses.cross_entropy(logits, batch.labels)
    return (1 - hard_weight) * soft + hard_weight * hard


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
