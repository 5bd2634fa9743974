"""Auto-PGD: gradient steps with momentum whose size follows from the progress of the loss."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jdistill import _validate, losses, norms
from jdistill._jax import as_pytree, register
from jdistill.attacks._apgd_core import APGD, State, Visited
from jdistill.attacks._apgd_l1 import SparseAPGD
from jdistill.attacks._core.engine import run, select
from jdistill.attacks._core.gradient import NORMS
from jdistill.attacks._core.problem import (
    AttackResult,
    Problem,
    need_key,
    num_classes,
    one_per_example,
    prepare,
    radius,
    start_point,
)
from jdistill.attacks._core.targets import Starts, direction
from jdistill.attacks._core.traits import Settings, by_loss, facts, with_loss
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn, Norm

_MOMENTUM = 0.25  # the share of the step before
_TITLES = {"APGD": "APGD-CE", "APGD dlr": "APGD-DLR"}


def _title(settings: Settings) -> str:
    title = with_loss("APGD", losses.cross_entropy)(settings)
    return _TITLES.get(title, title)


@facts(title=_title, norms=NORMS, follows=by_loss)
def apgd(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: Norm = "linf",
    num_steps: int = 100,
    num_restarts: int = 1,
    rho: ArrayLike = 0.75,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    loss: Callable[..., Array] = losses.cross_entropy,
    best_loss: bool = False,
    trace: bool = False,
) -> AttackResult:
    """Auto-PGD: projected gradient ascent with momentum and an adaptive step size.

    Each step is::

        z  = project(x + η · steepest(∂ loss / ∂x))
        x' = project(x + α (z - x) + (1 - α) (x - x₋₁)),     α = 1 at first, then 0.75

    η starts at twice the radius. At checkpoints, which follow each other ever more closely, it is
    halved where the loss grew in too few of the steps since the last one, or where the best loss
    has not changed; the example then goes on from its best point. Nothing has to be chosen.

    For l1 the steps follow the signs of the largest gradients alone, two thirds as many as the best
    point had changed features at the last checkpoint, without momentum; each start runs through
    balls of 3, 2 and 1 times the radius, with 30, 30 and 40% of the steps.

    With `loss=jdistill.losses.cross_entropy` this is APGD-CE, which a distilled network's
    saturated softmax defeats; with `loss=jdistill.losses.dlr` it is APGD-DLR. For APGD-T see
    `apgd_targeted`. Each example stops at its first success.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: one key, or `[B]` keys; None is enough with `init` and one start.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; scalar or `[B]`; may be traced.
        norm: `"linf"`, `"l2"` or `"l1"`.
        num_steps: gradient steps per start, at least 1; static.
        num_restarts: starts, at least 1; static. Only survivors take the next one.
        rho: ρ, the share of steps in which the loss must grow, in `[0, 1]`; scalar or `[B]`; may
            be traced. Unused for l1.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to move towards; None moves away from the labels.
        init: `[B, ...]`, the first start instead (projected into ball and box).
        loss: per-example loss `(logits [B, K], labels [B]) -> [B]`, maximized (for targets:
            minimized). Bind numbers as in `fgsm`.
        best_loss: go on after a success, attack misclassified examples, too, and return the point
            of the largest loss of all starts, as training on adversarial examples wants it; static.
        trace: keep the loss of every point judged.

    Returns:
        The result. An example that resists is returned at the point of the largest loss of its
        last start. `info`: `first_success`, where 1 is the first start; `gradients`; `restart [B]`
        int32, the start it ended in; with `trace`, the loss of each start and of the points that
        its steps lead to, `trace [B, num_restarts · (num_steps + 1)]`. For l1 each start judges
        `num_steps + 3` points: the larger balls' last ones, which cannot succeed, are projected
        into the next ball and judged again. See `jdistill.attacks`.

    Raises:
        ValueError: eps below 0 or NaN, rho outside `[0, 1]`, inputs not finite or outside the box,
            labels or targets outside `0..K-1`, wrong ranks, an unknown norm, counts below 1, no
            key where one is needed, a loss that needs more classes.

    Example:
        >>> import jax
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.3, 0]])
        >>> x, y = jnp.array([[0.3, 0.3]]), jnp.array([0])
        >>> result = apgd(logits_fn, jax.random.key(0), x, y, eps=0.25)
        >>> bool(result.success[0]), bool(result.distance[0] <= 0.25)
        (True, True)

    References:
        Croce & Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
        Diverse Parameter-free Attacks", section 3 and algorithm 1; for l1 Croce & Hein 2021,
        "Mind the box: l1-APGD for sparse adversarial attacks on image classifiers", sections 3-4.
        As in the released code, and so in the published numbers, the first step's loss is compared
        with 0 and not with the start's. The differences to that code are where a constant or a
        rounding would decide: no floor is added to a gradient's length, and the features of a step
        in l1 are counted in whole numbers.
    """
    problem = prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds, open_box=True)
    starts = Starts.of(problem, num_restarts)
    _validate.flag(best_loss=best_loss)
    method = _method(problem, starts, loss, eps, rho, init, norm, num_steps, best_loss)
    return run(method, problem, trace=trace)


@facts(title="APGD-T", norms=NORMS)
def apgd_targeted(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: Norm = "linf",
    num_targets: int = 9,
    first_target: ArrayLike = 0,
    num_steps: int = 100,
    num_restarts: int = 1,
    rho: ArrayLike = 0.75,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """APGD-T: Auto-PGD towards one class after another, on the targeted DLR loss.

    The classes are taken in the order of the clean logits, the runner-up first. Any class but the
    label is a success, whichever was the target. Below four classes the loss is not defined; there
    the difference of the two logits, z_t - z_y, takes its place.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: one key, or `[B]` keys; None is enough with `init` and one restart. The class of rank
            `t` draws its restart `r` from `fold_in(example's key, t · num_restarts + r)`.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; scalar or `[B]`; may be traced.
        norm: `"linf"`, `"l2"` or `"l1"`.
        num_targets: classes to move towards, at least 1; static. There are fewer where fewer are
            left.
        first_target: rank of the first of them, 0 is the runner-up; in `0..K-2`; scalar or `[B]`;
            may be traced. With `num_targets=1` one class at a time, as `autoattack` does.
        num_steps: gradient steps per start, at least 1; static.
        num_restarts: starts for each class, at least 1; static. Only survivors take the next one.
        rho: as in `apgd`.
        bounds: the box of valid inputs.
        targets: `[B]` int, the only class to move towards, and to reach: `num_targets` and
            `first_target` are then unused.
        init: `[B, ...]`, the first start towards each class instead.
        trace: keep the loss of every point judged.

    Returns:
        The result and `info`, as of `apgd`; points and starts are counted over all classes. `info`
        has `target [B]` int32, too, the class moved towards in the last start.

    Raises:
        ValueError: as `apgd`; num_targets below 1, first_target not whole or outside `0..K-2`.

    Example:
        >>> import jax
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.3, 0]])
        >>> x, y = jnp.array([[0.3, 0.3]]), jnp.array([0])
        >>> result = apgd_targeted(logits_fn, jax.random.key(0), x, y, eps=0.25)
        >>> bool(result.success[0]), int(result.info["target"][0])
        (True, 1)

    References:
        Croce & Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
        Diverse Parameter-free Attacks", section 4.1, equation 7, and section 5.
    """
    problem = prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds, open_box=True)
    _validate.count(num_targets=num_targets)
    starts = Starts.of(problem, num_restarts, num_targets, first_target)
    loss = losses.targeted_dlr if num_classes(problem) >= 4 else _gap
    method = _method(problem, starts, loss, eps, rho, init, norm, num_steps)
    return run(method, problem, trace=trace)


def _gap(logits: Array, labels: Array, *, targets: Array) -> Array:
    """z_t - z_y, `[B]`."""
    rows = jnp.arange(logits.shape[0])
    return logits[rows, targets] - logits[rows, labels]


def _method(
    problem: Problem,
    starts: Starts,
    loss: Callable[..., Array],
    eps: ArrayLike,
    rho: ArrayLike,
    init: ArrayLike | None,
    norm: Norm,
    num_steps: int,
    maximizes: bool = False,
) -> APGD:
    """The checked settings."""
    _validate.one_of(NORMS, norm=norm)
    _validate.count(num_steps=num_steps)
    _validate.within(0.0, 1.0, rho=rho)
    if init is None or starts.num_restarts > 1:
        need_key(problem, "random starts")
    rho = one_per_example(rho, problem.inputs, name="rho")
    settings: dict[str, Any] = {
        "loss": as_pytree(loss),
        "eps": radius(eps, problem.inputs),
        "first": None if init is None else start_point(init, problem),
        "starts": starts,
        "norm": norm,
        "num_steps": num_steps,
        "maximizes": maximizes,
    }
    return SparseAPGD(**settings) if norm == "l1" else _MomentumAPGD(rho=rho, **settings)


def _checkpoints(num_steps: int) -> np.ndarray:
    """Steps since the last checkpoint after each number of steps, 0 where it is not one.

    The first one comes after 22% of the steps; each period is 3% shorter than the one before,
    and no shorter than 6%.
    """
    period = max(int(0.22 * num_steps), 1)
    shrink, shortest = max(int(0.03 * num_steps), 1), max(int(0.06 * num_steps), 1)
    periods = np.zeros(num_steps + 1, np.int32)
    step = period
    while step <= num_steps:
        periods[step] = period
        period = max(period - shrink, shortest)
        step += period
    return periods


class _Schedule(NamedTuple):
    previous: Array  # the point that the last step began at
    checked_loss: Array  # the best one at the last checkpoint
    last_loss: Array
    increases: Array  # steps since the last checkpoint in which the loss grew
    halved: Array  # whether the last checkpoint halved the step size
    step_size: Array


@register
class _MomentumAPGD(APGD):
    """The method for linf and l2."""

    rho: Array  # [B]

    def noisy(self, problem: Problem, keys: Array) -> Array:
        """Points on the surface of the ball, as in the released code, clipped into the box."""
        unit = direction(keys, problem.inputs, self.norm)
        return jnp.clip(problem.inputs + norms.per_example(self.eps, unit) * unit, *problem.bounds)

    def into_ball(self, problem: Problem, inputs: Array) -> Array:
        return norms.into_ball_and_box(inputs, problem.inputs, self.eps, self.norm, problem.bounds)

    def first_schedule(self, problem: Problem, start: Array) -> _Schedule:
        zeros, never = jnp.zeros_like(self.eps), jnp.zeros(self.eps.shape, bool)
        return _Schedule(start, zeros, zeros, never.astype(jnp.int32), never, zeros)

    def move(
        self, problem: Problem, state: State, event: Array, now: Visited
    ) -> tuple[Array, _Schedule]:
        """A step with momentum, from the best point where a checkpoint halves the step size."""
        best, schedule, first = state.best, state.schedule, event == 0
        # The reference compares the first step's loss with 0 and not with the start's.
        increases = jnp.where(first, 0, schedule.increases + (now.loss > schedule.last_loss))
        checked_loss = jnp.where(first, now.loss, schedule.checked_loss)
        halved = first | schedule.halved
        step_size = jnp.where(first, 2.0 * self.eps, schedule.step_size)

        period = jnp.asarray(_checkpoints(self.num_steps))[event]
        check = period > 0
        stalled = (increases <= self.rho * period) | (~halved & (checked_loss >= best.loss))
        halve = check & stalled
        step_size = jnp.where(halve, 0.5 * step_size, step_size)
        point, gradient, _ = select(halve, best, now)

        moved = self.into_ball(
            problem, norms.ascend(point, gradient, step_size, self.norm, problem.bounds)
        )
        share = norms.per_example(jnp.where(first, 0.0, _MOMENTUM), point)
        behind = select(first, point, schedule.previous)
        moved = self.into_ball(
            problem, point + (1.0 - share) * (moved - point) + share * (point - behind)
        )
        return moved, _Schedule(
            previous=point,
            checked_loss=jnp.where(check, best.loss, checked_loss),
            last_loss=jnp.where(first, 0.0, now.loss),
            increases=jnp.where(check, 0, increases),
            halved=jnp.where(check, halve, halved),
            step_size=step_size,
        )
