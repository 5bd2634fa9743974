"""Universal perturbation: one for a whole set of inputs, in a loop on the host."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate, losses, norms
from jdistill._jax import as_pytree, full_precision, jit, register, static_field
from jdistill.attacks._core import engine, handlers
from jdistill.attacks._core.engine import Method, Passes, Progress, Seen
from jdistill.attacks._core.problem import AttackResult, Problem, prepare, refuse_tracers
from jdistill.attacks._core.traits import by_loss, facts, with_loss
from jdistill.typing import Array, ArrayLike, Bounds, Callback, Event, LogitsFn, Norm

_NORMS: tuple[Norm, ...] = ("linf", "l2")


@facts(
    title=with_loss("Universal", losses.cross_entropy),
    norms=_NORMS,
    follows=by_loss,
    host_loop=True,
    handicap="one perturbation for all examples",
)
def universal(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: Norm = "linf",
    num_epochs: int = 10,
    batch_size: int = 128,
    step_size: ArrayLike | None = None,
    loss: Callable[..., Array] = losses.cross_entropy,
    loss_cap: float | None = 9.0,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    callback: Callback | None = None,
) -> AttackResult:
    """One perturbation that breaks as many of the inputs as it can, by stochastic gradients.

    The perturbation δ and its steps are::

        maximize over ‖δ‖ <= eps:   Σ_b min(loss(clip(x_b + δ)), loss_cap)
        δ ← project(δ + step_size · steepest(gradient over a batch))

    The cap keeps a few examples, far beyond the boundary already, from deciding the direction.
    The step falls linearly to 0.

    This is the one attack that is not per example, and a driver: a loop on the host that cannot
    be called under `jit` or `vmap`. The perturbation depends on all inputs, on their order and on
    `batch_size`. To see how it carries over to other inputs, add `info["perturbation"]` to them.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: one key, for the order of the examples in each epoch.
        inputs: `[B, ...]` float inside `bounds`, the whole set.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; a scalar.
        norm: `"linf"` or `"l2"`.
        num_epochs: passes over the set, at least 1.
        batch_size: examples a step, at least 1.
        step_size: the first step's length in input units, at least 0; None takes `eps / 4`.
        loss: per-example loss `(logits [B, K], labels [B]) -> [B]`, maximized (for targets:
            minimized). `jdistill.losses.margin` does not saturate on distilled networks.
        loss_cap: where what is maximized stops to count, above 0, in the loss's unit; None for no
            cap.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None moves away from the labels.
        callback: called after every epoch with `event="attack"`, `stage="universal"`, `done` and
            `total` epochs.

    Returns:
        The result: every input plus the perturbation, clipped into the box; one that is a success
        already is unchanged, and has no part in the search. `info`: `perturbation [B, ...]`, the
        same for all; `gradients`, and `first_success`, which is 1 where it breaks an example.

    Raises:
        ValueError: a tracer among the arguments, eps or step_size below 0 or not a scalar,
            loss_cap not above 0, counts below 1, an unknown norm, not one key; else as every
            attack.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.6, 0]])
        >>> x, y = jnp.array([[0.2, 0.2], [0.3, 0.1], [0.9, 0.9]]), jnp.array([0, 0, 0])
        >>> result = universal(logits_fn, jax.random.key(0), x, y, eps=0.15)
        >>> result.success.tolist(), bool(jnp.allclose(result.info["perturbation"], -0.15))
        ([True, True, False], True)

    References:
        Shafahi, Najibi, Xu, Dickerson, Davis & Goldstein 2020, "Universal Adversarial Training",
        section 3 (stochastic gradients on a capped loss); Moosavi-Dezfooli, Fawzi, Fawzi &
        Frossard 2017, "Universal Adversarial Perturbations" (the problem). The falling step and
        its default are ours.
    """
    refuse_tracers("universal", logits_fn, key, inputs, labels, targets, eps, step_size)
    _validate.one_of(_NORMS, norm=norm)
    _validate.scalar(eps=eps)
    _validate.non_negative(eps=eps)
    _validate.count(num_epochs=num_epochs, batch_size=batch_size)
    step_size = eps / 4 if step_size is None else step_size
    _validate.scalar(step_size=step_size)
    _validate.non_negative(step_size=step_size)
    if loss_cap is not None:
        _validate.scalar(loss_cap=loss_cap)
        _validate.positive(loss_cap=loss_cap)
    _validate.function(loss=loss)
    _validate.callback(callback)
    key = _validate.prng_key(key)
    if key.shape != ():
        raise ValueError(
            f"expected one key, got keys of shape {key.shape}; the examples share a perturbation: "
            "pass jax.random.key(0)"
        )
    problem = prepare(
        logits_fn, None, inputs, labels, targets=targets, bounds=bounds, open_box=True
    )
    as_float = functools.partial(jnp.asarray, dtype=problem.inputs.dtype)
    ball = as_float(eps), as_float(np.inf if loss_cap is None else loss_cap)
    size = problem.inputs.shape[0]
    delta = jnp.zeros(problem.inputs.shape[1:], problem.inputs.dtype)
    if handlers.counts(Passes(2 + num_epochs, num_epochs)):
        return handlers.untried(problem)
    with full_precision():
        clean, logits = np.zeros(size, bool), []
        for rows, real in _chunks(np.arange(size), batch_size):
            found, reached = _judged_clean(_rows(problem, rows))
            clean[rows[:real]] = np.asarray(reached)[:real]
            logits.append(found)
        needy = np.flatnonzero(~clean)
        step, num_steps = 0, num_epochs * -(-len(needy) // batch_size)
        for epoch in range(num_epochs if len(needy) else 0):
            order = np.asarray(jax.random.permutation(jax.random.fold_in(key, epoch), needy))
            for rows, real in _chunks(order, batch_size):
                length = as_float(step_size * (1 - step / num_steps))
                counted = jnp.arange(len(rows)) < real
                delta = _step(
                    _rows(problem, rows), as_pytree(loss), counted, delta, ball, length, norm=norm
                )
                step += 1
            if callback is not None:
                name = "universal"
                progress: Event = {"event": "attack", "stage": name, "attack": name}
                callback({**progress, "done": epoch + 1, "total": num_epochs})
        parts = []
        for (rows, real), of_rows in zip(_chunks(np.arange(size), batch_size), logits, strict=True):
            part = _shifted(_rows(problem, rows), of_rows, delta, norm, num_epochs)
            parts.append(jax.tree.map(lambda leaf, real=real: leaf[:real], part))
    if not parts:
        return _shifted(problem, _judged_clean(problem)[0], delta, norm, num_epochs)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _chunks(order: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """The rows in chunks of one size, the last one filled up with its first; and how many count."""
    size = min(batch_size, len(order))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        yield np.concatenate([rows, np.repeat(rows[:1], size - len(rows))]), len(rows)


def _rows(problem: Problem, rows: np.ndarray) -> Problem:
    goal, bounds = jax.tree.map(
        lambda leaf: leaf[rows] if leaf.ndim else leaf, (problem.goal, problem.bounds)
    )
    return problem._replace(inputs=problem.inputs[rows], goal=goal, bounds=bounds)


@jit
def _judged_clean(problem: Problem) -> tuple[Array, Array]:
    """The clean logits, and which succeed already."""
    logits = problem.logits_fn(problem.inputs)
    return logits, problem.goal.reached_clean(logits)


@functools.partial(jit, static_argnames="norm")
def _step(
    problem: Problem,
    loss: Callable[..., Array],
    counted: Array,
    delta: Array,
    ball: tuple[Array, Array],
    length: Array,
    *,
    norm: Norm,
) -> Array:
    eps, cap = ball

    def total(deltas: Array) -> Array:
        logits = problem.logits_fn(jnp.clip(problem.inputs + deltas, *problem.bounds))
        gain = jnp.minimum(problem.goal.gain(loss, logits), cap)
        return jnp.sum(jnp.where(counted, gain, 0.0))

    gradient = jax.grad(total)(jnp.broadcast_to(delta[None], problem.inputs.shape))
    # Example by example, so that one that overflows does not silence the others.
    gradient = jnp.sum(jnp.where(jnp.isfinite(gradient), gradient, 0.0), axis=0, keepdims=True)
    moved = delta[None] + length * norms.steepest(gradient, norm)
    return norms.project(moved, eps, norm)[0]


def _shifted(
    problem: Problem, logits: Array, delta: Array, norm: Norm, num_epochs: int
) -> AttackResult:
    """The inputs plus the perturbation, judged."""
    deltas = jnp.broadcast_to(delta[None], problem.inputs.shape)
    method = _Shift(deltas=deltas, logits=logits, norm=norm, num_epochs=num_epochs)
    return engine.run(method, problem)


@register
class _Shift(Method):
    """The perturbation as an attack of one event: all epochs, which judged nothing."""

    deltas: Array  # [B, ...], all the same
    logits: Array  # [B, K], of the clean inputs
    norm: Norm = static_field()
    num_epochs: int = static_field()
    num_events = 1
    narrows = False

    @property
    def passes(self) -> Passes:  # type: ignore[override]
        return Passes(self.num_epochs, self.num_epochs)

    def init(self, problem: Problem) -> tuple[Array, Array]:
        shifted = jnp.clip(problem.inputs + self.deltas, *problem.bounds)
        return shifted, self.logits

    def step(self, problem: Problem, state: Array, event: Array) -> tuple[Array, Seen]:
        nothing = jnp.full(event.shape, jnp.nan, state.dtype)
        return state, Seen(jnp.zeros(event.shape, bool), nothing)

    def point(self, problem: Problem, state: Array) -> Array:
        return state

    def info(
        self, problem: Problem, state: Array, progress: Progress, result: AttackResult
    ) -> dict[str, Array]:
        # One point was judged, whatever it took to find it.
        first = jnp.where(progress.first_success == 0, 0, jnp.where(result.success, 1, -1))
        return {"perturbation": self.deltas, "first_success": first}
