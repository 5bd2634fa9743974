"""DeepFool: steps to the nearest boundary of the linearized network."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, norms
from jdistill._precision import full_precision
from jdistill.attacks._core import hyperplane as _hyperplane
from jdistill.attacks._core import problem as _base
from jdistill.attacks._core.problem import AttackResult, Problem
from jdistill.attacks._loop import until_done
from jdistill.typing import Array, ArrayLike, LogitsFn

_NORMS = ("l2", "linf")
# Of the box's width: the least length of a step. Exactly on a boundary the distance to it is 0.
_LEAST_STEP = 1e-5


def deepfool(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    norm: str = "l2",
    num_steps: int = 50,
    overshoot: ArrayLike = 0.02,
    num_candidates: int = 10,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
) -> AttackResult:
    """Small perturbation by steps to the nearest boundary of the linearized network.

    At each iterate every candidate class `k` has the boundary `z_k = z_y` of the linearized
    logits. The step `r` leads straight to the nearest one; `q` is the dual of the attack's norm:

        k = argmin_k (z_y - z_k) / ‖∇z_k - ∇z_y‖_q        w = ∇z_k - ∇z_y
        r = (z_y - z_k) / ‖w‖_q · steepest(w)              (l2: w / ‖w‖₂, linf: sign(w))

    The steps are summed without the overshoot, the sum is kept inside the box, and each iterate
    is the input plus the whole sum times `1 + overshoot`:

        s ← clip(s + r, low - x, high - x)        x' = clip(x + (1 + overshoot) · s, low, high)

    An example stops at its first misclassified iterate. It is returned as it is, so its distance
    includes the overshoot: on a linear network it is `1 + overshoot` times the smallest one.

    Only the ratio of logits to gradients counts, so their scale changes nothing, and there is no
    softmax that could saturate.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        norm: `"l2"` or `"linf"`.
        num_steps: most steps an example takes, at least 1; static.
        overshoot: share by which each iterate goes beyond the sum of its steps, at least 0; a
            scalar or `[B]`; may be traced. At 0 the iterates tend to end on the boundary itself,
            which is no success.
        num_candidates: classes that are linearized, the true one included: those of the largest
            clean logits; at least 2, static. All of them where the network has fewer. Each step
            costs one forward pass and `num_candidates - 1` backward passes.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label. Towards a target
            there is one boundary, that between the target and the largest other logit, and each
            step costs one backward pass.

    Returns:
        The result. Where nothing was found: the clean input, `success=False`, `distance=inf`.
        `distance` is to the clean input in `norm`. `info`: `first_success [B]` int32, the number
        of steps taken until success, -1 if never.

    Raises:
        ValueError: an unknown norm, counts too small, overshoot below 0 or NaN, inputs not finite
            or outside the box, labels or targets outside `0..K-1`.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.8, 0]])
        >>> x, y = jnp.array([[0.4, 0.4]]), jnp.array([0])
        >>> result = deepfool(logits_fn, None, x, y)  # exactly: 0.2 √2
        >>> bool(result.success[0]), round(float(result.distance[0] / 2**0.5), 3)
        (True, 0.204)

    References:
        Moosavi-Dezfooli, Fawzi & Frossard 2016, "DeepFool: a simple and accurate method to fool
        deep neural networks", algorithm 2, and section 3.3 for other norms than l2. As in the
        released code, and not as printed, the overshoot is part of every iterate: without it the
        iterates approach the boundary and need not cross it. Departures: the box; a step is at
        least 1e-5 of the box's width long, so that it leaves a boundary, where the released code
        adds 1e-4 to every distance. The targeted form is ours.
    """
    del key
    _validate.one_of(_NORMS, norm=norm)
    _validate.count(num_steps=num_steps)
    _validate.count(minimum=2, num_candidates=num_candidates)
    problem = _base.prepare(logits_fn, None, inputs, labels, targets=targets, bounds=bounds)
    with full_precision():
        return _deepfool(
            problem,
            _base.radius(overshoot, problem.inputs, name="overshoot"),
            norm=norm,
            num_steps=num_steps,
            num_candidates=num_candidates,
        )


class _Carry(NamedTuple):
    """The state of each example; every leaf leads with `[B]`."""

    total: Array  # [B, ...], the sum of the steps, without the overshoot
    step: Array
    done: Array
    first_success: Array
    queries: Array


def _candidates(problem: Problem, clean_logits: Array, num_candidates: int) -> Array:
    """The classes whose boundaries an untargeted attack looks at, `[B, C]`, without the label."""
    num_classes = clean_logits.shape[1]
    own = jax.nn.one_hot(problem.goal.labels, num_classes, dtype=bool)
    # The label comes first, whatever it ties with, and is left out.
    ranked = jnp.where(own, jnp.inf, clean_logits)
    return jax.lax.top_k(ranked, min(num_candidates, num_classes))[1][:, 1:]


def _boundaries(problem: Problem, candidates: Array, logits: Array) -> tuple[Array, Array]:
    """The classes to raise and to lower at each boundary, `[B, C]` each."""
    goal = problem.goal
    if goal.targets is None:
        return candidates, jnp.broadcast_to(goal.labels[:, None], candidates.shape)
    own = jax.nn.one_hot(goal.targets, logits.shape[1], dtype=bool)
    other = jnp.argmax(jnp.where(own, -jnp.inf, logits), axis=1)
    return goal.targets[:, None], other[:, None]


def _nearest(gaps: Array, normals: Array, norm: str) -> tuple[Array, Array]:
    """The distance `[B]` to the nearest boundary and the direction `[B, ...]` of unit norm to it.

    `gaps [B, C]` are logits, `normals [B, C, ...]` gradients. The distance is `inf` where no
    boundary can be reached: no gradient, or nothing finite.
    """
    rows = normals.reshape(gaps.size, *normals.shape[2:])
    units, unit_gaps = _hyperplane.unit(rows, gaps.reshape(gaps.size))
    distances = _hyperplane.distance(units, unit_gaps, norm).reshape(gaps.shape)
    index = jnp.argmin(distances, axis=1)
    picked = index.reshape(index.shape + (1,) * (normals.ndim - 1))
    normal = jnp.take_along_axis(normals, picked, axis=1)[:, 0]
    distance = jnp.take_along_axis(distances, index[:, None], axis=1)[:, 0]
    return distance, norms.steepest(normal, norm)


def _iterate(problem: Problem, overshoot: Array, total: Array) -> Array:
    factor = norms.per_example(1 + overshoot, total)
    return jnp.clip(problem.inputs + factor * total, *problem.bounds)


def _init(problem: Problem, clean_success: Array) -> _Carry:
    zeros = jnp.zeros(clean_success.shape, jnp.int32)
    return _Carry(
        total=jnp.zeros_like(problem.inputs),
        step=zeros,
        done=clean_success,
        first_success=jnp.where(clean_success, 0, -1),
        queries=zeros + 1,  # the clean forward pass
    )


def _step(
    norm: str,
    num_steps: int,
    problem: Problem,
    overshoot: Array,
    candidates: Array,
    carry: _Carry,
) -> _Carry:
    """Judge the current iterate, then move those that are not through to the nearest boundary."""
    active = ~carry.done
    low, high = problem.bounds
    logits, pull_back = jax.vjp(problem.logits_fn, _iterate(problem, overshoot, carry.total))
    success = active & problem.goal.reached(logits)

    raised, lowered = _boundaries(problem, candidates, logits)
    gaps = jnp.take_along_axis(logits, lowered, 1) - jnp.take_along_axis(logits, raised, 1)
    one_hot = functools.partial(jax.nn.one_hot, num_classes=logits.shape[1], dtype=logits.dtype)
    normals = jax.vmap(lambda row: pull_back(row)[0], in_axes=1, out_axes=1)(
        one_hot(raised) - one_hot(lowered)
    )
    distance, direction = _nearest(gaps, normals, norm)
    # With nothing to follow the next iterate would be this one again.
    moving = active & ~success & jnp.isfinite(distance)
    length = jnp.where(moving, jnp.maximum(distance, _LEAST_STEP * (high - low)), 0.0)
    moved = carry.total + norms.per_example(length, direction) * direction
    step = carry.step + moving
    return _Carry(
        total=jnp.clip(moved, low - problem.inputs, high - problem.inputs),
        step=step,
        # The last iterate is judged by the verification that follows the loop.
        done=carry.done | ~moving | (step == num_steps),
        first_success=jnp.where(success, carry.step, carry.first_success),
        queries=carry.queries + active,
    )


@functools.partial(jax.jit, static_argnames=("norm", "num_steps", "num_candidates"))
def _deepfool(
    problem: Problem, overshoot: Array, *, norm: str, num_steps: int, num_candidates: int
) -> AttackResult:
    clean_logits = problem.logits_fn(problem.inputs)
    clean_success = problem.goal.reached_clean(clean_logits)
    candidates = _candidates(problem, clean_logits, num_candidates)
    carry = until_done(
        functools.partial(_step, norm, num_steps),
        (problem, overshoot, candidates),
        _init(problem, clean_success),
        at_most=num_steps,
        spread=problem.spread,
    )
    result = _base.finish(
        problem,
        _iterate(problem, overshoot, carry.total),
        clean_success=clean_success,
        found=jnp.ones(clean_success.shape, bool),
        queries=carry.queries,
        norm=norm,
        info={},
        minimum_norm=True,
    )
    first = jnp.where(result.success & (carry.first_success < 0), num_steps, carry.first_success)
    return result._replace(info={"first_success": first.astype(jnp.int32)})
