"""The boundary attack: a random walk along the decision boundary that asks for decisions only."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, norms
from jdistill._precision import full_precision
from jdistill.attacks._core import decisions as _decision
from jdistill.attacks._core import problem as _base
from jdistill.attacks._core.decisions import Ledger, Oracle
from jdistill.attacks._core.problem import AttackResult, Problem
from jdistill.typing import Array, ArrayLike, LogitsFn

# Halvings of the way from the start to the input: the walk begins at the boundary within 0.1 %.
_NUM_HALVINGS = 10
# Every so many tries asks for the orthogonal step alone.
_CHECK_EVERY = 10
# The tries after which a step size is judged, and the shares of successes between which it stays:
# of the orthogonal step alone, where a flat boundary lets half of them pass, and of both steps.
_NUM_CHECKS, _CHECK_RANGE = 10, (0.2, 0.5)
_NUM_MOVES, _MOVE_RANGE = 30, (0.1, 0.25)
_ADAPTATION = 1.5


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
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """Smallest L2 perturbation by a random walk along the boundary, from decisions alone.

    Each query tells whether a point is adversarial, and nothing else of the network is used: no
    gradient and no logit, so nothing about these can mask it. From an adversarial point `x'` at
    distance `d = ‖x' - x‖`, found at random and moved to the boundary by bisection, every try is
    a step on the sphere around the input and one towards the input:

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
        `info`: `first_success [B]` int32, the query that found the first adversarial (0: the clean
        input), -1 if none did; with `trace`, `distance [B, num_queries]`, whose entry `q - 1`
        is what `num_queries=q` would have found (`inf`: nothing).

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
        try); the walk ends with its budget, or when ε is below 1e-5.
    """
    _decision.check_counts(num_queries, num_starts)
    _validate.positive(orthogonal_step=orthogonal_step, source_step=source_step)
    problem = _base.prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds)
    _base.need_key(problem, "random starts")
    each = functools.partial(_base.one_per_example, inputs=problem.inputs)
    with full_precision():
        return _boundary(
            problem,
            None if init is None else _base.start_point(init, problem),
            each(orthogonal_step, name="orthogonal_step"),
            each(source_step, name="source_step"),
            num_queries=num_queries,
            num_starts=num_starts,
            trace=trace,
        )


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


class _Carry(NamedTuple):
    """The state of each example; every leaf leads with `[B]`. Its point is the ledger's best."""

    ledger: Ledger
    step: Array
    orthogonal_step: Array
    source_step: Array
    checks: _Tries  # of the orthogonal step alone
    moves: _Tries  # of both steps
    done: Array


def _approach(oracle: Oracle, ledger: Ledger) -> Ledger:
    """Bisect between the input and the start, which moves the ledger's best to the boundary."""
    inputs, start = oracle.problem.inputs, ledger.best
    done = ~ledger.found

    def body(carry: tuple[Ledger, Array, Array, Array]) -> tuple[Ledger, Array, Array, Array]:
        ledger, low, high, step = carry
        active = ~done & affordable(ledger) & (step < _NUM_HALVINGS)
        middle = (low + high) / 2
        candidate = inputs + norms.per_example(middle, inputs) * (start - inputs)
        candidate = jnp.clip(candidate, *oracle.problem.bounds)
        adversarial, ledger = _decision.ask(oracle, ledger, candidate, active)
        high = jnp.where(adversarial, middle, high)
        return ledger, jnp.where(active & ~adversarial, middle, low), high, step + active

    affordable = functools.partial(_decision.affordable, oracle)
    zeros = jnp.zeros_like(ledger.best_distance)
    ledger, *_ = jax.lax.while_loop(
        lambda carry: jnp.any(~done & affordable(carry[0]) & (carry[3] < _NUM_HALVINGS)),
        body,
        (ledger, zeros, zeros + 1, jnp.zeros_like(ledger.queries)),
    )
    return ledger


