"""Lessons of generations: their teachers, loss, and temperature."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jdistill import _validate
from jdistill.distill._losses import online_loss, soft_loss
from jdistill.typing import Callback, Event, LossFn


class Lesson(NamedTuple):
    """Teachers and loss of one generation.

    Attributes:
        teachers: numbers of the generations that it learns from; none are the labels.
        loss: `T -> loss_fn`, or with `online` `(T, teacher) -> loss_fn`.
        online: whether its teachers label each batch as it comes.
    """

    teachers: tuple[int, ...]
    loss: Callable[..., LossFn]
    online: bool


def lesson_of(
    stage: Any,
    number: int,
    *,
    teacher_loss: Callable[..., LossFn],
    student_loss: Callable[..., LossFn],
    online: bool,
) -> Lesson:
    """The lesson of a generation (or of a study's stage), by what it says and the chain's default.

    Raises:
        ValueError: teachers that are not earlier generations, or what is no loss.
    """
    if stage.online is not None:
        _validate.flag(online=stage.online)
    if stage.loss is not None:
        remedy = "pass a function of the temperature, such as distill.soft_loss"
        _validate.function(remedy=remedy, loss=stage.loss)
    if stage.temperature_schedule is not None:
        _validate.function(temperature_schedule=stage.temperature_schedule)
    teachers: tuple[int, ...] = (number - 1,) if number else ()
    if stage.teachers is not None:
        _validate.sequence(teachers=stage.teachers)
        for teacher in stage.teachers:
            _validate.count(minimum=0, teachers=teacher)
        teachers = tuple(int(teacher) for teacher in stage.teachers)
        if len(set(teachers)) < len(teachers) or any(teacher >= number for teacher in teachers):
            raise ValueError(
                f"expected teachers of generation {number} to be different earlier ones, got "
                f"{teachers}; name some of 0 to {number - 1}, or () for the labels alone"
                if number
                else f"expected no teachers for the first generation, got {teachers}; pass ()"
            )
    if not teachers:
        if stage.online:
            raise ValueError(
                f"expected online only of a generation with teachers, got it of generation "
                f"{number}, which learns from the labels; leave it out"
            )
        lesson = Lesson((), stage.loss or teacher_loss, False)
    else:
        is_online = online if stage.online is None else bool(stage.online)
        if stage.loss is None and is_online != online:
            if student_loss not in (soft_loss, online_loss):
                # Another loss in its place would be another study, without a word.
                raise ValueError(
                    f"expected a loss of generation {number} beside online={is_online}, got None; "
                    "pass loss=..., since the student_loss of all is for the other kind of teacher"
                )
            student_loss = online_loss if is_online else soft_loss
        lesson = Lesson(teachers, stage.loss or student_loss, is_online)
    _check_kind(lesson, number)
    return lesson


def _check_kind(lesson: Lesson, number: int) -> None:
    """An error for a loss that takes other arguments than it will get."""
    try:
        signature = inspect.signature(lesson.loss)
    except (TypeError, ValueError):  # a callable that does not say
        return
    given = (1.0, None) if lesson.online else (1.0,)
    try:
        signature.bind(*given)
    except TypeError as error:
        offline = "pass one such as distill.online_loss, or wrap it: distill.online(loss)"
        online = "a loss of an online teacher wants online=True; pass another such as soft_loss"
        raise ValueError(
            f"expected the loss of generation {number} to take "
            f"{'(temperature, teacher)' if lesson.online else 'the temperature alone'}, got "
            f"{_name(lesson.loss)} ({error}); {offline if lesson.online else online}"
        ) from None


def _name(loss: Any) -> str:
    function = getattr(loss, "func", loss)
    return str(getattr(function, "__name__", type(loss).__name__))


class Period(NamedTuple):
    """Epochs at one temperature.

    Attributes:
        temperature: of the loss and of the soft labels; of a sweep one per run.
        num_epochs: epochs of the generation when it ends.
    """

    temperature: Any
    num_epochs: int


def periods(
    schedule: Callable[[float, float], float] | None,
    temperature: Any,
    num_epochs: int,
    first_epoch: int,
) -> Iterator[Period]:
    """The epochs of a generation from one on, each stretch at its temperature."""
    if schedule is None:
        yield Period(temperature, num_epochs)
        return
    for epoch in range(first_epoch, num_epochs):
        progress = epoch / max(1, num_epochs - 1)
        # Exact numbers, since a loss may tell 0.7 from the float32 next to it.
        several = isinstance(temperature, list)
        found = [schedule(T, progress) for T in (temperature if several else [temperature])]
        for value in found:
            _validate.scalar(temperature_schedule=value)
            _validate.positive(temperature_schedule=value)
        yield Period(found if several else found[0], epoch + 1)


def annealed(temperature: float, progress: float) -> float:
    """Temperature that falls from `T` to 1 in equal steps, a `temperature_schedule`.

    The temperature is::

        T + (1 - T) · progress

    Args:
        temperature: of the chain, above 0.
        progress: 0 in the first epoch, 1 in the last.

    Returns:
        The temperature of the epoch.

    Raises:
        ValueError: a temperature that is not above 0, a progress outside of `[0, 1]`.

    Example:
        >>> [annealed(20.0, progress) for progress in (0.0, 0.5, 1.0)]
        [20.0, 10.5, 1.0]

    References:
        Jafari, Rezagholizadeh, Sharma & Ghodsi 2021, "Annealing Knowledge Distillation", EACL,
        whose temperature falls over the epochs of its first stage; there the teacher's logits are
        scaled, and matched by their squared difference.
    """
    _validate.scalar(temperature=temperature, progress=progress)
    _validate.positive(temperature=temperature)
    _validate.within(0.0, 1.0, progress=progress)
    return temperature + (1.0 - temperature) * progress


def within(callback: Callback | None, num_epochs: int, num_steps: int) -> Callback | None:
    """The callback of one epoch's loop, told how many there are in all."""
    if callback is None:
        return None

    def told(event: Event) -> None:
        callback({**event, "num_epochs": num_epochs, "num_steps": num_steps})

    return told
