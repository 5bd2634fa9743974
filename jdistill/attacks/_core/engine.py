"""Loop driver for attacks: who is done, what is counted, the best point, and the verification.

An attack is a value, a `Method`: frozen settings with `init`, `step`, `point`, and `info`. A step
judges one point per example and moves on; one loop, here, does the rest for all attacks:

* An example is done at its first success (an attack that keeps the closest point goes on), when
  its method says that nothing is left to try, or after `num_events` steps. Its state then stays as
  it is, and it stops costing: when half of the examples are done, the others go on in a batch half
  as large, then in a quarter, then in a sixteenth, … while that is worth a compilation
  (`rows.row_counts`).
* `queries` and `gradients` count forward and backward passes from the number of events and the
  method's `passes`.
* `first_success` is the number of the event that judged the first success: -1 never, 0 the clean
  input, `k >= 1` the k-th point judged, over restarts and searches. A point that only the final
  verification judges is the next event.
* The trace is `value` of every event, `[B, num_events]`, NaN once an example is done.
* What is returned is verified by a forward pass.

`run` compiles all of it into one program. Under `handled_by` it hands the method on: to `Chunks`,
where the same loop comes back to the host every few events, to save and to answer Ctrl-C; to
`Maximizer`, the form for adversarial training, all steps for all examples and nothing judged; to
`Counter`, which adds up what it would cost.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from jdistill import _validate, metrics, norms
from jdistill._jax import (
    backend,
    full_precision,
    jit,
    unbound,
    under_trace,
)
from jdistill.attacks._core import rows
from jdistill.attacks._core.problem import AttackResult, Problem
from jdistill.typing import Array, Norm


class Passes(NamedTuple):
    """Passes of one example through the network, as `cost` counts them.

    Attributes:
        forward: evaluations of the logits.
        backward: gradients; none of them is counted as a forward pass as well.
    """

    forward: int
    backward: int


class Seen(NamedTuple):
    """Findings of a step on the point it judged; every leaf leads with `[B]`.

    Attributes:
        success: whether the point is adversarial.
        value: what the trace shows of it.
        spent: whether nothing more will be tried; None where `num_events` alone ends the attack.
        point: the point, of a method that keeps the closest.
        distance: what the closest is measured by, of a method that keeps it.
        note: kept with the closest point.
    """

    success: Array
    value: Array
    spent: Array | None = None
    point: Array | None = None
    distance: Array | None = None
    note: Any = None


class Progress(NamedTuple):
    """Progress of each example; every leaf leads with `[B]`.

    Attributes:
        event: int32, points judged after the clean input.
        done: bool.
        first_success: int32, see the module.
        best: the closest success, its distance (`inf` before there is one) and note; None from
            a method that does not keep it.
        trace: `[B, num_events]`, or `[B, 0]`.
    """

    event: Array
    done: Array
    first_success: Array
    best: tuple[Array, Array, Any] | None
    trace: Array


Carry = tuple[Any, Progress]  # the method's state, and the loop's


class Method:
    """Base of attacks as the loop runs them: settings as fields, state as a pytree `[B, ...]`.

    Fields that are arrays lead with `[B]` or are scalars; a step may compute anything for examples
    that are done, the loop leaves them as they are. Nothing in a state is a PRNG key: draws are
    `fold_in` of the example's key by the event's number.

    Attributes:
        norm: of the result's distance.
        num_events: the most points that a start judges; None where the method alone knows the end.
        minimum_norm: whether a failure is the clean input at distance `inf`.
        keeps_closest: whether examples go on after a success, and the closest one is returned;
            otherwise the first success ends an example, and `point` is returned.
        moves_first: whether a step judges the point that it leads to, so that a success keeps the
            new state; otherwise it judges the point that the state has, and a success leaves the
            state as it is.
        maximizes: whether examples go on whatever succeeds, those already wrong included.
        narrows: whether examples end at different times, so that it pays to go on in fewer rows.
        passes_at_start: of `init`, the clean input's forward pass included.
        passes: of a step.
    """

    norm: Norm
    num_events: int | None
    minimum_norm: ClassVar[bool] = False
    keeps_closest: ClassVar[bool] = False
    moves_first: ClassVar[bool] = False
    maximizes: bool = False
    narrows: bool = True
    passes_at_start: Passes = Passes(1, 0)
    passes: Passes = Passes(1, 1)

    def init(self, problem: Problem) -> tuple[Any, Array]:
        """The state before the first event, and the clean logits `[B, K]`."""
        raise NotImplementedError

    def step(self, problem: Problem, state: Any, event: Array) -> tuple[Any, Seen]:
        """Judge each example's event number `[B]` (from 0), and move on."""
        raise NotImplementedError

    def most_events(self) -> int:
        """The most points that an example may have judged."""
        assert self.num_events is not None
        return self.num_events

    def point(self, problem: Problem, state: Any) -> Array:
        """Points to return, of a method that keeps no closest one, `[B, ...]`."""
        raise NotImplementedError

    def no_note(self, problem: Problem) -> Any:
        """Note before there is a closest point."""
        del problem

    def distance(self, delta: Array) -> Array:
        """The result's distance, `[B]`."""
        return norms.distance(delta, self.norm)

    def info(
        self, problem: Problem, state: Any, progress: Progress, result: AttackResult
    ) -> dict[str, Array]:
        """Further `info` of the result, every array `[B, ...]`."""
        del problem, state, progress, result
        return {}


