"""What the decision-based attacks share: counted queries, the closest point, a first adversarial.

They ask the network one thing only, whether a point is a success; no logit and no gradient decides
anything. So each query is one row of one forward pass, counted here and nowhere else.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, norms
from jdistill.attacks._core import problem as _base
from jdistill.attacks._core.constant_search import select
from jdistill.attacks._core.problem import AttackResult, Problem
from jdistill.typing import Array

# The clean input, one more point, and the verification.
_LEAST_QUERIES = 3
# By what share of the distance a point is closer: more than rounding, which must not decide where
# points of equal distance are compared.
CLOSER = 1e-5


class Oracle(NamedTuple):
    """What answers, and how often it may be asked."""

    problem: Problem
    norm: str  # of the distance that is kept small
    num_queries: int  # the most for an example, its verification included


class Ledger(NamedTuple):
    """What the queries cost and gave so far; every leaf leads with `[B]`."""

    queries: Array
    best: Array  # the closest adversarial; the clean input before there is one
    best_distance: Array  # inf before there is one
    first_success: Array  # the query that found the first one
    distances: Array  # [B, 1, num_queries], of each query's adversarial at the least budget that
    # lets it be verified; or [B, 0, 0]

    @property
    def found(self) -> Array:
        """Whether an adversarial is known, `[B]`."""
        return jnp.isfinite(self.best_distance)


def check_counts(num_queries: int, num_starts: int) -> None:
    """The counts that these attacks share."""
    _validate.count(num_queries=num_queries, minimum=_LEAST_QUERIES)
    _validate.count(num_starts=num_starts)


def open_ledger(oracle: Oracle, trace: bool) -> tuple[Array, Ledger]:
    """Which clean inputs are a success already, `[B]`, and the ledger after that query."""
    problem = oracle.problem
    clean_success = problem.goal.reached_clean(problem.logits_fn(problem.inputs))
    shape = (*clean_success.shape, 1, oracle.num_queries) if trace else (*clean_success.shape, 0, 0)
    return clean_success, Ledger(
        queries=jnp.ones(clean_success.shape, jnp.int32),
        best=problem.inputs,
        best_distance=jnp.full(clean_success.shape, jnp.inf, problem.inputs.dtype),
        first_success=jnp.where(clean_success, 0, -1),
        distances=jnp.full(shape, jnp.inf, problem.inputs.dtype),
    )


def affordable(oracle: Oracle, ledger: Ledger) -> Array:
    """Whether one more query leaves one for the verification, `[B]`."""
    return ledger.queries < oracle.num_queries - 1


def ask(oracle: Oracle, ledger: Ledger, candidate: Array, active: Array) -> tuple[Array, Ledger]:
    """One query for each active example: whether its candidate is adversarial, `[B]`."""
    problem = oracle.problem
    adversarial = active & problem.goal.reached(problem.logits_fn(candidate))
    distance = norms.distance(candidate - problem.inputs, oracle.norm)
    better = adversarial & (distance < (1 - CLOSER) * ledger.best_distance)
    seen = jnp.where(adversarial, distance, jnp.inf)
    first = adversarial & (ledger.first_success < 0)
    return adversarial, Ledger(
        queries=ledger.queries + active,
        best=select(better, candidate, ledger.best),
        best_distance=jnp.where(better, distance, ledger.best_distance),
        first_success=jnp.where(first, ledger.queries, ledger.first_success),
        distances=_base.record(
            ledger.distances, active, seen, jnp.zeros_like(ledger.queries), ledger.queries + 1
        ),
    )


def find_start(
    oracle: Oracle, ledger: Ledger, init: Array | None, num_starts: int, done: Array
) -> Ledger:
    """The ledger with a first adversarial: `init`, or one of `num_starts` draws."""
    problem = oracle.problem
    num_tries = num_starts + (init is not None)
    keys = stream(problem, 0)

    def body(carry: tuple[Ledger, Array, Array]) -> tuple[Ledger, Array, Array]:
        ledger, tried, done = carry
        # Some networks take all noise of one contrast for the same class.
        candidate = jax.vmap(functools.partial(_start, problem=problem))(
            jax.vmap(jax.random.fold_in)(keys, tried), tried % 2 == 1
        )
        if init is not None:
            candidate = select(tried == 0, jnp.clip(init, *problem.bounds), candidate)
        active = ~done & affordable(oracle, ledger)
        adversarial, ledger = ask(oracle, ledger, candidate, active)
        tried = tried + active
        return ledger, tried, ~active | adversarial | (tried == num_tries)

    ledger, _, _ = jax.lax.while_loop(
        lambda carry: jnp.any(~carry[2]), body, (ledger, jnp.zeros_like(ledger.queries), done)
    )
    return ledger


def stream(problem: Problem, index: int) -> Array:
    """Keys `[B]` for one of an attack's uses of chance."""
    keys = _base.need_key(problem, "random starts")
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)


def normal(keys: Array, like: Array) -> Array:
    """Independent normal draws `[B, ...]`, each example's from its own key."""
    return jax.vmap(functools.partial(jax.random.normal, shape=like.shape[1:], dtype=like.dtype))(
        keys
    )


def uniform(keys: Array, like: Array) -> Array:
    """Independent draws from `[0, 1)`, `[B, ...]`, each example's from its own key."""
    return jax.vmap(functools.partial(jax.random.uniform, shape=like.shape[1:], dtype=like.dtype))(
        keys
    )


def _start(key: Array, narrow: Array, problem: Problem) -> Array:
    """One random point of the box, or of a random range between its bounds."""
    low, high = problem.bounds
    shape = problem.inputs.shape[1:]
    size = math.prod(shape)
    draws = jax.random.uniform(key, (size + 2,), problem.inputs.dtype)
    ends = jnp.where(narrow, draws[size:], jnp.arange(2.0, dtype=draws.dtype))
    point = ends[0] + (ends[1] - ends[0]) * draws[:size].reshape(shape)
    return jnp.clip(low + (high - low) * point, low, high)


def close(oracle: Oracle, ledger: Ledger, clean_success: Array, *, trace: bool) -> AttackResult:
    """The closest adversarial of all queries, verified."""
    result = _base.finish(
        oracle.problem,
        ledger.best,
        clean_success=clean_success,
        found=ledger.found,
        queries=ledger.queries,
        norm=oracle.norm,
        info={},
        minimum_norm=True,
    )
    info = {"first_success": ledger.first_success.astype(jnp.int32)}
    if trace:
        distances = jax.lax.cummin(ledger.distances[:, 0], axis=1)
        # A point that the verification did not confirm is none.
        distances = jnp.where(result.success[:, None], distances, jnp.inf)
        info["distance"] = jnp.where(clean_success[:, None], 0.0, distances)
    return result._replace(info=info)
