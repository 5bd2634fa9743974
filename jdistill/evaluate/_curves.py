"""Worst cases over several attacks, and robust accuracy against a budget, from one run each."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jdistill import _validate, metrics
from jdistill.evaluate._attack import AttackOutcome
from jdistill.typing import ArrayLike


class Curve(NamedTuple):
    """Robust accuracy against a budget, for one network.

    Attributes:
        x: `[J]`, the budgets, rising.
        robust_accuracy: `[J]`, the share of examples not broken within the budget; never rises.
        low: `[J]`, the lower end of its Wilson interval.
        high: `[J]`, the upper end.
        num_examples: the examples that the shares are of.
    """

    x: np.ndarray
    robust_accuracy: np.ndarray
    low: np.ndarray
    high: np.ndarray
    num_examples: int


def worst_case(
    outcomes: Mapping[str, AttackOutcome], *, eps: float | None = None
) -> list[metrics.WorstCase]:
    """The worst case over attacks on the same examples, per example, for each network of a stack.

    A minimum-norm attack takes part where it is within `eps`. Attacks that took different numbers
    of examples are compared on the first ones, which all of them took.

    Args:
        outcomes: by the attack's name, of one stack and one norm.
        eps: the radius. None takes that of the fixed-budget attacks, which must then share it; and
            without any of these, whatever distance an attack found.

    Returns:
        `[R]`, one for each network: its robust accuracy, and which attack broke each example.

    Raises:
        ValueError: no outcomes, of different stacks, norms or (without `eps`) radii; eps below 0.

    Example:
        >>> from jdistill.evaluate import summarize
        >>> def outcome(*distances):
        ...     row = np.array([distances])
        ...     return summarize(AttackResult(row, row < 9, row, row, {}), norm="l2")
        >>> from jdistill.attacks import AttackResult
        >>> worst = worst_case({"ddn": outcome(1.0, 3.0), "fmn": outcome(2.0, 1.5)}, eps=1.0)
        >>> worst[0].robust_accuracy.value, worst[0].broken_by.tolist()
        (0.5, [0, -1])
    """
    _validate.mapping(outcomes=outcomes)
    reach = _reaches(outcomes)
    if eps is None:
        radii = {name: outcome.eps for name, outcome in outcomes.items() if outcome.eps is not None}
        if len(set(radii.values())) > 1:
            raise ValueError(
                f"expected attacks within one radius, got eps {radii}; pass eps=, and each counts "
                "where it is within that"
            )
        limit = next(iter(radii.values()), None)
    else:
        _validate.scalar(eps=eps)
        _validate.non_negative(eps=eps)
        limit = float(eps)
    broken = {
        name: np.isfinite(values) if limit is None else values <= limit
        for name, values in reach.items()
    }
    num_runs = len(next(iter(broken.values())))
    return [
        metrics.worst_case({name: rows[run] for name, rows in broken.items()})
        for run in range(num_runs)
    ]


def accuracy_against_eps(
    outcomes: AttackOutcome | Iterable[AttackOutcome],
    eps: ArrayLike | Sequence[float] | None = None,
    *,
    correct: np.ndarray | None = None,
) -> list[Curve]:
    """Robust accuracy for every radius, from one run of each attack.

    A minimum-norm attack says of each example from which radius on it is broken; a fixed-budget
    attack that succeeded says so of its own radius at the latest. The smallest such radius over
    all outcomes gives the curve of their worst case, exactly and at once; nothing is run again.

    Args:
        outcomes: one or more, of one stack, one norm and the same examples (of different numbers
            of them: the first ones, which all attacks took).
        eps: `[J]`, rising, at least 0. None takes 0 and every radius at which an example falls:
            between these the curve is flat.
        correct: `[R, N]` bool, `CleanMeasures.correct`: what is wrong without an attack is broken
            at 0. Every attack here counts it so by itself; it is for outcomes from elsewhere.

    Returns:
        `[R]`, one curve for each network.

    Raises:
        ValueError: no outcomes, of different stacks or norms; eps below 0 or not rising.

    Example:
        >>> from jdistill.attacks import AttackResult
        >>> from jdistill.evaluate import summarize
        >>> row = np.array([[0.0, 1.0, 2.0, np.inf]])
        >>> outcome = summarize(AttackResult(row, row < 9, row, row, {}), norm="l2")
        >>> accuracy_against_eps(outcome, [0.0, 0.5, 1.0, 5.0])[0].robust_accuracy.tolist()
        [0.75, 0.75, 0.5, 0.25]
    """
    if isinstance(outcomes, str) or not isinstance(outcomes, Iterable):
        raise ValueError(f"expected outcomes of attacks, got {outcomes!r}; pass a list of them")
    listed = [outcomes] if isinstance(outcomes, AttackOutcome) else list(outcomes)
    reach = _reaches({str(place): outcome for place, outcome in enumerate(listed)})
    fallen = np.min(list(reach.values()), axis=0)
    if correct is not None:
        flags = _validate.booleans(correct, name="correct")
        if flags.ndim != 2 or len(flags) != len(fallen) or flags.shape[1] < fallen.shape[1]:
            raise ValueError(
                f"expected correct of shape [R, N] = ({len(fallen)}, at least {fallen.shape[1]}), "
                f"got {flags.shape}; pass CleanMeasures.correct of the same stack"
            )
        fallen = np.where(flags[:, : fallen.shape[1]], fallen, 0.0)
    return _curves(fallen, eps, "eps")


def accuracy_against_steps(
    outcome: AttackOutcome, steps: ArrayLike | Sequence[int] | None = None
) -> list[Curve]:
    """Robust accuracy after every step of a fixed-budget attack, from one run of it.

    A curve that still falls at its end says that more steps would have broken more.

    Args:
        outcome: of an attack whose `info` has `first_success`.
        steps: `[J]`, rising whole numbers, at least 0: points that the attack has judged, as
            `first_success` counts them, over all starts. 0 is the clean input; the start of PGD is
            the first point, and the one after `s` of its steps is point `s + 1`. None takes those
            at which an example falls.

    Returns:
        `[R]`, one curve for each network.

    Raises:
        ValueError: an attack that does not say when it succeeded, steps below 0 or not rising.

    Example:
        >>> from jdistill.attacks import AttackResult
        >>> from jdistill.evaluate import summarize
        >>> row, first = np.zeros((1, 4)), np.array([[0, 2, 5, -1]])
        >>> result = AttackResult(row, first >= 0, row, row, {"first_success": first})
        >>> curve = accuracy_against_steps(summarize(result), range(6))[0]
        >>> curve.robust_accuracy.tolist()
        [0.75, 0.75, 0.5, 0.5, 0.5, 0.25]
    """
    _check_outcome(outcome)
    if "first_success" not in outcome.info:
        raise ValueError(
            "expected an attack that says when it succeeded, got no first_success in its info "
            f"(only {', '.join(outcome.info) or 'nothing'}); pass the outcome of pgd, apgd or the "
            "like"
        )
    when = outcome.info["first_success"].astype(np.float64)
    return _curves(np.where(outcome.success, when, np.inf), steps, "steps")


def accuracy_against_queries(
    outcome: AttackOutcome, queries: ArrayLike | Sequence[int] | None = None
) -> list[Curve]:
    """Robust accuracy for every number of queries, from one run of an attack that stops early.

    Args:
        outcome: of an attack that stops at an example's first success, such as `square`; its
            `queries` count every forward pass, the clean input and the verification included.
        queries: `[J]`, rising whole numbers, at least 0. None takes those at which an example
            falls.

    Returns:
        `[R]`, one curve for each network. An attack that spends its whole budget on every example
        gives a single step.

    Raises:
        ValueError: queries below 0 or not rising.

    Example:
        >>> from jdistill.attacks import AttackResult
        >>> from jdistill.evaluate import summarize
        >>> row, queries = np.zeros((1, 3)), np.array([[1, 40, 900]])
        >>> result = AttackResult(row, queries < 900, row, queries, {})
        >>> accuracy_against_queries(summarize(result), [1, 100])[0].robust_accuracy.round(3)
        array([0.667, 0.333])
    """
    _check_outcome(outcome)
    spent = outcome.queries.astype(np.float64)
    return _curves(np.where(outcome.success, spent, np.inf), queries, "queries")


def _check_outcome(outcome: AttackOutcome, name: str = "outcome") -> None:
    remedy = "pass what under_attack returned"
    _validate.instance(AttackOutcome, "an AttackOutcome", remedy=remedy, **{name: outcome})


def _reaches(outcomes: Mapping[str, AttackOutcome]) -> dict[str, np.ndarray]:
    """From which radius on each attack breaks each example, `[R, M]`; inf: from none."""
    if not outcomes:
        raise ValueError("expected outcomes, one outcome or more, got none; run an attack first")
    for each in outcomes.values():
        _check_outcome(each, "outcomes")
    norms = {name: outcome.norm for name, outcome in outcomes.items() if outcome.norm is not None}
    if len(set(norms.values())) > 1:
        raise ValueError(
            f"expected attacks in one norm, got {norms}; distances in two norms do not compare: "
            "take each norm by itself"
        )
    shapes = {name: outcome.success.shape for name, outcome in outcomes.items()}
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(
            f"expected outcomes of one stack, got [R, M] = {shapes}; attack the same networks"
        )
    size = min(shape[1] for shape in shapes.values())
    return {name: _reach(outcome)[:, :size] for name, outcome in outcomes.items()}


def _reach(outcome: AttackOutcome) -> np.ndarray:
    """From which radius on the examples are broken; a budget's rounding is not beyond it."""
    limit = np.inf if outcome.eps is None else outcome.eps
    distance = np.minimum(outcome.distance.astype(np.float64), limit)
    return np.where(outcome.success, distance, np.inf)


def _curves(fallen: np.ndarray, grid: ArrayLike | Sequence[float] | None, name: str) -> list[Curve]:
    """The share of each row that falls beyond every point of the grid."""
    return [_curve(row, grid, name) for row in fallen]


def _curve(fallen: np.ndarray, grid: ArrayLike | Sequence[float] | None, name: str) -> Curve:
    if grid is None:
        x = np.unique([0.0, *fallen[np.isfinite(fallen)]])
    else:
        named: dict[str, Any] = {name: grid}
        x = _validate.column(**named)
        _validate.non_negative(**named)
        if not x.size or not (x[1:] > x[:-1]).all():
            raise ValueError(f"expected rising {name}, got {grid}; sort them, each one once")
    standing = fallen.size - np.searchsorted(np.sort(fallen), x, side="right")
    levels, place = np.unique(standing, return_inverse=True)
    intervals = np.array([metrics.proportion(int(level), fallen.size) for level in levels])
    value, low, high = intervals[place].T
    return Curve(x, value, low, high, fallen.size)
