"""FAB: steps between a point and the input, both projected onto the linearized boundary."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, norms
from jdistill._jax import register, static_field
from jdistill.attacks._core import hyperplane
from jdistill.attacks._core.engine import Method, Passes, Progress, Seen, run, select
from jdistill.attacks._core.gradient import NORMS
from jdistill.attacks._core.problem import (
    AttackResult,
    Problem,
    need_key,
    num_classes,
    one_per_example,
    prepare,
    radius,
)
from jdistill.attacks._core.targets import Starts, direction
from jdistill.attacks._core.traits import Settings, facts
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn, Norm


def _without_radius(settings: Settings) -> bool:
    return settings["eps"] is None


@facts(title="FAB", norms=NORMS, minimum_norm=_without_radius)
def fab(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike | None = None,
    norm: Norm = "linf",
    num_steps: int = 100,
    num_restarts: int = 1,
    alpha_max: ArrayLike = 0.1,
    eta: ArrayLike = 1.05,
    beta: ArrayLike = 0.9,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """Fast adaptive boundary attack: small perturbations by projections onto boundaries.

    The linearized boundary nearest to the iterate is a hyperplane. The iterate `x` and the input
    `x₀` are both projected onto it within the box, by `d` and `d₀`, and the step leads between the
    two, a little beyond the boundary; a point that is adversarial is then drawn towards the input::

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
        num_steps: steps per start, at least 1; static. Each costs two forward passes, and one
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
        trace: keep the distance of every point judged.

    Returns:
        The result. Where nothing was found (with `eps`: within it): the clean input,
        `success=False`, `distance=inf`. `distance` is to the clean input in `norm`. `info`:
        `first_success`, over all starts; `gradients`; `restart [B]` int32, the start that the
        returned point is from; with `targets`, `target [B]` int32, which are those; with `trace`,
        the distance of every point that a step leads to, `inf` where it is not adversarial,
        `trace [B, num_restarts · num_steps]`. See `jdistill.attacks`.

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
    problem = prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds, open_box=True)
    # Towards a target the boundary is that of one class.
    starts = Starts.of(problem, num_restarts, None if targets is None else 1)
    method = _method(problem, starts, eps, alpha_max, eta, beta, norm, num_steps)
    return run(method, problem, trace=trace)


@facts(title="FAB-T", norms=NORMS, minimum_norm=_without_radius)
def fab_targeted(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike | None = None,
    norm: Norm = "linf",
    num_targets: int = 9,
    first_target: ArrayLike = 0,
    num_steps: int = 100,
    num_restarts: int = 1,
    alpha_max: ArrayLike = 0.1,
    eta: ArrayLike = 1.05,
    beta: ArrayLike = 0.9,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """FAB-T: the fast adaptive boundary attack at the boundary of one class after another.

    The classes are taken in the order of the clean logits, the runner-up first, and every step is
    at the boundary between the class and the label. Any class but the label is a success,
    whichever was the target. A step costs one backward pass, however many classes there are.

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
        num_targets: classes to move towards, at least 1; static. There are fewer where fewer are
            left.
        first_target: rank of the first of them, 0 is the runner-up; in `0..K-2`; scalar or `[B]`;
            may be traced. With `num_targets=1` one class at a time, as `autoattack` does.
        num_steps: steps per start, at least 1; static. Each costs two forward passes and one
            backward pass.
        num_restarts: starts for each class, at least 1; static; as in `fab`.
        alpha_max: the largest weight of the input in a step, in `[0, 1]`; scalar or `[B]`.
        eta: η, the length of a step over the way to the boundary, at least 0; scalar or `[B]`.
        beta: β, the share of its distance that an adversarial point keeps, in `[0, 1]`; scalar or
            `[B]`.
        bounds: the box of valid inputs.
        targets: `[B]` int, the only class to move towards, and to reach, as in `fab`:
            `num_targets` and `first_target` are then unused.
        trace: keep the distance of every point judged.

    Returns:
        The result and `info`, as of `fab`; steps and starts are counted over all classes. `info`
        has `target [B]` int32 in any case, the class moved towards in the start that the returned
        point is from.

    Raises:
        ValueError: as `fab`; num_targets below 1, first_target not whole or outside `0..K-2`.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.8, 0]])
        >>> x, y = jnp.array([[0.4, 0.4]]), jnp.array([0])
        >>> result = fab_targeted(logits_fn, None, x, y)
        >>> bool(0.2 < result.distance[0] < 0.203), int(result.info["target"][0])  # exactly: 0.2
        (True, 1)

    References:
        Croce & Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
        Diverse Parameter-free Attacks" (FAB-T), after the same authors' "Minimally distorted
        Adversarial Examples with a Fast Adaptive Boundary Attack". The form with `targets` is ours.
    """
    problem = prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds, open_box=True)
    _validate.count(num_targets=num_targets)
    starts = Starts.of(problem, num_restarts, num_targets, first_target)
    method = _method(problem, starts, eps, alpha_max, eta, beta, norm, num_steps)
    return run(method, problem, trace=trace)