def _propose(
    problem: Problem, ledger: Ledger, noise: Array, orthogonal_step: Array, source_step: Array
) -> tuple[Array, Array]:
    """The points `[B, ...]` after the orthogonal step, and after the step towards the input."""
    inputs = problem.inputs
    per_example = functools.partial(norms.per_example, like=inputs)
    delta = ledger.best - inputs
    unit = norms.normalize(delta, "l2")
    along = jnp.sum(norms.flatten(noise * unit), axis=1)
    noise = norms.normalize(noise - per_example(along) * unit, "l2")
    distance = ledger.best_distance
    turned = delta + per_example(orthogonal_step * jnp.where(ledger.found, distance, 0.0)) * noise
    turned = turned / per_example(jnp.sqrt(1 + jnp.square(orthogonal_step)))
    sphere = jnp.clip(inputs + turned, *problem.bounds)
    # Clipping may have brought the point closer already than the step would.
    length = norms.distance(sphere - inputs, "l2")
    share = jnp.minimum((1 - source_step) * distance / jnp.where(length > 0, length, 1.0), 1.0)
    closer = inputs + per_example(jnp.maximum(share, 0.0)) * (sphere - inputs)
    return sphere, jnp.clip(closer, *problem.bounds)


def _step(oracle: Oracle, keys: Array, carry: _Carry) -> _Carry:
    """One try: both steps, or every tenth time the orthogonal one alone."""
    ledger, active = carry.ledger, ~carry.done
    noise = _decision.normal(jax.vmap(jax.random.fold_in)(keys, carry.step), oracle.problem.inputs)
    sphere, closer = _propose(
        oracle.problem, ledger, noise, carry.orthogonal_step, carry.source_step
    )
    checking = carry.step % _CHECK_EVERY == _CHECK_EVERY - 1
    candidate = jnp.where(norms.per_example(checking, sphere) > 0, sphere, closer)
    adversarial, ledger = _decision.ask(oracle, ledger, candidate, active)

    checks = carry.checks.add(active & checking, adversarial)
    moves = carry.moves.add(active & ~checking, adversarial)
    both_factor, checks = checks.judge(_NUM_CHECKS, _CHECK_RANGE)
    source_factor, moves = moves.judge(_NUM_MOVES, _MOVE_RANGE)
    source_step = carry.source_step * both_factor * source_factor
    return _Carry(
        ledger=ledger,
        step=carry.step + active,
        orthogonal_step=jnp.where(
            active, carry.orthogonal_step * both_factor, carry.orthogonal_step
        ),
        source_step=jnp.where(active, source_step, carry.source_step),
        checks=checks,
        moves=moves,
        done=carry.done | (source_step < _decision.CLOSER) | ~_decision.affordable(oracle, ledger),
    )


@functools.partial(jax.jit, static_argnames=("num_queries", "num_starts", "trace"))
def _boundary(
    problem: Problem,
    init: Array | None,
    orthogonal_step: Array,
    source_step: Array,
    *,
    num_queries: int,
    num_starts: int,
    trace: bool,
) -> AttackResult:
    oracle = Oracle(problem, "l2", num_queries)
    clean_success, ledger = _decision.open_ledger(oracle, trace)
    ledger = _decision.find_start(oracle, ledger, init, num_starts, clean_success)
    ledger = _approach(oracle, ledger)
    zeros = jnp.zeros_like(ledger.queries)
    carry = jax.lax.while_loop(
        lambda carry: jnp.any(~carry.done),
        functools.partial(_step, oracle, _decision.stream(problem, 1)),
        _Carry(
            ledger=ledger,
            step=zeros,
            orthogonal_step=orthogonal_step,
            source_step=source_step,
            checks=_Tries(zeros, zeros),
            moves=_Tries(zeros, zeros),
            done=~ledger.found | ~_decision.affordable(oracle, ledger),
        ),
    )
    return _decision.close(oracle, carry.ledger, clean_success, trace=trace)
