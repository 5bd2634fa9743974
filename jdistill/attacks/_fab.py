"""FAB: steps between a point and the input, both projected onto the linearized boundary."""

import jax.numpy as jnp

from jdistill import _validate
from jdistill._precision import full_precision
from jdistill.attacks._core import problem as _base
from jdistill.attacks._core import targets as _aims
from jdistill.attacks._core.gradient import NORMS as _NORMS
from jdistill.attacks._core.problem import AttackResult, Problem
from jdistill.attacks._fab_core import Search, Settings, run
from jdistill.typing import Array, ArrayLike, LogitsFn


def fab(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike | None = None,
    norm: str = "linf",
    num_steps: int = 100,
    num_restarts: int = 1,
    alpha_max: ArrayLike = 0.1,
    eta: ArrayLike = 1.05,
    beta: ArrayLike = 0.9,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
) -> AttackResult:
    """Fast adaptive boundary attack: small perturbations by projections onto boundaries.

    The linearized boundary nearest to the iterate is a hyperplane. The iterate `x` and the input
    `x₀` are both projected onto it within the box, by `d` and `d₀`, and the step leads between the
    two, a little beyond the boundary; a point that is adversarial is then drawn towards the input:

        α  = min(‖d‖ / (‖d‖ + ‖d₀‖), alpha_max)
        x' = clip((1 - α) (x + η d) + α (x₀ + η d₀))
        x' ← x₀ + β (x' - x₀)   where x' is adversarial

    The nearest adversarial point of all steps is returned. No step size has to be chosen, and no
    scale of the logits changes anything: distillation hides nothing from it.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: one key, or `[B]` keys; None is enough with one start, which draws nothing. Start `s`
            draws from `fold_in(example's key, s)`.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        eps: success only within this radius, at least 0; scalar or `[B]`; may be traced. An
            example then ends with the start that succeeded. None looks for the smallest distance
            over all of them.
        norm: `"linf"`, `"l2"` or `"l1"`.
        num_steps: steps a start, at least 1; static. Each costs two forward passes, and one
            backward pass for each class but the label.
        num_restarts: starts, at least 1; static. The first is at the input. The others are at
            random at half of `eps` from it; without `eps`, at half the smallest distance so far.
        alpha_max: the largest weight of the input in a step, in `[0, 1]`; scalar or `[B]`.
        eta: η, the length of a step over the way to the boundary, at least 0; scalar or `[B]`.
        beta: β, the share of its distance that an adversarial point keeps, in `[0, 1]`; scalar or
            `[B]`.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label. Towards a target
            the boundary is that between it and the largest other logit, and a step costs one
            backward pass.

    Returns:
        The result. Where nothing was found (with `eps`: within it): the clean input,
        `success=False`, `distance=inf`. `distance` is to the clean input in `norm`. `info`:
        `first_success [B]` int32, the step, counted over all starts, at which the first such point
        was seen (0: the clean input), -1 if never; `restart [B]` int32, the start that the
        returned point is from; with `targets`, `target [B]`, which are those.

    Raises:
        ValueError: an unknown norm, counts below 1, eps or eta below 0, alpha_max or beta outside
            `[0, 1]`, inputs not finite or outside the box, labels or targets outside `0..K-1`, no
            key where one is needed.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.8, 0]])
        >>> x, y = jnp.array([[0.4, 0.4]]), jnp.array([0])
        >>> result = fab(logits_fn, None, x, y)
        >>> bool(result.success[0]), bool(0.2 < result.distance[0] < 0.203)  # exactly: 0.2
        (True, True)

    References:
        Croce & Hein 2020, "Minimally distorted Adversarial Examples with a Fast Adaptive Boundary
        Attack", section 3 and algorithm 1; the settings, and no final search, as in AutoAttack.
        The targeted form with `targets` is ours.
    """
    problem = _base.prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds)
    return _search(
        problem,
        eps,
        alpha_max,
        eta,
        beta,
        norm=norm,
        num_steps=num_steps,
        num_restarts=num_restarts,
        num_targets=None,
        first_target=jnp.zeros((), jnp.int32),
    )


