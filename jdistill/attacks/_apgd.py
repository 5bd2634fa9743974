"""Auto-PGD: gradient steps with momentum whose size follows from the progress of the loss."""

from collections.abc import Callable

import jax.numpy as jnp

from jdistill import _validate, losses
from jdistill._precision import full_precision
from jdistill._pytree import as_pytree
from jdistill.attacks import _apgd_core, _apgd_l1
from jdistill.attacks._apgd_core import Search, Settings
from jdistill.attacks._core import problem as _base
from jdistill.attacks._core import targets as _aims
from jdistill.attacks._core.gradient import NORMS as _NORMS
from jdistill.attacks._core.problem import AttackResult, Problem
from jdistill.typing import Array, ArrayLike, LogitsFn


def apgd(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: str = "linf",
    num_steps: int = 100,
    num_restarts: int = 1,
    rho: ArrayLike = 0.75,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    loss: Callable[..., Array] = losses.cross_entropy,
    best_loss: bool = False,
    trace: bool = False,
) -> AttackResult:
    """Auto-PGD: projected gradient ascent with momentum and a step size of its own.

        z  = project(x + η · steepest(∂ loss / ∂x))
        x' = project(x + α (z - x) + (1 - α) (x - x₋₁)),     α = 1 at first, then 0.75

    η starts at twice the radius. At checkpoints, which follow each other ever more closely, it is
    halved where the loss grew in too few of the steps since the last one, or where the best loss
    has not changed; the example then goes on from its best point. Nothing has to be chosen.

    For l1 the steps follow the signs of the largest gradients alone, two thirds as many as the best
    point had changed features at the last checkpoint, without momentum; each start runs through
    balls of 3, 2 and 1 times the radius, with 30, 30 and 40 % of the steps.

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
        num_steps: gradient steps a start, at least 1; static.
        num_restarts: starts, at least 1; static. Only survivors take the next one.
        rho: ρ, the share of steps in which the loss must grow, in `[0, 1]`; scalar or `[B]`; may
            be traced. Unused for l1.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to move towards; None moves away from the labels.
        init: `[B, ...]`, the first start instead (projected into ball and box).
        loss: per-example loss `(logits [B, K], labels [B]) -> [B]`, maximized (for targets:
            minimized). Bind numbers as in `fgsm`.
        best_loss: go on after a success, attack what is wrong to begin with too, and return the
            point of the largest loss of all starts, as training on adversarial examples wants it;
            static.
        trace: keep the loss of every step.

    Returns:
        The result. An example that resists is returned at the point of the largest loss of its
        last start. `info`: `first_success [B]` int32, the step (0: the start) at which it
        succeeded, -1 if never; `restart [B]` int32, the start it ended in; with `trace`, `loss
        [B, num_restarts, num_steps + 1]` (for l1 two more), what was maximized at each start and
        after each step, NaN where the example had stopped.

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
    """
    problem = _base.prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds)
    return _search(
        problem,
        loss,
        eps,
        rho,
        init,
        norm=norm,
        num_steps=num_steps,
        num_restarts=num_restarts,
        num_targets=None,
        first_target=jnp.zeros((), jnp.int32),
        best_loss=best_loss,
        trace=trace,
    )


def apgd_targeted(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: str = "linf",
    num_targets: int = 9,
    first_target: ArrayLike = 0,
    num_steps: int = 100,
    num_restarts: int = 1,
    rho: ArrayLike = 0.75,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """APGD-T: Auto-PGD towards one class after another, on the targeted DLR loss.

    The classes are taken in the order of the clean logits, the runner-up first. Any class but the
    label is a success, whichever was aimed at. Below four classes the loss is not defined; there
    the difference of the two logits, z_t - z_y, takes its place.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: one key, or `[B]` keys; None is enough with `init` and one restart. The class of rank
            `t` draws its restart `r` from `fold_in(example's key, t · num_restarts + r)`.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; scalar or `[B]`; may be traced.
        norm: `"linf"`, `"l2"` or `"l1"`.
        num_targets: classes aimed at, at least 1, and at most as many as there are; static.
        first_target: rank of the first class aimed at, 0 is the runner-up; in `0..K-2`; a scalar;
            may be traced. With `num_targets=1` one class at a time, as `autoattack` does.
        num_steps: gradient steps a start, at least 1; static.
        num_restarts: starts for each class, at least 1; static. Only survivors take the next one.
        rho: as in `apgd`.
        bounds: the box of valid inputs.
        targets: `[B]` int, the one class to aim at, and to reach: `num_targets` and `first_target`
            are then unused.
        init: `[B, ...]`, the first start towards each class instead.
        trace: keep the loss of every step.

    Returns:
        The result, as of `apgd`. `info`: `first_success [B]` int32, the step at which it
        succeeded, -1 if never; `restart [B]` int32, the start it ended in, counted over all
        targets; `target [B]` int32, the class aimed at in it; with `trace`, `loss [B, num_targets
        · num_restarts, num_steps + 1]`.

    Raises:
        ValueError: as `apgd`; num_targets below 1, first_target outside `0..K-2`.

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
    problem = _base.prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds)
    num_targets, first = _aims.check(problem, num_targets, first_target)
    return _search(
        problem,
        losses.targeted_dlr if _base.num_classes(problem) >= 4 else _gap,
        eps,
        rho,
        init,
        norm=norm,
        num_steps=num_steps,
        num_restarts=num_restarts,
        num_targets=num_targets,
        first_target=first,
        best_loss=False,
        trace=trace,
    )


def _gap(logits: Array, labels: Array, *, targets: Array) -> Array:
    """z_t - z_y, `[B]`."""
    rows = jnp.arange(logits.shape[0])
    return logits[rows, targets] - logits[rows, labels]


def _search(
    problem: Problem,
    loss: Callable[..., Array],
    eps: ArrayLike,
    rho: ArrayLike,
    init: ArrayLike | None,
    *,
    norm: str,
    num_steps: int,
    num_restarts: int,
    num_targets: int | None,
    first_target: Array,
    best_loss: bool,
    trace: bool,
) -> AttackResult:
    """Check the arguments that both attacks share, and run."""
    _validate.one_of(_NORMS, norm=norm)
    _validate.count(num_steps=num_steps, num_restarts=num_restarts)
    _validate.within(0.0, 1.0, rho=rho)
    if init is None or num_restarts > 1:
        _base.need_key(problem, "random starts")
    if init is not None:
        init = _base.start_point(init, problem)
    search = Search(
        problem,
        as_pytree(loss),
        _base.radius(eps, problem.inputs),
        _base.one_per_example(rho, problem.inputs, name="rho"),
        init,
        first_target,
    )
    settings = Settings(norm, num_steps, num_restarts, num_targets, best_loss, trace)
    run = _apgd_l1.run if norm == "l1" else _apgd_core.run
    with full_precision():
        return run(search, settings)