def select(condition: Array, new: Any, old: Any) -> Any:
    """Leaf by leaf, the new rows where the condition `[B]` holds."""
    return jax.tree.map(
        lambda a, b: jnp.where(condition.reshape(a.shape[:1] + (1,) * (a.ndim - 1)), a, b), new, old
    )


# -------------------------------------------------------------------------------------------------
# The ways to run a method


class Handler(Protocol):
    """Receiver of the methods that `run` does not compile into one program itself.

    Attributes:
        on_host: whether it works on concrete arrays alone; under `jit` and `vmap` it is not asked.
    """

    on_host: bool

    def __call__(self, method: Method, problem: Problem, trace: bool, /) -> AttackResult: ...


_handler: contextvars.ContextVar[Handler | None] = contextvars.ContextVar("handler", default=None)


@contextlib.contextmanager
def handled_by(handler: Handler) -> Iterator[None]:
    """Context in which `handler` gets every method that an attack runs."""
    token = _handler.set(handler)
    try:
        yield
    finally:
        _handler.reset(token)


def current_handler() -> Handler | None:
    """The handler that methods go to, or None."""
    return _handler.get()


def run(method: Method, problem: Problem, *, trace: bool = False) -> AttackResult:
    """Step until every example is done, and verify.

    Args:
        method: the attack.
        problem: its checked arguments.
        trace: whether `info` has the trace.

    Returns:
        The result; `info` has `first_success`, `gradients`, the trace on request, and what the
        method adds.
    """
    _validate.flag(trace=trace)
    handler = _handler.get()
    with full_precision():
        traced = under_trace(method, problem)
        if handler is not None and not (handler.on_host and traced):
            result = handler(method, problem, trace)
        else:
            result = _run(method, problem, trace=trace)
        if not traced and (handler is None or handler.on_host):
            _check_loss(getattr(method, "loss", None), problem, result)
    return result


def _check_loss(loss: Callable[..., Array] | None, problem: Problem, result: AttackResult) -> None:
    """An error where a loss of the user's own is NaN: nothing led the attack away from there.

    Raises:
        FloatingPointError: it is, for an example that withstood.
    """
    # The library's own are numbers wherever the logits are a prediction.
    if loss is None or str(getattr(unbound(loss)[0], "__module__", "")).startswith("jdistill."):
        return
    broken = _broken(loss, problem, result)
    if jnp.any(broken):
        where = int(jnp.argmax(broken))
        raise FloatingPointError(
            "expected a loss with a number and a gradient wherever the logits are finite, got NaN "
            f"for example {where} ({int(jnp.sum(broken))} in all), from where nothing led on; "
            "compute it from the logits without a logarithm of 0, as "
            "jdistill.losses.cross_entropy does"
        )


@jit
def _broken(loss: Callable[..., Array], problem: Problem, result: AttackResult) -> Array:
    logits = problem.logits_fn(result.inputs)

    def total(logits: Array) -> tuple[Array, Array]:
        gain = problem.goal.gain(loss, logits)
        return jnp.sum(gain), gain

    slope, gain = jax.grad(total, has_aux=True)(logits)
    broken = jnp.isnan(gain) | jnp.any(jnp.isnan(slope), axis=-1)
    return broken & metrics.predicts(logits) & ~result.success


@functools.partial(jit, static_argnames="trace")
def _run(method: Method, problem: Problem, *, trace: bool) -> AttackResult:
    return whole(method, problem, trace=trace)


def whole(method: Method, problem: Problem, *, trace: bool = False) -> AttackResult:
    """The result of a method from its start to its end; what `run` compiles."""
    carry = start(method, problem, trace=trace)
    return finish(method, problem, advance(method, problem, carry), trace=trace)


