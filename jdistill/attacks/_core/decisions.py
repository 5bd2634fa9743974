"""Decision-based attacks: one query per event, the closest point, and a first adversarial.

They ask the network one thing only, whether a point is a success; no logit and no gradient decides
anything. A step asks one query of every example, for whatever that example needs next: no example
waits for another's draws or halvings, and the events are the queries.
"""

import functools
import math

import jax
import jax.numpy as jnp

from jdistill import _validate, norms
from jdistill._jax import register, static_field
from jdistill.attacks._core.engine import Method, Passes, Seen, select
from jdistill.attacks._core.problem import Problem, need_key
from jdistill.typing import Array

# The clean input, one more point, and the verification.
_LEAST_QUERIES = 3
# From so many on it pays to compile loops over fewer rows, for the examples that run out of starts
# or whose walk ends: each takes as long as some hundreds of queries.
_MANY_QUERIES = 1000
# By what share of the distance a point is closer: more than rounding, which must not decide where
# points of equal distance are compared.
CLOSER = 1e-5


def check_counts(num_queries: int, num_starts: int) -> None:
    """The counts that these attacks share."""
    _validate.count(num_queries=num_queries, minimum=_LEAST_QUERIES)
    _validate.count(num_starts=num_starts)


@register
class DecisionMethod(Method):
    """Base of these attacks: draws until a point is adversarial, then whatever the attack asks."""

    first: Array | None  # [B, ...], tried before the random starts
    num_queries: int = static_field()  # the most for an example, its verification included
    num_starts: int = static_field()
    minimum_norm = True
    keeps_closest = True
    passes = Passes(1, 0)

    @property
    def num_events(self) -> int:  # type: ignore[override]
        # The clean input is asked before them, the result after.
        return self.num_queries - 2

    @property
    def narrows(self) -> bool:  # type: ignore[override]
        return self.num_queries >= _MANY_QUERIES

    def start(self, problem: Problem, starting: Array, event: Array) -> Array:
        """The next start `[B, ...]` of the examples without an adversarial so far."""

        def drawn() -> Array:
            keys = jax.vmap(jax.random.fold_in)(stream(problem, 0), event)
            # Some networks take all noise of one contrast for the same class.
            draw = functools.partial(_random_start, like=problem.inputs)
            point, (low, high) = jax.vmap(draw)(keys, event % 2 == 1), problem.bounds
            return jnp.clip(low + (high - low) * point, low, high)

        # Mostly there are no such examples, and then the draws cost nothing.
        point = jax.lax.cond(jnp.any(starting), drawn, lambda: problem.inputs)
        if self.first is not None:
            point = select(event == 0, jnp.clip(self.first, *problem.bounds), point)
        return point

    def out_of_starts(self, starting: Array, adversarial: Array, event: Array) -> Array:
        """Examples whose last start was not adversarial, `[B]` bool."""
        num_tries = self.num_starts + (self.first is not None)
        return starting & ~adversarial & (event + 1 == num_tries)

    def ask(self, problem: Problem, candidate: Array, closest: Array) -> tuple[Array, Seen]:
        """One query: whether each candidate is adversarial `[B]`, and whether it is closer.

        Args:
            problem: the attack's arguments.
            candidate: `[B, ...]`.
            closest: `[B]`, the distance of the closest adversarial so far, or `inf`.
        """
        adversarial = problem.goal.reached(problem.logits_fn(candidate))
        distance = norms.distance(candidate - problem.inputs, self.norm)
        closer = adversarial & (distance < (1 - CLOSER) * closest)
        value = jnp.where(closer, distance, closest)
        return adversarial, Seen(closer, value, point=candidate, distance=distance)


def stream(problem: Problem, index: int) -> Array:
    """Keys `[B]` for one of an attack's uses of chance."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(
        need_key(problem, "random starts"), index
    )


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


def _random_start(key: Array, narrow: Array, like: Array) -> Array:
    """One random point of the unit box, or of a random range between its bounds."""
    shape = like.shape[1:]
    size = math.prod(shape)
    draws = jax.random.uniform(key, (size + 2,), like.dtype)
    ends = jnp.where(narrow, draws[size:], jnp.arange(2.0, dtype=draws.dtype))
    return ends[0] + (ends[1] - ends[0]) * draws[:size].reshape(shape)
