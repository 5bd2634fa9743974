"""Projected gradient descent and its variants: PGD, BIM, MIM."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, losses, norms
from jdistill._jax import as_pytree, register, static_field
from jdistill.attacks._core.engine import Method, Progress, Seen, run, select
from jdistill.attacks._core.gradient import NORMS, gain_gradient
from jdistill.attacks._core.problem import (
    AttackResult,
    Problem,
    need_key,
    prepare,
    radius,
    start_point,
)
from jdistill.attacks._core.traits import by_loss, facts, with_loss
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn, Norm


@facts(title=with_loss("PGD", losses.cross_entropy), norms=NORMS, follows=by_loss)
def pgd(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: Norm = "linf",
    num_steps: int = 40,
    step_size: ArrayLike | None = None,
    num_restarts: int = 1,
    random_start: bool = True,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    loss: Callable[..., Array] = losses.cross_entropy,
    trace: bool = False,
) -> AttackResult:
    """Projected gradient descent on a loss, inside a ball around each input.

    Each step is::

        x ← project(x + step_size · steepest(∂ loss / ∂x))

    For l1 the steepest direction within the ball alone changes one feature, and nothing once that
    feature is at its bound. So the step is the steepest one within the box
    (`jdistill.norms.ascend`): features move to their bounds in the order of their gradients until
    `step_size` is used up. This departs from SLIDE (Tramèr & Boneh), which shares each step
    equally among the top percent of the features: it needs no share to be chosen, and on a linear
    function it ends at the optimum while the box is inactive, where equal shares do not.

    Each example stops at its first success; the others go on, through `num_restarts` starts.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: one key, or `[B]` keys; None is enough where nothing is random.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; scalar or `[B]`; may be traced.
        norm: `"linf"`, `"l2"` or `"l1"`.
        num_steps: gradient steps per start, at least 1; static.
        step_size: length of a step in input units, at least 0; scalar or `[B]`; may be traced.
            None takes `2.5 · eps / num_steps`.
        num_restarts: starts, at least 1; static. Only survivors take the next one.
        random_start: start uniformly inside the ball; otherwise at the input.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to move towards; None moves away from the labels.
        init: `[B, ...]`, the first start instead (projected into ball and box).
        loss: per-example loss `(logits [B, K], labels [B]) -> [B]`, maximized (for targets:
            minimized). `jdistill.losses.margin` does not saturate on distilled networks. Bind
            numbers as in `fgsm`.
        trace: keep the loss of every point judged.

    Returns:
        The result. An example that resists is returned at its last iterate. `info`:
        `first_success`, where 1 is the first start; `gradients`; `restart [B]` int32, the start it
        ended in; with `trace`, the loss of each start and of what its steps lead to, `trace
        [B, num_restarts · (num_steps + 1) - 1]` (the last point of all is not among them). See
        `jdistill.attacks`.

    Raises:
        ValueError: eps or step_size below 0 or NaN, inputs not finite or outside the box, labels
            or targets outside `0..K-1`, wrong ranks, an unknown norm, counts below 1, no key where
            one is needed.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.3, 0]])
        >>> x, y = jnp.array([[0.3, 0.3]]), jnp.array([0])
        >>> result = pgd(logits_fn, jax.random.key(0), x, y, eps=0.25, num_steps=10)
        >>> bool(result.success[0]), bool(result.distance[0] <= 0.25)
        (True, True)

    References:
        Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", section
        2.1 and appendix (random starts). For l1: Tramèr & Boneh 2019, "Adversarial training and
        robustness for multiple perturbations" (SLIDE), and Croce & Hein 2021, "Mind the box"
        (steepest direction within the box).
    """
    _validate.count(num_restarts=num_restarts)
    _validate.flag(random_start=random_start)
    if num_restarts > 1 and not random_start:
        raise ValueError(
            f"expected num_restarts=1 without random starts, got {num_restarts}; every restart "
            "would be the same run: pass random_start=True"
        )
    problem = prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds, open_box=True)
    if num_restarts > 1 or (random_start and init is None):
        need_key(problem, "random starts")
    method = _descent(
        problem,
        eps,
        norm,
        num_steps,
        step_size,
        init,
        loss,
        path=2.5,
        num_restarts=num_restarts,
        random_start=random_start,
    )
    return run(method, problem, trace=trace)


@facts(title=with_loss("BIM", losses.cross_entropy), norms=NORMS, follows=by_loss)
def bim(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: Norm = "linf",
    num_steps: int = 10,
    step_size: ArrayLike | None = None,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    loss: Callable[..., Array] = losses.cross_entropy,
    trace: bool = False,
) -> AttackResult:
    """Basic iterative method: FGSM in small steps, from the input itself.

    Each step is::

        x ← project(x + step_size · sign(∂ loss / ∂x))        (linf; for l2 and l1 as in `pgd`)

    That is `pgd` without a random start. Each example stops at its first success.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; scalar or `[B]`; may be traced.
        norm: `"linf"`, `"l2"` or `"l1"`.
        num_steps: gradient steps, at least 1; static. The paper takes as many as `eps` has
            255ths, and a quarter more (at most 4 more): 10 for `eps = 8 / 255`.
        step_size: length of a step in input units, at least 0; scalar or `[B]`; may be traced.
            None takes `1.25 · eps / num_steps`, which is the paper's 1 / 255 at its number of
            steps for `eps` up to 16 / 255.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to move towards; None moves away from the labels.
        init: `[B, ...]`, the start instead of the inputs (projected into ball and box).
        loss: per-example loss `(logits [B, K], labels [B]) -> [B]`, maximized (for targets:
            minimized).
        trace: keep the loss of every point judged.

    Returns:
        The result. An example that resists is returned at its last iterate. `info`:
        `first_success`, where 1 is the start; `gradients`; `restart [B]` int32, all 0; with
        `trace`, the loss at each iterate before its step, `trace [B, num_steps]`. See
        `jdistill.attacks`.

    Raises:
        ValueError: eps or step_size below 0 or NaN, inputs not finite or outside the box, labels
            or targets outside `0..K-1`, wrong ranks, an unknown norm, counts below 1.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.3, 0]])
        >>> x, y = jnp.array([[0.3, 0.3]]), jnp.array([0])
        >>> result = bim(logits_fn, None, x, y, eps=0.25)
        >>> bool(result.success[0]), int(result.info["first_success"][0])
        (True, 9)

    References:
        Kurakin, Goodfellow & Bengio 2017, "Adversarial examples in the physical world",
        section 2.2; for l1 see `pgd`.
    """
    del key
    problem = prepare(
        logits_fn, None, inputs, labels, targets=targets, bounds=bounds, open_box=True
    )
    method = _descent(problem, eps, norm, num_steps, step_size, init, loss, path=1.25)
    return run(method, problem, trace=trace)


@facts(title=with_loss("MIM", losses.cross_entropy), norms=NORMS, follows=by_loss)
def mim(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: Norm = "linf",
    num_steps: int = 10,
    step_size: ArrayLike | None = None,
    decay: ArrayLike = 1.0,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    loss: Callable[..., Array] = losses.cross_entropy,
    trace: bool = False,
) -> AttackResult:
    """Momentum iterative method: FGSM in small steps along the accumulated gradient.

    Each step is::

        v ← decay · v + g / ‖g‖₁,    g = ∂ loss / ∂x
        x ← project(x + step_size · sign(v))        (linf; v / ‖v‖₂ for l2; for l1 as in `pgd`)

    Each example stops at its first success. A gradient of exactly 0 adds nothing to `v`, where the
    formula has 0 / 0; a tiny one adds a full unit.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; scalar or `[B]`; may be traced.
        norm: `"linf"`, `"l2"` or `"l1"`.
        num_steps: gradient steps, at least 1; static.
        step_size: length of a step in input units, at least 0; scalar or `[B]`; may be traced.
            None takes `eps / num_steps`, as the paper: the surface is reached by steps of one
            direction alone.
        decay: of the accumulated gradient, at least 0; scalar or `[B]`; may be traced. 0 is `bim`.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to move towards; None moves away from the labels.
        init: `[B, ...]`, the start instead of the inputs (projected into ball and box).
        loss: per-example loss `(logits [B, K], labels [B]) -> [B]`, maximized (for targets:
            minimized).
        trace: keep the loss of every point judged.

    Returns:
        The result. An example that resists is returned at its last iterate. `info`:
        `first_success`, where 1 is the start; `gradients`; `restart [B]` int32, all 0; with
        `trace`, the loss at each iterate before its step, `trace [B, num_steps]`. See
        `jdistill.attacks`.

    Raises:
        ValueError: eps, step_size or decay below 0 or NaN, inputs not finite or outside the box,
            labels or targets outside `0..K-1`, wrong ranks, an unknown norm, counts below 1.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.3, 0]])
        >>> x, y = jnp.array([[0.3, 0.3]]), jnp.array([0])
        >>> result = mim(logits_fn, None, x, y, eps=0.26)
        >>> bool(result.success[0]), int(result.info["first_success"][0])
        (True, 10)

    References:
        Dong, Liao, Pang, Su, Zhu, Hu & Li 2018, "Boosting adversarial attacks with momentum",
        algorithm 1 and section 3.1.
    """
    del key
    problem = prepare(
        logits_fn, None, inputs, labels, targets=targets, bounds=bounds, open_box=True
    )
    decay = radius(decay, problem.inputs, name="decay")
    method = _descent(problem, eps, norm, num_steps, step_size, init, loss, path=1.0, decay=decay)
    return run(method, problem, trace=trace)


def _descent(
    problem: Problem,
    eps: ArrayLike,
    norm: Norm,
    num_steps: int,
    step_size: ArrayLike | None,
    init: ArrayLike | None,
    loss: Callable[..., Array],
    *,
    path: float,
    num_restarts: int = 1,
    random_start: bool = False,
    decay: Array | None = None,
) -> "_Descent":
    """The checked settings; `path` is the default length of all steps together, in radii."""
    _validate.one_of(NORMS, norm=norm)
    _validate.count(num_steps=num_steps)
    eps = radius(eps, problem.inputs)
    step_size = path * eps / num_steps if step_size is None else step_size
    return _Descent(
        loss=as_pytree(loss),
        eps=eps,
        step_size=radius(step_size, problem.inputs, name="step_size"),
        decay=decay,
        first=None if init is None else start_point(init, problem),
        norm=norm,
        num_steps=num_steps,
        num_restarts=num_restarts,
        random_start=random_start,
    )


class _State(NamedTuple):
    inputs: Array  # the current iterate
    velocity: Array | None  # the accumulated gradients; None without momentum


@register
class _Descent(Method):
    loss: Any
    eps: Array  # [B]
    step_size: Array  # [B]
    decay: Array | None  # [B]; None follows each iterate's gradient alone
    first: Array | None  # [B, ...], the first start; None draws it
    norm: Norm = static_field()
    num_steps: int = static_field()
    num_restarts: int = static_field()
    random_start: bool = static_field()

    @property
    def num_events(self) -> int:  # type: ignore[override]
        # The last iterate of the last start is judged by the verification.
        return self.num_restarts * (self.num_steps + 1) - 1

    def init(self, problem: Problem) -> tuple[_State, Array]:
        restart = jnp.zeros(self.eps.shape, jnp.int32)
        start = self._start(problem, restart) if self.first is None else self.first
        start = norms.into_ball_and_box(start, problem.inputs, self.eps, self.norm, problem.bounds)
        velocity = None if self.decay is None else jnp.zeros_like(start)
        return _State(start, velocity), problem.logits_fn(problem.inputs)

    def _start(self, problem: Problem, restart: Array) -> Array:
        """The starting point of each example's restart `[B]`."""
        if not self.random_start:
            return problem.inputs
        keys = jax.vmap(jax.random.fold_in)(need_key(problem, "random starts"), restart)
        noise = norms.random_start(keys, problem.inputs, self.eps, self.norm)
        return jnp.clip(problem.inputs + noise, *problem.bounds)

    def step(self, problem: Problem, state: _State, event: Array) -> tuple[_State, Seen]:
        """Judge the current iterate, then move it, or begin the next start."""
        gradient, logits, gain = gain_gradient(problem, problem.goal, self.loss, state.inputs)
        direction, velocity = gradient, state.velocity
        if velocity is not None and self.decay is not None:
            velocity = norms.per_example(self.decay, gradient) * velocity
            direction = velocity = velocity + norms.normalize(gradient, "l1")
        moved = norms.ascend(state.inputs, direction, self.step_size, self.norm, problem.bounds)
        moved = norms.into_ball_and_box(moved, problem.inputs, self.eps, self.norm, problem.bounds)
        if self.num_restarts > 1:
            restart, step = jnp.divmod(event, self.num_steps + 1)
            moved = select(step == self.num_steps, self._start(problem, restart + 1), moved)
        return _State(moved, velocity), Seen(problem.goal.reached(logits), gain)

    def point(self, problem: Problem, state: _State) -> Array:
        return state.inputs

    def info(
        self, problem: Problem, state: Any, progress: Progress, result: AttackResult
    ) -> dict[str, Array]:
        # The last event's.
        return {"restart": jnp.maximum(progress.event - 1, 0) // (self.num_steps + 1)}