def start(method: Method, problem: Problem, *, trace: bool) -> Carry:
    """The carry before the first event."""
    state, logits = method.init(problem)
    wrong = problem.goal.reached_clean(logits)
    zeros, inputs = jnp.zeros(wrong.shape, jnp.int32), problem.inputs
    nothing = inputs, jnp.full(wrong.shape, jnp.inf, inputs.dtype), method.no_note(problem)
    width = method.num_events or 0 if trace else 0
    return state, Progress(
        event=zeros,
        done=jnp.zeros_like(wrong) if method.maximizes else wrong,
        first_success=jnp.where(wrong, 0, -1).astype(jnp.int32),
        best=nothing if method.keeps_closest else None,
        trace=jnp.full((*wrong.shape, width), jnp.nan, inputs.dtype),
    )


def event(method: Method, problem: Problem, carry: Carry) -> Carry:
    """One step of every example that is not done."""
    state, progress = carry
    active = ~progress.done
    new, seen = method.step(problem, state, progress.event)
    event = progress.event + active
    success = active & seen.success
    first = success & (progress.first_success < 0)
    best, stops = progress.best, jnp.zeros_like(success)
    if best is not None:
        assert seen.distance is not None
        closer = success & (seen.distance < best[1])
        best = select(closer, (seen.point, seen.distance, seen.note), best)
    elif not method.maximizes:
        stops = success
    ended = stops
    if method.num_events is not None:
        ended |= event >= method.num_events
    if seen.spent is not None:
        ended |= seen.spent
    trace = progress.trace
    if trace.shape[1]:
        # An example that is done writes past the end, where nothing is.
        place = jnp.where(active, progress.event, trace.shape[1])
        value = seen.value.astype(trace.dtype)
        trace = trace.at[jnp.arange(len(place)), place].set(value, mode="drop")
    return select(active if method.moves_first else active & ~stops, new, state), Progress(
        event=event,
        done=progress.done | (active & ended),
        first_success=jnp.where(first, event, progress.first_success),
        best=best,
        trace=trace,
    )


def advance(method: Method, problem: Problem, carry: Carry, at_most: Array | None = None) -> Carry:
    """The carry after `at_most` more events, or at the end where that is None."""
    if method.num_events == 0:
        return carry
    turn = jnp.zeros((), jnp.int32)
    if at_most is None:
        at_most = jnp.asarray(jnp.iinfo(jnp.int32).max)

    def one(fixed: tuple[Method, Problem], carry: tuple[Array, Carry]) -> tuple[Array, Carry]:
        turn, inner = carry
        return turn + 1, event(*fixed, inner)

    sizes = [0]
    steps = rows.LEAST_STEPS if method.num_events is None else method.num_events
    if method.narrows and steps >= rows.LEAST_STEPS and not problem.spread.over_devices:
        work = rows.multiplications(problem.logits_fn, problem.inputs)
        sizes = rows.row_counts(problem.inputs.shape[0], steps, work)
    loop: Callable[..., Any] = functools.partial(rows.until_done, sizes=sizes)
    if len(sizes) > 1 and method.passes.backward > 1 and backend() == "cpu":
        loop = rows.in_turn
    _, carry = loop(
        one,
        (method, problem),
        (turn, carry),
        goes_on=lambda carry: carry[0] < at_most,
        done=lambda carry: carry[1][1].done,
    )
    return carry


def finish(method: Method, problem: Problem, carry: Carry, *, trace: bool) -> AttackResult:
    """The result, verified by a forward pass."""
    state, progress = carry
    wrong = jnp.zeros_like(progress.done) if method.maximizes else progress.first_success == 0
    found = jnp.ones_like(wrong)
    if progress.best is None:
        candidate = method.point(problem, state)
    else:
        candidate, distance, _ = progress.best
        found = jnp.isfinite(distance)
    inputs = problem.inputs
    keeps_clean = wrong | (~found if method.minimum_norm else False)
    candidate = select(keeps_clean, inputs, candidate)
    verified = problem.goal.reached(problem.logits_fn(candidate))
    success = wrong | (verified & (found if method.minimum_norm else True))
    distance = method.distance(candidate - inputs)
    if method.minimum_norm:
        candidate = select(success, candidate, inputs)
        distance = jnp.where(success, distance, jnp.inf)
    started, each = method.passes_at_start, method.passes
    queries = started.forward + each.forward * progress.event + ~wrong
    gradients = started.backward + each.backward * progress.event
    result = AttackResult(candidate, success, distance, queries.astype(jnp.int32), {})
    # What only the verification judged is one event more.
    judged_last = success & (progress.first_success < 0)
    first = jnp.where(judged_last, progress.event + 1, progress.first_success)
    info = {
        "first_success": first.astype(jnp.int32),
        "gradients": gradients.astype(jnp.int32),
        **({"trace": progress.trace} if trace else {}),
        **method.info(problem, state, progress, result),
    }
    return jax.lax.stop_gradient(result._replace(info=info))
