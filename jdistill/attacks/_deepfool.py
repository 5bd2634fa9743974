"""DeepFool: steps to the nearest boundary of the linearized network."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, norms
from jdistill._jax import register, static_field
from jdistill.attacks._core import gradient, hyperplane
from jdistill.attacks._core.engine import Method, Passes, Seen, run
from jdistill.attacks._core.problem import (
    AttackResult,
    Problem,
    num_classes,
    prepare,
    radius,
    start_point,
)
from jdistill.attacks._core.traits import facts
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn, Norm

_NORMS: tuple[Norm, ...] = ("l2", "linf")
# Of the box's width: the least length of a step. Exactly on a boundary the distance to it is 0.
_LEAST_STEP = 1e-5
# By how much an iterate must pass the goal to end the attack, in units in the last place of the
# largest logit: in a batch of another size, as the verification's may be, less can round to a tie.
_BEYOND_ROUNDING = 8


@facts(title="DeepFool", norms=_NORMS, minimum_norm=True)
def deepfool(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    norm: Norm = "l2",
    num_steps: int = 50,
    overshoot: ArrayLike = 0.02,
    num_candidates: int = 10,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """Small perturbation by steps to the nearest boundary of the linearized network.

    At each iterate every candidate class `k` has the boundary `z_k = z_y` of the linearized
    logits. The step `r` leads straight to the nearest one; `q` is the dual of the attack's norm::

        k = argmin_k (z_y - z_k) / ‖∇z_k - ∇z_y‖_q        w = ∇z_k - ∇z_y
        r = (z_y - z_k) / ‖w‖_q · steepest(w)              (l2: w / ‖w‖₂, linf: sign(w))

    The steps are summed without the overshoot, the sum is kept inside the box, so that a feature
    at its bound does not pile them up, and each iterate is the input plus the whole sum times
    `1 + overshoot`::

        s ← clip(s + r, low - x, high - x)        x' = clip(x + (1 + overshoot) · s, low, high)

    An example stops at its first iterate that is misclassified by more than rounding. It is
    returned as it is, so its distance includes the overshoot: on a linear network it is
    `1 + overshoot` times the smallest one.

    Only the ratio of logits to gradients counts, so their scale changes nothing, and there is no
    softmax that could saturate.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        norm: `"l2"`, as in the paper, or `"linf"`.
        num_steps: most steps per example, at least 1; static.
        overshoot: share by which each iterate goes beyond the sum of its steps, at least 0;
            scalar or `[B]`; may be traced. At 0 the iterates tend to end on the boundary itself,
            which is no success.
        num_candidates: classes that are linearized, the true one included: those of the largest
            clean logits; at least 2, static. All of them where the network has fewer. Each step
            costs one forward pass and `num_candidates - 1` backward passes.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label. Towards a target
            there is one boundary, that between the target and the largest other logit, and each
            step costs one backward pass.
        init: `[B, ...]`, moved into the box: the sum of the steps starts at `init - x`, not at 0.
        trace: keep by how much each iterate passes the goal.

    Returns:
        The result. Where nothing was found: the clean input, `success=False`, `distance=inf`.
        `distance` is to the clean input in `norm`. `info`: `first_success`, where 1 is the point
        before the first step; `gradients`; with `trace`, by how many logits each iterate passes
        the goal, before its step, `trace [B, num_steps]`. See `jdistill.attacks`.

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
        adds 1e-4 to every distance; an iterate that is misclassified by rounding alone moves on.
        The targeted form is ours.
    """
    del key
    _validate.one_of(_NORMS, norm=norm)
    _validate.count(num_steps=num_steps)
    _validate.count(minimum=2, num_candidates=num_candidates)
    problem = prepare(
        logits_fn, None, inputs, labels, targets=targets, bounds=bounds, open_box=True
    )
    start = jnp.zeros_like(problem.inputs)
    if init is not None:
        start = jnp.clip(start_point(init, problem), *problem.bounds) - problem.inputs
    num_candidates = min(num_candidates, num_classes(problem))
    method = _DeepFool(
        overshoot=radius(overshoot, problem.inputs, name="overshoot"),
        start=start,
        norm=norm,
        num_events=num_steps,
        num_boundaries=num_candidates - 1 if targets is None else 1,
    )
    return run(method, problem, trace=trace)


class _State(NamedTuple):
    total: Array  # the sum of the steps, without the overshoot
    candidates: Array | None  # [B, C], the classes looked at, without the label; None with targets


@register
class _DeepFool(Method):
    overshoot: Array  # [B]
    start: Array  # [B, ...], what the sum of the steps starts at
    norm: Norm = static_field()
    num_events: int = static_field()
    num_boundaries: int = static_field()
    minimum_norm = True

    @property
    def passes(self) -> Passes:  # type: ignore[override]
        return Passes(1, self.num_boundaries)

    def init(self, problem: Problem) -> tuple[_State, Array]:
        logits, candidates = problem.logits_fn(problem.inputs), None
        if problem.goal.targets is None:
            own = jax.nn.one_hot(problem.goal.labels, logits.shape[1], dtype=bool)
            # The label comes first, whatever it ties with, and is left out.
            ranked = jnp.where(own, jnp.inf, logits)
            candidates = jax.lax.top_k(ranked, self.num_boundaries + 1)[1][:, 1:]
        return _State(self.start, candidates), logits

    def step(self, problem: Problem, state: _State, event: Array) -> tuple[_State, Seen]:
        """Judge the current iterate, then move it to the nearest boundary."""
        inputs, goal, (low, high) = problem.inputs, problem.goal, problem.bounds
        logits, pull_back = jax.vjp(problem.logits_fn, self.point(problem, state))
        excess = goal.excess(logits)
        largest = jnp.max(jnp.abs(logits), axis=1, where=~jnp.isneginf(logits), initial=0.0)
        rounding = jnp.finfo(inputs.dtype).eps * largest
        # Otherwise the verification might fail, and the attack return nothing.
        success = goal.reached(logits) & (excess > _BEYOND_ROUNDING * rounding)

        raised, lowered = _boundaries(problem, state.candidates, logits)
        gaps = jnp.take_along_axis(logits, lowered, 1) - jnp.take_along_axis(logits, raised, 1)
        one_hot = functools.partial(jax.nn.one_hot, num_classes=logits.shape[1], dtype=logits.dtype)
        normals = gradient.of_each(pull_back, one_hot(raised) - one_hot(lowered))
        distance, direction = _nearest(gaps, normals, self.norm)
        moving = jnp.isfinite(distance)
        # A box without an end says nothing of what is little; the input's own size does.
        size = norms.distance(inputs, "linf")
        size = jnp.where(jnp.isfinite(problem.width), problem.width, size)
        length = jnp.where(moving, jnp.maximum(distance, _LEAST_STEP * size), 0.0)
        moved = state.total + norms.per_example(length, direction) * direction
        new = state._replace(total=jnp.clip(moved, low - inputs, high - inputs))
        # With nothing to follow the next iterate would be this one again.
        return new, Seen(success, excess, spent=~moving)

    def point(self, problem: Problem, state: _State) -> Array:
        factor = norms.per_example(1 + self.overshoot, state.total)
        return jnp.clip(problem.inputs + factor * state.total, *problem.bounds)


def _boundaries(problem: Problem, candidates: Array | None, logits: Array) -> tuple[Array, Array]:
    """The classes to raise and to lower at each boundary, `[B, C]` each."""
    goal = problem.goal
    if goal.targets is None:
        assert candidates is not None
        return candidates, jnp.broadcast_to(goal.labels[:, None], candidates.shape)
    own = jax.nn.one_hot(goal.targets, logits.shape[1], dtype=bool)
    other = jnp.argmax(jnp.where(own, -jnp.inf, logits), axis=1)
    return goal.targets[:, None], other[:, None]


def _nearest(gaps: Array, normals: Array, norm: Norm) -> tuple[Array, Array]:
    """The distance `[B]` to the nearest boundary and the direction `[B, ...]` of unit norm to it.

    `gaps [B, C]` are logits, `normals [B, C, ...]` gradients. The distance is `inf` where no
    boundary can be reached: no gradient, or nothing finite.
    """
    rows = normals.reshape(gaps.size, *normals.shape[2:])
    units, unit_gaps = hyperplane.unit(rows, gaps.reshape(gaps.size))
    distances = hyperplane.distance(units, unit_gaps, norm).reshape(gaps.shape)
    index = jnp.argmin(distances, axis=1)
    picked = index.reshape(index.shape + (1,) * (normals.ndim - 1))
    normal = jnp.take_along_axis(normals, picked, axis=1)[:, 0]
    distance = jnp.take_along_axis(distances, index[:, None], axis=1)[:, 0]
    return distance, norms.steepest(normal, norm)