def fab_targeted(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike | None = None,
    norm: str = "linf",
    num_targets: int = 9,
    first_target: ArrayLike = 0,
    num_steps: int = 100,
    num_restarts: int = 1,
    alpha_max: ArrayLike = 0.1,
    eta: ArrayLike = 1.05,
    beta: ArrayLike = 0.9,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
) -> AttackResult:
    """FAB-T: the fast adaptive boundary attack at the boundary of one class after another.

    The classes are taken in the order of the clean logits, the runner-up first, and every step is
    at the boundary between the class and the label. Any class but the label is a success,
    whichever was aimed at. A step costs one backward pass, however many classes there are.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: one key, or `[B]` keys; None is enough with one start towards each class, which draws
            nothing. Target `t`, restart `r` draws from `fold_in(key, t · num_restarts + r)`.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        eps: success only within this radius, at least 0; scalar or `[B]`; may be traced. An
            example then ends with the start that succeeded. None looks for the smallest distance
            over all of them.
        norm: `"linf"`, `"l2"` or `"l1"`.
        num_targets: classes aimed at, at least 1, and at most as many as there are; static.
        first_target: rank of the first class aimed at, 0 is the runner-up; in `0..K-2`; a scalar;
            may be traced. With `num_targets=1` one class at a time, as `autoattack` does.
        num_steps: steps a start, at least 1; static. Each costs two forward passes and one
            backward pass.
        num_restarts: starts for each class, at least 1; static; as in `fab`.
        alpha_max: the largest weight of the input in a step, in `[0, 1]`; scalar or `[B]`.
        eta: η, the length of a step over the way to the boundary, at least 0; scalar or `[B]`.
        beta: β, the share of its distance that an adversarial point keeps, in `[0, 1]`; scalar or
            `[B]`.
        bounds: the box of valid inputs.
        targets: `[B]` int, the one class to aim at, and to reach, as in `fab`: `num_targets` is
            then unused.

    Returns:
        The result, as of `fab`, the steps and starts counted over all classes. `info` has
        `target [B]` int32 too, the class aimed at in the start that the returned point is from.

    Raises:
        ValueError: as `fab`; num_targets below 1, first_target outside `0..K-2`.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.8, 0]])
        >>> x, y = jnp.array([[0.4, 0.4]]), jnp.array([0])
        >>> result = fab_targeted(logits_fn, None, x, y)
        >>> bool(0.2 < result.distance[0] < 0.203), int(result.info["target"][0])  # exactly: 0.2
        (True, 1)

    References:
        Croce & Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
        Diverse Parameter-free Attacks" (FAB-T), after the same authors' "Minimally distorted
        Adversarial Examples with a Fast Adaptive Boundary Attack". `targets` are ours.
    """
    problem = _base.prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds)
    num_targets, first = _aims.check(problem, num_targets, first_target)
    return _search(
        problem,
        eps,
        alpha_max,
        eta,
        beta,
        norm=norm,
        num_steps=num_steps,
        num_restarts=num_restarts,
        num_targets=num_targets,
        first_target=first,
    )


def _search(
    problem: Problem,
    eps: ArrayLike | None,
    alpha_max: ArrayLike,
    eta: ArrayLike,
    beta: ArrayLike,
    *,
    norm: str,
    num_steps: int,
    num_restarts: int,
    num_targets: int | None,
    first_target: Array,
) -> AttackResult:
    """Check the arguments that both attacks share, and run."""
    _validate.one_of(_NORMS, norm=norm)
    _validate.count(num_steps=num_steps, num_restarts=num_restarts)
    _validate.within(0.0, 1.0, alpha_max=alpha_max, beta=beta)
    if num_restarts > 1:
        _base.need_key(problem, "random starts")
    inputs = problem.inputs
    nowhere = jnp.full(inputs.shape[:1], jnp.inf, inputs.dtype)
    search = Search(
        problem,
        nowhere if eps is None else _base.radius(eps, inputs),
        _base.one_per_example(alpha_max, inputs, name="alpha_max"),
        _base.radius(eta, inputs, name="eta"),
        _base.one_per_example(beta, inputs, name="beta"),
        first_target,
    )
    if problem.goal.targets is not None:
        num_targets = 1
    settings = Settings(norm, num_steps, num_restarts, num_targets, eps is not None)
    with full_precision():
        return run(search, settings)