def _method(
    problem: Problem,
    starts: Starts,
    eps: ArrayLike | None,
    alpha_max: ArrayLike,
    eta: ArrayLike,
    beta: ArrayLike,
    norm: Norm,
    num_steps: int,
) -> "_FAB":
    """The checked settings."""
    _validate.one_of(NORMS, norm=norm)
    _validate.count(num_steps=num_steps)
    _validate.within(0.0, 1.0, alpha_max=alpha_max, beta=beta)
    if starts.num_restarts > 1:
        need_key(problem, "random starts")
    inputs = problem.inputs
    unlimited = jnp.full(inputs.shape[:1], jnp.inf, inputs.dtype)
    backward = num_classes(problem) - 1 if starts.num_targets is None else 1
    return _FAB(
        eps=unlimited if eps is None else radius(eps, inputs),
        alpha_max=one_per_example(alpha_max, inputs, name="alpha_max"),
        eta=radius(eta, inputs, name="eta"),
        beta=one_per_example(beta, inputs, name="beta"),
        starts=starts,
        norm=norm,
        num_steps=num_steps,
        passes=Passes(2, backward),
    )


class _State(NamedTuple):
    inputs: Array
    distance: Array  # the smallest so far
    targets: Array | None  # [B, num_targets]


@register
class _FAB(Method):
    eps: Array  # [B]; inf without a radius
    alpha_max: Array  # [B]
    eta: Array  # [B]
    beta: Array  # [B]
    starts: Starts
    norm: Norm = static_field()
    num_steps: int = static_field()
    passes: Passes = static_field()
    minimum_norm = True
    keeps_closest = True
    narrows = False

    @property
    def num_events(self) -> int:  # type: ignore[override]
        return self.starts.most * self.num_steps

    def init(self, problem: Problem) -> tuple[_State, Array]:
        logits = problem.logits_fn(problem.inputs)
        targets = self.starts.targets(problem.goal, logits)
        return _State(problem.inputs, jnp.full_like(self.eps, jnp.inf), targets), logits

    def no_note(self, problem: Problem) -> Array:
        return jnp.zeros(self.eps.shape, jnp.int32)

    def step(self, problem: Problem, state: _State, event: Array) -> tuple[_State, Seen]:
        """Step to the boundary, judge, and go back a little where it was crossed."""
        clean = problem.inputs
        start, event = jnp.divmod(event, self.num_steps)
        target = self.starts.target(state.targets, start)
        boundary = self._boundary(problem, target, state.inputs)
        moved = self._move(problem, state.inputs, *boundary)

        adversarial = problem.goal.reached(problem.logits_fn(moved))
        distance = norms.distance(moved - clean, self.norm)
        success = adversarial & (distance <= self.eps)
        smallest = jnp.where(success, jnp.minimum(distance, state.distance), state.distance)
        back = clean + norms.per_example(self.beta, clean) * (moved - clean)
        inputs = select(adversarial, jnp.clip(back, *problem.bounds), moved)

        ended = event + 1 == self.num_steps
        spent = ended & self.starts.is_last(start)
        # Within a radius an example ends with the start that succeeded.
        spent |= ended & jnp.isfinite(smallest) & jnp.isfinite(self.eps)
        if self.starts.most > 1:
            inputs = select(ended, self._begin(problem, start + 1, smallest), inputs)
        return _State(inputs, smallest, state.targets), Seen(
            success,
            jnp.where(adversarial, distance, jnp.inf),
            spent,
            moved,
            distance,
            note=start,
        )

    def _begin(self, problem: Problem, start: Array, smallest: Array) -> Array:
        """The first point of each example's start `[B]`; `smallest` is its distance so far."""
        clean, (low, high) = problem.inputs, problem.bounds
        if self.starts.num_restarts == 1:
            return clean
        unit = direction(self.starts.keys(problem, start), clean, self.norm)
        # Where neither a radius nor a distance is known, the box's own.
        widest = norms.distance(jnp.full_like(clean, high - low), self.norm)
        length = jnp.minimum(jnp.minimum(self.eps, smallest), widest) / 2
        length = jnp.where(jnp.isfinite(length), length, 0.0)  # in a box without an end
        drawn = jnp.clip(clean + unit * norms.per_example(length, clean), low, high)
        return select(start % self.starts.num_restarts == 0, clean, drawn)

    def _boundary(
        self, problem: Problem, target: Array | None, inputs: Array
    ) -> tuple[Array, Array]:
        """The linearized boundary to step to: its unit normal and gap, see `hyperplane`."""
        goal = problem.goal
        logits, pull_back = jax.vjp(problem.logits_fn, inputs)
        classes = logits.shape[1]

        def between(raised: Array, lowered: Array) -> tuple[Array, Array]:
            one_hot = functools.partial(jax.nn.one_hot, num_classes=classes, dtype=logits.dtype)
            (normal,) = pull_back(one_hot(raised) - one_hot(lowered))
            rows = jnp.arange(logits.shape[0])
            return hyperplane.unit(normal, logits[rows, lowered] - logits[rows, raised])

        if target is not None:
            if goal.targets is None:
                return between(target, goal.labels)
            # A third class may lie between the label and the target.
            chosen = jax.nn.one_hot(target, classes, dtype=bool)
            return between(target, jnp.argmax(jnp.where(chosen, -jnp.inf, logits), axis=1))

        def nearer(kept: tuple[Array, Array, Array], index: Array) -> tuple[tuple, None]:
            normal, gap = between(index + (index >= goal.labels), goal.labels)  # all but the label
            distance = hyperplane.distance(normal, gap, self.norm)
            return select(distance < kept[0], (distance, normal, gap), kept), None

        nothing = jnp.zeros(inputs.shape[:1], inputs.dtype)
        kept = nothing + jnp.inf, jnp.zeros_like(inputs), nothing
        # One class at a time: K gradients at once would be K times the memory.
        (_, normal, gap), _ = jax.lax.scan(nearer, kept, jnp.arange(classes - 1))
        return normal, gap

    def _move(self, problem: Problem, inputs: Array, normal: Array, gap: Array) -> Array:
        """One step between the iterate and the clean input, both projected onto the boundary."""
        clean, bounds = problem.inputs, problem.bounds
        axes = tuple(range(1, inputs.ndim))
        gaps = jnp.concatenate([gap, gap + jnp.sum(normal * (inputs - clean), axis=axes)])
        points, normals = jnp.concatenate([inputs, clean]), jnp.concatenate([normal, normal])
        low, high = (end if end.ndim == 0 else jnp.concatenate([end, end]) for end in bounds)
        ways = hyperplane.project(points, normals, gaps, self.norm, (low, high))
        lengths = norms.distance(ways, self.norm)
        size = inputs.shape[0]
        total = lengths[:size] + lengths[size:]
        # Where there is no boundary to see, nothing but the draw towards the input is left.
        share = jnp.where(total > 0, lengths[:size] / jnp.where(total > 0, total, 1.0), 0.5)
        share = norms.per_example(jnp.minimum(share, self.alpha_max), inputs)
        eta = norms.per_example(self.eta, inputs)
        own, other = inputs + eta * ways[:size], clean + eta * ways[size:]
        return jnp.clip((1 - share) * own + share * other, *bounds)

    def info(
        self, problem: Problem, state: _State, progress: Progress, result: AttackResult
    ) -> dict[str, Array]:
        assert progress.best is not None
        restart = progress.best[2]
        target = self.starts.target(state.targets, restart)
        return {"restart": restart, **({} if target is None else {"target": target})}
