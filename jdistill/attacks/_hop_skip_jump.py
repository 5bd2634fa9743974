"""HopSkipJump: steps along a gradient that is estimated at the boundary from decisions only."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, norms
from jdistill._precision import full_precision
from jdistill.attacks._core import decisions as _decision
from jdistill.attacks._core import problem as _base
from jdistill.attacks._core.constant_search import select
from jdistill.attacks._core.decisions import Ledger, Oracle
from jdistill.attacks._core.problem import AttackResult, Problem
from jdistill.typing import Array, ArrayLike, LogitsFn

# The norms, and the power of the number of features in θ.
_TOLERANCE = {"linf": 2.0, "l2": 1.5}
# What an example's next query is for.
_SEARCH, _SAMPLE, _STEP = 0, 1, 2
# Of the box's width: the size of the first samples, when the distance is still that of noise.
_FIRST_SAMPLES = 0.1
# A step halved this often has found no adversarial; the example samples again.
_NUM_HALVINGS = 20
# Below this share of the way float32 no longer tells the points of a bisection apart.
_LEAST_TOLERANCE = 1e-6


def hop_skip_jump(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    norm: str = "linf",
    num_queries: int = 10_000,
    num_samples: int = 100,
    max_samples: int = 10_000,
    gamma: ArrayLike = 1.0,
    num_starts: int = 100,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """Smallest perturbation by gradients estimated at the boundary, from decisions alone.

    Each query tells whether a point is adversarial, `φ = 1`, or not, `φ = -1`; nothing else of the
    network is used. From an adversarial point, found at random, an example goes round and round:

        1. bisection towards the input, until a share θ of the way is left: a point x_t at the
           boundary, at distance d_t (linf: the change is clipped instead of scaled)
        2. samples around it, each with its φ_b:      x_t + δ · u_b     u_b random of l2 norm 1
           the direction they give:                   v = Σ_b (φ_b - φ̄) · u_b
        3. the step  x_t + d_t / √t · steepest(v),    halved until it is adversarial

    With D the number of features, `θ = γ / D^1.5` for l2 and `γ / D²` for linf; `δ = γ · d_t / D`,
    in the first round a tenth of the box. Round t has `num_samples · √t` samples.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: one key, or `[B]` keys.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        norm: `"linf"` or `"l2"`.
        num_queries: the most forward passes for an example, those of the clean input and of the
            verification included, at least 3; static.
        num_samples: samples of the first round, at least 1; static.
        max_samples: the most samples of any round, at least 1; static.
        gamma: scale γ of the bisection's end and of the samples, above 0; scalar or `[B]`. With
            fewer than 100 features or so, less than 1 finds the distance more exactly.
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
        found: the clean input, `success=False`, `distance=inf`. `info`: `first_success [B]` int32,
        the query that found the first adversarial (0: the clean input), -1 if none did; `rounds
        [B]` int32, how many were begun; with `trace`, `distance [B, num_queries]`, whose
        entry `q - 1` is what `num_queries=q` would have found (`inf`: nothing).

    Raises:
        ValueError: an unknown norm, num_queries below 3, other counts below 1, gamma not above 0,
            no key, inputs not finite or outside the box, labels or targets outside `0..K-1`.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.8, 0]])
        >>> x, y = jnp.array([[0.4, 0.4]]), jnp.array([0])
        >>> result = hop_skip_jump(
        ...     logits_fn, jax.random.key(0), x, y, norm="l2", gamma=0.01, num_queries=500)
        >>> bool(result.success[0]), bool(0.28 < result.distance[0] < 0.30)  # exactly: 0.283
        (True, True)

    References:
        Chen, Jordan & Wainwright 2020, "HopSkipJumpAttack: A Query-Efficient Decision-Based
        Attack", sections III and IV, algorithms 1 and 2. The differences: rounds end with the
        budget of queries; an example goes through its rounds at its own pace; a round that finds
        no step after 20 halvings samples again; the closest point of all queries is returned, not
        the last round's.
    """
    _validate.one_of(_TOLERANCE, norm=norm)
    _decision.check_counts(num_queries, num_starts)
    _validate.count(num_samples=num_samples, max_samples=max_samples)
    _validate.positive(gamma=gamma)
    problem = _base.prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds)
    _base.need_key(problem, "random starts")
    with full_precision():
        return _hop_skip_jump(
            problem,
            None if init is None else _base.start_point(init, problem),
            _base.one_per_example(gamma, problem.inputs, name="gamma"),
            norm=norm,
            num_queries=num_queries,
            num_samples=num_samples,
            max_samples=max_samples,
            num_starts=num_starts,
            trace=trace,
        )


class _Settings(NamedTuple):
    keys: Array  # [B]
    tolerance: Array  # [B], θ
    gamma: Array  # [B]
    num_samples: int
    max_samples: int


class _Carry(NamedTuple):
    """The state of each example; every leaf leads with `[B]`."""

    ledger: Ledger
    done: Array
    phase: Array  # what the next query is for
    round: Array  # t
    tries: Array  # queries in this phase
    point: Array  # the latest adversarial that is no sample; after a bisection x_t
    distance: Array  # d_t
    far: Array  # where the bisection comes from
    low: Array  # shares of the way from the input to there: the largest not adversarial
    high: Array  # and the smallest that is
    weighted: Array  # Σ φ_b · u_b
    plain: Array  # Σ u_b
    balance: Array  # Σ φ_b
    direction: Array
    length: Array  # of the step to try


def _init(oracle: Oracle, ledger: Ledger) -> _Carry:
    zeros = jnp.zeros_like(ledger.best_distance)
    whole = jnp.zeros_like(ledger.queries)
    nothing = jnp.zeros_like(ledger.best)
    return _Carry(
        ledger=ledger,
        done=~ledger.found | ~_decision.affordable(oracle, ledger),
        phase=whole + _SEARCH,
        round=whole,
        tries=whole,
        point=ledger.best,
        distance=zeros,
        far=ledger.best,
        low=zeros,
        high=zeros + 1,
        weighted=nothing,
        plain=nothing,
        balance=zeros,
        direction=nothing,
        length=zeros,
    )


def _ask(oracle: Oracle, settings: _Settings, carry: _Carry) -> _Carry:
    """One query for each example, for whatever its phase needs, and what follows from it."""
    problem, active = oracle.problem, ~carry.done
    searching, sampling = carry.phase == _SEARCH, carry.phase == _SAMPLE
    size = norms.per_example(_sample_size(oracle, settings, carry), problem.inputs)
    length = norms.per_example(carry.length, problem.inputs)
    move = select(sampling, size * _noise(oracle, settings, carry), length * carry.direction)
    candidate = select(searching, _middle(oracle, carry), carry.point + move)
    candidate = jnp.clip(candidate, *problem.bounds)
    adversarial, ledger = _decision.ask(oracle, carry.ledger, candidate, active)

    asked = carry._replace(tries=carry.tries + 1)
    # What clipping left of the noise is what was sampled.
    sample = (candidate - carry.point) / size
    moved = select(
        searching,
        _searched(oracle, settings, asked, candidate, adversarial),
        select(
            sampling,
            _sampled(oracle, settings, asked, sample, adversarial),
            _stepped(oracle, asked, candidate, adversarial),
        ),
    )
    moved = select(active, moved, carry)
    return moved._replace(ledger=ledger, done=carry.done | ~_decision.affordable(oracle, ledger))


def _middle(oracle: Oracle, carry: _Carry) -> Array:
    """The next point of the bisection, `[B, ...]`."""
    inputs, delta = oracle.problem.inputs, carry.far - oracle.problem.inputs
    share = (carry.low + carry.high) / 2
    if oracle.norm == "linf":
        limit = norms.per_example(share * norms.distance(delta, "linf"), delta)
        return inputs + jnp.clip(delta, -limit, limit)
    return inputs + norms.per_example(share, delta) * delta


def _searched(
    oracle: Oracle, settings: _Settings, carry: _Carry, candidate: Array, adversarial: Array
) -> _Carry:
    """One halving; at the end of the bisection a new round begins."""
    middle = (carry.low + carry.high) / 2
    low = jnp.where(adversarial, carry.low, middle)
    high = jnp.where(adversarial, middle, carry.high)
    point = select(adversarial, candidate, carry.point)
    carry = carry._replace(low=low, high=high, point=point)
    ended = high - low <= settings.tolerance
    return select(ended, _next_round(oracle, carry), carry)


def _next_round(oracle: Oracle, carry: _Carry) -> _Carry:
    return carry._replace(
        phase=jnp.full_like(carry.phase, _SAMPLE),
        round=carry.round + 1,
        tries=jnp.zeros_like(carry.tries),
        distance=norms.distance(carry.point - oracle.problem.inputs, oracle.norm),
        weighted=jnp.zeros_like(carry.weighted),
        plain=jnp.zeros_like(carry.plain),
        balance=jnp.zeros_like(carry.balance),
    )


def _noise(oracle: Oracle, settings: _Settings, carry: _Carry) -> Array:
    """Random directions `[B, ...]` of l2 norm 1: normal for l2, uniform in a cube for linf."""
    keys = jax.vmap(jax.random.fold_in)(settings.keys, carry.round)
    keys = jax.vmap(jax.random.fold_in)(keys, carry.tries)
    if oracle.norm == "linf":
        draw = 2 * _decision.uniform(keys, carry.point) - 1
    else:
        draw = _decision.normal(keys, carry.point)
    return norms.normalize(draw, "l2")


def _sample_size(oracle: Oracle, settings: _Settings, carry: _Carry) -> Array:
    """δ, `[B]`."""
    low, high = oracle.problem.bounds
    num_features = math.prod(carry.point.shape[1:])
    later = settings.gamma * carry.distance / num_features
    return jnp.where(carry.round == 1, _FIRST_SAMPLES * (high - low), later)


def _sampled(
    oracle: Oracle, settings: _Settings, carry: _Carry, sample: Array, adversarial: Array
) -> _Carry:
    """One more sample; after the last one of the round its direction and the first step."""
    decision = jnp.where(adversarial, 1.0, -1.0).astype(sample.dtype)
    weighted = carry.weighted + norms.per_example(decision, sample) * sample
    plain = carry.plain + sample
    balance = carry.balance + decision
    mean = balance / carry.tries
    # Where all decisions agree, subtracting their mean would leave nothing.
    mean = norms.per_example(jnp.where(jnp.abs(mean) < 1, mean, 0.0), sample)
    root = jnp.sqrt(carry.round.astype(sample.dtype))
    num_samples = jnp.minimum(jnp.floor(settings.num_samples * root), settings.max_samples)
    carry = carry._replace(weighted=weighted, plain=plain, balance=balance)
    stepping = carry._replace(
        phase=jnp.full_like(carry.phase, _STEP),
        tries=jnp.zeros_like(carry.tries),
        direction=norms.steepest(weighted - mean * plain, oracle.norm),
        length=carry.distance / root,
    )
    return select(carry.tries >= num_samples, stepping, carry)


def _stepped(oracle: Oracle, carry: _Carry, candidate: Array, adversarial: Array) -> _Carry:
    """After a success the next bisection, otherwise half the step, or samples again."""
    searching = carry._replace(
        phase=jnp.full_like(carry.phase, _SEARCH),
        tries=jnp.zeros_like(carry.tries),
        point=candidate,
        far=candidate,
        low=jnp.zeros_like(carry.low),
        high=jnp.ones_like(carry.high),
    )
    shorter = carry._replace(length=carry.length / 2)
    given_up = carry.tries > _NUM_HALVINGS
    return select(adversarial, searching, select(given_up, _next_round(oracle, carry), shorter))


@functools.partial(
    jax.jit,
    static_argnames=("norm", "num_queries", "num_samples", "max_samples", "num_starts", "trace"),
)
def _hop_skip_jump(
    problem: Problem,
    init: Array | None,
    gamma: Array,
    *,
    norm: str,
    num_queries: int,
    num_samples: int,
    max_samples: int,
    num_starts: int,
    trace: bool,
) -> AttackResult:
    num_features = math.prod(problem.inputs.shape[1:])
    settings = _Settings(
        keys=_decision.stream(problem, 1),
        tolerance=jnp.maximum(gamma / num_features ** _TOLERANCE[norm], _LEAST_TOLERANCE),
        gamma=gamma,
        num_samples=num_samples,
        max_samples=max_samples,
    )
    oracle = Oracle(problem, norm, num_queries)
    clean_success, ledger = _decision.open_ledger(oracle, trace)
    ledger = _decision.find_start(oracle, ledger, init, num_starts, clean_success)
    carry = jax.lax.while_loop(
        lambda carry: jnp.any(~carry.done),
        functools.partial(_ask, oracle, settings),
        _init(oracle, ledger),
    )
    result = _decision.close(oracle, carry.ledger, clean_success, trace=trace)
    return result._replace(info=result.info | {"rounds": carry.round})
