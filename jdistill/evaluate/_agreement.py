"""Agreement of a student with its teacher on clean inputs."""

from typing import NamedTuple

import numpy as np

from jdistill import _validate, metrics, train
from jdistill.evaluate._runs import refuse_tracers
from jdistill.typing import AnyArray, ArrayLike, LogitsFn


class Agreement(NamedTuple):
    """Agreement of a student with its teacher on the same clean examples.

    It says how alike the two networks are there, and nothing about the robustness of either.

    Attributes:
        top1_agreement: the share of the examples on which both predict the same class, right or
            wrong, see `metrics.top1_agreement`.
        repeated_mistakes: the share of the teacher's mistakes that the student repeats with the
            same class; NaN where the teacher makes none.
        num_teacher_mistakes: examples that the teacher misclassifies.
        mean_kl: mean KL(teacher ‖ student) of their softmax at T = 1, in nats. Infinite where the
            student gives no probability to what the teacher holds possible, and where either's
            logits are no prediction.
        logits_cka: linear CKA of the two networks' logits `[N, K]`, see `metrics.linear_cka`; not
            that of hidden features, by which networks are compared elsewhere. NaN where a logit is
            not finite, and of one example.
        num_examples: all of them.
        num_nonfinite: those among them on which the logits of either network are no prediction
            (`metrics.predicts`). They agree on nothing, and are mistakes without a class.
    """

    top1_agreement: metrics.Interval
    repeated_mistakes: metrics.Interval
    num_teacher_mistakes: int
    mean_kl: float
    logits_cka: float
    num_examples: int
    num_nonfinite: int


def agreement(
    student: LogitsFn,
    teacher: LogitsFn,
    inputs: np.ndarray,
    labels: ArrayLike,
    *,
    batch_size: int = 250,
) -> Agreement:
    """Agreement of a student with its teacher: in classes, mistakes, probabilities, and logits.

    All of it is of the logits on clean inputs, at full precision. Two networks that agree on every
    one of them may differ in how they fall to an attack.

    Args:
        student: inputs `[B, ...]` to logits `[B, K]`.
        teacher: likewise, to logits of the same classes.
        inputs: `[N, ...]` float, at least one.
        labels: `[N]` int in `0..K-1`.
        batch_size: examples at a time, at least 1.

    Returns:
        The measures, computed in float64 on the host.

    Raises:
        ValueError: no examples, labels out of range, or networks of different classes.

    Example:
        >>> teacher = lambda x: 4 * x
        >>> student = lambda x: 2 * x + np.array([[0.0, 0.5]])
        >>> x = np.array([[1.0, 0.0], [0.0, 1.0], [0.1, 0.0], [0.0, 0.8]], np.float32)
        >>> found = agreement(student, teacher, x, np.array([0, 1, 0, 0]))
        >>> found.top1_agreement.value, found.repeated_mistakes.value, found.num_teacher_mistakes
        (0.75, 1.0, 1)
        >>> round(found.mean_kl, 3), round(found.logits_cka, 3)
        (0.066, 1.0)

    References:
        Stanton, Izmailov, Kirichenko, Alemi & Wilson 2021, "Does Knowledge Distillation Really
        Work?" (top-1 agreement and predictive KL of student and teacher); Kornblith, Norouzi, Lee
        & Hinton 2019, "Similarity of Neural Network Representations Revisited", section 3.
    """
    refuse_tracers(student, teacher, inputs, labels)
    _validate.function(student=student, teacher=teacher)
    _validate.count(batch_size=batch_size)
    _validate.inputs_in_box(inputs, (-np.inf, np.inf))
    if not len(inputs):
        raise ValueError("expected at least one example, got none; pass inputs [N, ...]")
    own = train.predict(student, inputs, batch_size=batch_size)
    return agreement_of_logits(own, train.predict(teacher, inputs, batch_size=batch_size), labels)


def agreement_of_logits(student: AnyArray, teacher: AnyArray, labels: ArrayLike) -> Agreement:
    """`agreement` of two networks whose logits `[N, K]` are known."""
    _validate.floats(2, student=student, teacher=teacher)
    if np.shape(student) != np.shape(teacher):
        raise ValueError(
            "expected student and teacher over the same classes, got logits of shapes "
            f"{np.shape(student)} and {np.shape(teacher)}; pass networks of one task"
        )
    one, two = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    num_examples, num_classes = one.shape
    _validate.class_indices(labels, batch_size=num_examples, num_classes=num_classes)
    same = metrics.top1_agreement(one, two)
    mistaken = ~metrics.correct(two, np.asarray(labels))
    num_mistakes = int(mistaken.sum())
    repeated = metrics.Interval(np.nan, np.nan, np.nan)
    if num_mistakes:
        repeated = metrics.proportion(int((same & mistaken).sum()), num_mistakes)
    finite = np.isfinite(one).all() and np.isfinite(two).all()
    valid = metrics.predicts(one) & metrics.predicts(two)
    return Agreement(
        top1_agreement=metrics.proportion(int(same.sum()), num_examples),
        repeated_mistakes=repeated,
        num_teacher_mistakes=num_mistakes,
        mean_kl=float(np.where(valid, _divergences(two, one, valid), np.inf).mean()),
        logits_cka=metrics.linear_cka(one, two) if finite and num_examples > 1 else float("nan"),
        num_examples=num_examples,
        num_nonfinite=int((~valid).sum()),
    )


def _divergences(of: np.ndarray, to: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """KL of two softmaxes in nats, `[N]`, from logits in float64; of valid rows alone."""
    from scipy import special

    log_p, log_q = (
        special.log_softmax(np.where(valid[:, None], rows, 0.0), axis=1) for rows in (of, to)
    )
    # A class that is masked out for both has a difference of infinities, and counts 0.
    with np.errstate(invalid="ignore"):
        gaps = np.where(np.isneginf(log_p), 0.0, log_p - log_q)
        terms = np.where(np.isposinf(gaps), np.inf, np.exp(log_p) * gaps)
    divergences: np.ndarray = np.maximum(terms.sum(axis=1), 0.0)  # of equal ones, not -1e-17
    return divergences
