"""HopSkipJump: steps along a gradient that is estimated at the boundary from decisions only."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, norms
from jdistill._jax import register, static_field
from jdistill.attacks._core import decisions
from jdistill.attacks._core.decisions import DecisionMethod
from jdistill.attacks._core.engine import Progress, Seen, run, select
from jdistill.attacks._core.problem import (
    AttackResult,
    Problem,
    need_key,
    one_per_example,
    prepare,
    start_point,
)
from jdistill.attacks._core.traits import facts
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn, Norm

# The norms, and the power of the number of features in θ.
_TOLERANCE: dict[Norm, float] = {"linf": 2.0, "l2": 1.5}
# What an example's next query is for.
_START, _SEARCH, _SAMPLE, _STEP = 0, 1, 2, 3
# Of the box's width: the size of the first samples, when the distance is still that of noise.
_FIRST_SAMPLES = 0.1
# A step halved this often has found no adversarial; the example samples again.
_NUM_HALVINGS = 20
# Below this share of the way float32 no longer tells the points of a bisection apart.
_LEAST_TOLERANCE = 1e-6


@facts(title="HopSkipJump", norms=tuple(_TOLERANCE), access="decisions", minimum_norm=True)
def hop_skip_jump(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    norm: Norm = "linf",
    num_queries: int = 10_000,
    num_samples: int = 100,
    max_samples: int = 10_000,
    gamma: ArrayLike = 1.0,
    num_starts: int = 100,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """Smallest perturbation by gradients estimated at the boundary, from decisions alone.

    Each query tells whether a point is adversarial, `φ = 1`, or not, `φ = -1`; nothing else of the
    network is used. From an adversarial point, found at random, an example goes round and round::

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
        found: the clean input, `success=False`, `distance=inf`. `info`: `first_success`;
        `gradients` (zeros); `rounds [B]` int32, how many were begun; with `trace`, the smallest
        distance after each query (`inf` before the first adversarial), `trace
        [B, num_queries - 2]`, whose entry `k` is what `num_queries=k + 3` finds. See
        `jdistill.attacks`.

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
        budget of queries; an example goes through its rounds at its own pace, one query per event
        for whatever it is at, so that none waits for another's halvings and the budget is exact; a
        round that finds no step after 20 halvings samples again; the closest point of all queries
        is returned, not the last round's, where it is closer by 1e-5 of the distance, beyond what
        rounding decides.
    """
    _validate.one_of(_TOLERANCE, norm=norm)
    decisions.check_counts(num_queries, num_starts)
    _validate.count(num_samples=num_samples, max_samples=max_samples)
    _validate.positive(gamma=gamma)
    problem = prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds)
    need_key(problem, "random starts")
    method = _HopSkipJump(
        first=None if init is None else start_point(init, problem),
        gamma=one_per_example(gamma, problem.inputs, name="gamma"),
        norm=norm,
        num_queries=num_queries,
        num_samples=num_samples,
        max_samples=max_samples,
        num_starts=num_starts,
    )
    return run(method, problem, trace=trace)


class _State(NamedTuple):
    phase: Array  # what the next query is for
    round: Array  # t
    tries: Array  # queries in this phase
    closest: Array  # the distance of the closest adversarial; inf before there is one
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


@register
class _HopSkipJump(DecisionMethod):
    gamma: Array  # [B]
    norm: Norm = static_field()
    num_samples: int = static_field()
    max_samples: int = static_field()

    def init(self, problem: Problem) -> tuple[_State, Array]:
        zeros, nothing = jnp.zeros_like(self.gamma), jnp.zeros_like(problem.inputs)
        whole = jnp.zeros(zeros.shape, jnp.int32)
        state = _State(
            phase=whole + _START,
            round=whole,
            tries=whole,
            closest=zeros + jnp.inf,
            point=problem.inputs,
            distance=zeros,
            far=problem.inputs,
            low=zeros,
            high=zeros + 1,
            weighted=nothing,
            plain=nothing,
            balance=zeros,
            direction=nothing,
            length=zeros,
        )
        return state, problem.logits_fn(problem.inputs)

    def step(self, problem: Problem, state: _State, event: Array) -> tuple[_State, Seen]:
        """One query, for whatever the phase needs, and what follows from it."""
        starting, searching = state.phase == _START, state.phase == _SEARCH
        sampling = state.phase == _SAMPLE
        size = norms.per_example(self._sample_size(problem, state), problem.inputs)
        length = norms.per_example(state.length, problem.inputs)
        move = select(sampling, size * self._noise(problem, state), length * state.direction)
        candidate = select(searching, self._middle(problem, state), state.point + move)
        candidate = jnp.clip(candidate, *problem.bounds)
        candidate = select(starting, self.start(problem, starting, event), candidate)
        adversarial, seen = self.ask(problem, candidate, state.closest)

        state = state._replace(tries=state.tries + 1, closest=seen.value)
        # What clipping left of the noise is what was sampled.
        sample = (candidate - state.point) / size
        new = select(
            searching,
            self._searched(problem, state, candidate, adversarial),
            select(
                sampling, self._sampled(state, sample, adversarial), self._missed(problem, state)
            ),
        )
        found = adversarial & ~searching & ~sampling  # the first adversarial, or a step to one
        new = select(found, _search(state, candidate), new)
        return new, seen._replace(spent=self.out_of_starts(starting, adversarial, event))

    def _middle(self, problem: Problem, state: _State) -> Array:
        """The next point of the bisection, `[B, ...]`."""
        inputs, delta = problem.inputs, state.far - problem.inputs
        share = (state.low + state.high) / 2
        if self.norm == "linf":
            limit = norms.per_example(share * norms.distance(delta, "linf"), delta)
            return inputs + jnp.clip(delta, -limit, limit)
        return inputs + norms.per_example(share, delta) * delta

    def _noise(self, problem: Problem, state: _State) -> Array:
        """Random directions `[B, ...]` of l2 norm 1: normal for l2, uniform in a cube for linf."""
        keys = jax.vmap(jax.random.fold_in)(decisions.stream(problem, 1), state.round)
        keys = jax.vmap(jax.random.fold_in)(keys, state.tries)
        if self.norm == "linf":
            draw = 2 * decisions.uniform(keys, state.point) - 1
        else:
            draw = decisions.normal(keys, state.point)
        return norms.normalize(draw, "l2")

    def _sample_size(self, problem: Problem, state: _State) -> Array:
        """δ, `[B]`."""
        later = self.gamma * state.distance / math.prod(state.point.shape[1:])
        return jnp.where(state.round == 1, _FIRST_SAMPLES * problem.width, later)

    def _searched(
        self, problem: Problem, state: _State, candidate: Array, adversarial: Array
    ) -> _State:
        """One halving; at the end of the bisection a new round begins."""
        middle = (state.low + state.high) / 2
        low = jnp.where(adversarial, state.low, middle)
        high = jnp.where(adversarial, middle, state.high)
        point = select(adversarial, candidate, state.point)
        state = state._replace(low=low, high=high, point=point)
        share = self.gamma / math.prod(point.shape[1:]) ** _TOLERANCE[self.norm]
        ended = high - low <= jnp.maximum(share, _LEAST_TOLERANCE)
        return select(ended, self._next_round(problem, state), state)

    def _next_round(self, problem: Problem, state: _State) -> _State:
        return state._replace(
            phase=jnp.full_like(state.phase, _SAMPLE),
            round=state.round + 1,
            tries=jnp.zeros_like(state.tries),
            distance=norms.distance(state.point - problem.inputs, self.norm),
            weighted=jnp.zeros_like(state.weighted),
            plain=jnp.zeros_like(state.plain),
            balance=jnp.zeros_like(state.balance),
        )

    def _sampled(self, state: _State, sample: Array, adversarial: Array) -> _State:
        """One more sample; after the last one of the round its direction and the first step."""
        decision = jnp.where(adversarial, 1.0, -1.0).astype(sample.dtype)
        weighted = state.weighted + norms.per_example(decision, sample) * sample
        plain = state.plain + sample
        balance = state.balance + decision
        mean = balance / state.tries
        # Where all decisions agree, subtracting their mean would leave nothing.
        mean = norms.per_example(jnp.where(jnp.abs(mean) < 1, mean, 0.0), sample)
        root = jnp.sqrt(state.round.astype(sample.dtype))
        num_samples = jnp.minimum(jnp.floor(self.num_samples * root), self.max_samples)
        state = state._replace(weighted=weighted, plain=plain, balance=balance)
        stepping = state._replace(
            phase=jnp.full_like(state.phase, _STEP),
            tries=jnp.zeros_like(state.tries),
            direction=norms.steepest(weighted - mean * plain, self.norm),
            length=state.distance / root,
        )
        return select(state.tries >= num_samples, stepping, state)

    def _missed(self, problem: Problem, state: _State) -> _State:
        """State after a step too long: half of it, or samples again."""
        given_up = (state.phase == _STEP) & (state.tries > _NUM_HALVINGS)
        shorter = state._replace(length=state.length / 2)
        return select(given_up, self._next_round(problem, state), shorter)

    def info(
        self, problem: Problem, state: _State, progress: Progress, result: AttackResult
    ) -> dict[str, Array]:
        return {"rounds": state.round}


def _search(state: _State, far: Array) -> _State:
    """The bisection from this adversarial `[B, ...]` towards the input begins."""
    return state._replace(
        phase=jnp.full_like(state.phase, _SEARCH),
        tries=jnp.zeros_like(state.tries),
        point=far,
        far=far,
        low=jnp.zeros_like(state.low),
        high=jnp.ones_like(state.high),
    )
