"""Boundary attack: a random walk along the decision boundary that asks for decisions only."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, norms
from jdistill._jax import register
from jdistill.attacks._core import decisions
from jdistill.attacks._core.decisions import DecisionMethod
from jdistill.attacks._core.engine import Seen, run, select
from jdistill.attacks._core.problem import (
    AttackResult,
    Problem,
    need_key,
    one_per_example,
    prepare,
    start_point,
)
from jdistill.attacks._core.traits import facts
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn

# Halvings of the way from the start to the input: the walk begins at the boundary within 0.1%.
_NUM_HALVINGS = 10
# Every so many tries asks for the orthogonal step alone.
_CHECK_EVERY = 10
# The tries after which a step size is judged, and the shares of successes between which it stays:
# of the orthogonal step alone, where a flat boundary lets half of them pass, and of both steps.
_NUM_CHECKS, _CHECK_RANGE = 10, (0.2, 0.5)
_NUM_MOVES, _MOVE_RANGE = 30, (0.1, 0.25)
_ADAPTATION = 1.5


@facts(title="Boundary", norms=("l2",), access="decisions", minimum_norm=True)
def boundary(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    num_queries: int = 10_000,
    orthogonal_step: ArrayLike = 0.01,
    source_step: ArrayLike = 0.01,
    num_starts: int = 100,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """Smallest L2 perturbation by a random walk along the boundary, from decisions alone.

    Each query tells whether a point is adversarial, and nothing else of the network is used: no
    gradient and no logit, so nothing about these can mask it. From an adversarial point `x'` at
    distance `d = ‖x' - x‖`, found at random and moved to the boundary by bisection, every try is
    a step on the sphere around the input and one towards the input::

        η ~ N(0, I), without its part along x' - x, scaled to the length δ · d
        s = clip(x + (x' - x + η) / √(1 + δ²))
        x'' = x + (1 - ε) · d · (s - x) / ‖s - x‖

    If `x''` is adversarial, it is the next `x'`. Every tenth try asks for `s` alone. Where more
    than half of those succeed, the boundary is flat at this scale, and both steps grow; where less
    than a fifth do, they shrink. `ε` grows where more than a quarter of the whole tries succeed,
    and shrinks below a tenth.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: one key, or `[B]` keys.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        num_queries: the most forward passes for an example, those of the clean input and of the
            verification included, at least 3; static.
        orthogonal_step: the first δ, relative to the distance, above 0; scalar or `[B]`.
        source_step: the first ε, relative to the distance, above 0; scalar or `[B]`.
        num_starts: the most draws for a first adversarial, at least 1; static. They are uniform in
            the box, every second one in a random range of values inside it.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label. A random point
            is rarely of a given class: pass `init` as well.
        init: `[B, ...]`, tried as a start before the random ones (clipped into the box): an
            input of another class, or of the target's.
        trace: keep the distance found within every smaller budget.

    Returns:
        The result, the closest of all adversarial points that were asked for. Where no start was
        found: the clean input, `success=False`, `distance=inf`. `distance` is the L2 distance.
        `info`: `first_success`, `gradients` (zeros), and with `trace` the smallest distance after
        each query (`inf` before the first adversarial), `trace [B, num_queries - 2]`, whose entry
        `k` is what `num_queries=k + 3` finds; see `jdistill.attacks`.

    Raises:
        ValueError: num_queries below 3, num_starts below 1, a step not above 0, no key, inputs
            not finite or outside the box, labels or targets outside `0..K-1`.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.8, 0]])
        >>> x, y = jnp.array([[0.4, 0.4]]), jnp.array([0])
        >>> result = boundary(logits_fn, jax.random.key(0), x, y, num_queries=500)
        >>> bool(result.success[0]), bool(0.28 < result.distance[0] < 0.30)  # exactly: 0.283
        (True, True)

    References:
        Brendel, Rauber & Bethge 2018, "Decision-Based Adversarial Attacks: Reliable Attacks
        Against Black-Box Machine Learning Models", section 2. The differences: the bisection
        before the walk; every number that adapts is the example's own, and adapts after 10
        orthogonal and 30 whole tries (the released code: 100 and 30, both counted every tenth
        try); the walk ends with its budget, or when ε is below 1e-5; each event asks one query for
        whatever the example is at, so that none waits for another's halvings and the budget is
        exact; a point counts as closer only by 1e-5 of the distance, since otherwise rounding
        would decide where the walk goes.
    """
    decisions.check_counts(num_queries, num_starts)
    _validate.positive(orthogonal_step=orthogonal_step, source_step=source_step)
    problem = prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds)
    need_key(problem, "random starts")
    each = functools.partial(one_per_example, inputs=problem.inputs)
    method = _Boundary(
        first=None if init is None else start_point(init, problem),
        orthogonal_step=each(orthogonal_step, name="orthogonal_step"),
        source_step=each(source_step, name="source_step"),
        num_queries=num_queries,
        num_starts=num_starts,
    )
    return run(method, problem, trace=trace)


class _Tries(NamedTuple):
    """Tries since the step was last judged, and how many of them succeeded, `[B]` each."""

    total: Array
    hits: Array

    def add(self, counted: Array, hit: Array) -> "_Tries":
        return _Tries(self.total + counted, self.hits + (counted & hit))

    def judge(self, num_tries: int, allowed: tuple[float, float]) -> tuple[Array, "_Tries"]:
        """The factor `[B]` for the step; after a judgment the count begins anew."""
        full = self.total >= num_tries
        share = self.hits / jnp.maximum(self.total, 1)
        low, high = allowed
        factor = jnp.where(share > high, _ADAPTATION, jnp.where(share < low, 1 / _ADAPTATION, 1.0))
        kept = jnp.where(full, 0, self.total), jnp.where(full, 0, self.hits)
        return jnp.where(full, factor, 1.0), _Tries(*kept)


class _State(NamedTuple):
    tries: Array  # since the first adversarial was found: halvings, and then the walk
    start: Array  # the first adversarial
    low: Array  # shares of the way from the input to there: the largest not adversarial
    high: Array  # and the smallest that is
    point: Array  # the closest adversarial, where the walk is
    distance: Array  # its distance; inf before there is one
    orthogonal_step: Array
    source_step: Array
    checks: _Tries  # of the orthogonal step alone
    moves: _Tries  # of both steps


@register
class _Boundary(DecisionMethod):
    orthogonal_step: Array  # [B], the first
    source_step: Array  # [B], the first
    norm = "l2"

    def init(self, problem: Problem) -> tuple[_State, Array]:
        whole = jnp.zeros(self.source_step.shape, jnp.int32)
        zeros = jnp.zeros_like(self.source_step)
        state = _State(
            tries=whole,
            start=problem.inputs,
            low=zeros,
            high=zeros + 1,
            point=problem.inputs,
            distance=zeros + jnp.inf,
            orthogonal_step=self.orthogonal_step,
            source_step=self.source_step,
            checks=_Tries(whole, whole),
            moves=_Tries(whole, whole),
        )
        return state, problem.logits_fn(problem.inputs)

    def step(self, problem: Problem, state: _State, event: Array) -> tuple[_State, Seen]:
        """One query: a start, a halving of the way from there, or a try of the walk."""
        starting = jnp.isinf(state.distance)
        walking = state.tries >= _NUM_HALVINGS
        walked = state.tries - _NUM_HALVINGS
        checking = walking & (walked % _CHECK_EVERY == _CHECK_EVERY - 1)
        inputs, middle = problem.inputs, (state.low + state.high) / 2
        halved = inputs + norms.per_example(middle, inputs) * (state.start - inputs)
        sphere, closer = _propose(problem, state, walked)
        candidate = select(walking, closer, jnp.clip(halved, *problem.bounds))
        candidate = select(checking, sphere, candidate)
        candidate = select(starting, self.start(problem, starting, event), candidate)
        adversarial, seen = self.ask(problem, candidate, state.distance)

        halving = ~starting & ~walking
        checks = state.checks.add(checking, adversarial)
        moves = state.moves.add(walking & ~checking, adversarial)
        both_factor, checks = checks.judge(_NUM_CHECKS, _CHECK_RANGE)
        source_factor, moves = moves.judge(_NUM_MOVES, _MOVE_RANGE)
        new = _State(
            tries=state.tries + ~starting,
            start=select(starting, candidate, state.start),
            low=jnp.where(halving & ~adversarial, middle, state.low),
            high=jnp.where(halving & adversarial, middle, state.high),
            point=select(seen.success, candidate, state.point),
            distance=seen.value,
            orthogonal_step=state.orthogonal_step * both_factor,
            source_step=state.source_step * both_factor * source_factor,
            checks=checks,
            moves=moves,
        )
        converged = walking & (new.source_step < decisions.CLOSER)
        out_of_starts = self.out_of_starts(starting, adversarial, event)
        return new, seen._replace(spent=converged | out_of_starts)


def _propose(problem: Problem, state: _State, walked: Array) -> tuple[Array, Array]:
    """The points `[B, ...]` after the orthogonal step, and after the step towards the input."""
    inputs = problem.inputs
    per_example = functools.partial(norms.per_example, like=inputs)
    keys = jax.vmap(jax.random.fold_in)(decisions.stream(problem, 1), walked)
    noise = decisions.normal(keys, inputs)
    delta = state.point - inputs
    unit = norms.normalize(delta, "l2")
    along = jnp.sum(norms.flatten(noise * unit), axis=1)
    noise = norms.normalize(noise - per_example(along) * unit, "l2")
    turned = delta + per_example(state.orthogonal_step * state.distance) * noise
    turned = turned / per_example(jnp.sqrt(1 + jnp.square(state.orthogonal_step)))
    sphere = jnp.clip(inputs + turned, *problem.bounds)
    # Clipping may have brought the point closer already than the step would.
    length = norms.distance(sphere - inputs, "l2")
    nearer = (1 - state.source_step) * state.distance
    share = jnp.minimum(nearer / jnp.where(length > 0, length, 1.0), 1.0)
    closer = inputs + per_example(jnp.maximum(share, 0.0)) * (sphere - inputs)
    return sphere, jnp.clip(closer, *problem.bounds)
