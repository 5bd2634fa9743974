"""Square Attack: random search by squares, without gradients."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, metrics, norms
from jdistill._jax import register, static_field
from jdistill.attacks import _square_bumps
from jdistill.attacks._core.engine import Method, Passes, Progress, Seen, run, select
from jdistill.attacks._core.problem import (
    AttackResult,
    Problem,
    need_key,
    one_per_example,
    prepare,
    radius,
    start_point,
)
from jdistill.attacks._core.traits import facts
from jdistill.attacks._square_bumps import Window
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn, Norm

_NORMS: tuple[Norm, ...] = ("linf", "l2")
# After so many proposals of a start the share of the image that a window covers is halved.
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# How often a window touches the last row, or column, where 1 is how often it touches any other.
# The border of an image matters least, and an equal share of the queries is lost there.
_LAST_PLACE = 0.125


@facts(title="Square", norms=_NORMS, access="scores")
def square(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: Norm = "linf",
    num_queries: int = 5000,
    num_restarts: int = 1,
    p_init: ArrayLike = 0.8,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """Square Attack: random changes of square windows, kept where they raise the margin.

    No gradient is used, only the logits of the points tried: nothing that hides or shatters
    gradients can stop it. The search begins with vertical stripes of ±eps (l2: a grid of bumps).
    Each proposal then paints one window with +eps or -eps, a sign for each channel, and is kept
    if the margin, max_{i≠y} z_i - z_y, is larger than before. For l2 it moves the change of one
    window into another one, adds a bump to it, and gives the whole change the length eps again.

    A window covers a share `p` of the image, at first `p_init`, halved after 10, 50, 200, 500,
    1000, 2000, 4000, 6000 and 8000 proposals, whatever `num_queries` is. Place and signs are drawn
    for each example by itself. Each stops at its first success.

    Inputs need not be images. `[B, H, W]` is taken for one channel; `[B, D]` for an image of one
    row, whose windows are intervals; of more than four axes all but the last two are the rows.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`; it is never differentiated.
        key: one key, or `[B]` keys. Restart `r` draws its `i`-th point from `fold_in(fold_in(
            example's key, r), i)`.
        inputs: `[B, H, W, C]` float inside `bounds`, or any other shape `[B, ...]`.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; scalar or `[B]`; may be traced.
        norm: `"linf"` or `"l2"`.
        num_queries: proposals per start, at least 1; static. The start is one query more, and so
            are the clean input and the verification.
        num_restarts: starts, at least 1; static. Only survivors take the next one.
        p_init: share of the image that the first windows cover, in `[0, 1]`; scalar or `[B]`; may
            be traced.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label.
        init: `[B, ...]`, the first start instead (projected into ball and box).
        trace: keep the margin after every query.

    Returns:
        The result. An example that resists is returned at its largest margin. `info`:
        `first_success`, the number of points tried, where 1 is the first start; `gradients`, all
        0; `restart [B]` int32, the start it ended in; with `trace`, the largest margin so far in
        that start, `trace [B, num_restarts · (num_queries + 1)]`. See `jdistill.attacks`.

    Raises:
        ValueError: eps below 0 or NaN, p_init outside `[0, 1]`, inputs not finite or outside the
            box, labels or targets outside `0..K-1`, wrong ranks, an unknown norm, counts below 1,
            no key.

    Example:
        >>> logits_fn = lambda x: jnp.round(  # the gradient is 0 everywhere
        ...     64 * (x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.6, 0.0]])))
        >>> x, y = jnp.array([[0.3, 0.5]]), jnp.array([0])
        >>> result = square(logits_fn, jax.random.key(0), x, y, eps=0.3)
        >>> bool(result.success[0]), bool(result.distance[0] <= 0.3)
        (True, True)

    References:
        Andriushchenko, Croce, Flammarion & Hein 2020, "Square Attack: a query-efficient black-box
        adversarial attack via random search", algorithms 1-3 and section 4; without a schedule
        that is rescaled to `num_queries`, as in AutoAttack (Croce & Hein 2020). Departures from the
        released code: windows and signs are drawn for each example, not once for the batch; windows
        also reach the last row and column, an eighth as often as any other, because the border of
        an image matters least and an equal share of the queries would be lost there. As in
        AutoAttack, a sign that changes nothing is not drawn again.
    """
    _validate.one_of(_NORMS, norm=norm)
    _validate.count(num_queries=num_queries, num_restarts=num_restarts)
    _validate.within(0.0, 1.0, p_init=p_init)
    problem = prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds, open_box=True)
    need_key(problem, "random squares")
    method = _Square(
        eps=radius(eps, problem.inputs),
        p_init=one_per_example(p_init, problem.inputs, name="p_init"),
        first=None if init is None else start_point(init, problem),
        norm=norm,
        num_queries=num_queries,
        num_restarts=num_restarts,
    )
    return run(method, problem, trace=trace)


def _images(inputs: Array) -> Array:
    """The inputs as images `[B, H, W, C]`, whatever their axes are."""
    shape = inputs.shape[1:]
    if len(shape) == 1:
        shape = (1, *shape, 1)
    elif len(shape) == 2:
        shape = (*shape, 1)
    return inputs.reshape(len(inputs), math.prod(shape[:-2]), *shape[-2:])


def _sign(draws: Array) -> Array:
    return jnp.where(draws < 0.5, -1.0, 1.0).astype(draws.dtype)


def _window_size(share: Array, rows: int, columns: int, norm: Norm) -> tuple[Array, Array]:
    """Height and width of the windows that cover a share of the image each, int32.

    They are squares, as far as the image's shorter side allows that; the longer side of a window
    then makes up for it. A bump of l2 has an odd side of 3 at least.
    """
    area = share * (rows * columns)
    side = jnp.round(jnp.sqrt(area)).astype(jnp.int32)
    if norm == "l2":
        side = jnp.maximum(side, 3 if max(rows, columns) >= 5 else 1)
        side += 1 - side % 2
    side = jnp.maximum(side, 1)
    shorter = min(rows, columns)
    longer = jnp.where(
        side > shorter,
        jnp.maximum(side, jnp.round(area / shorter).astype(jnp.int32)),
        side,
    )
    along, across = (side, longer) if rows <= columns else (longer, side)
    return jnp.minimum(along, rows), jnp.minimum(across, columns)


class _State(NamedTuple):
    best: tuple[Array, Array]  # the start's best point [B, H, W, C] and its margin
    kept: tuple[Array, Array] | None  # with several starts, the best point of all and its margin


@register
class _Square(Method):
    eps: Array  # [B]
    p_init: Array  # [B]
    first: Array | None  # [B, ...], the first start; None draws it
    norm: Norm = static_field()
    num_queries: int = static_field()
    num_restarts: int = static_field()
    moves_first = True
    passes = Passes(1, 0)

    @property
    def num_events(self) -> int:  # type: ignore[override]
        return self.num_restarts * (self.num_queries + 1)

    def init(self, problem: Problem) -> tuple[_State, Array]:
        images, logits = _images(problem.inputs), problem.logits_fn(problem.inputs)
        nothing = jnp.full(self.eps.shape, -jnp.inf, images.dtype)
        if self.first is None:
            start = self._begin(problem, jnp.zeros(self.eps.shape, jnp.int32))
        else:
            start = norms.into_ball_and_box(
                self.first, problem.inputs, self.eps, self.norm, problem.bounds
            )
        kept = (images, nothing) if self.num_restarts > 1 else None
        return _State((_images(start), nothing), kept), logits

    def step(self, problem: Problem, state: _State, event: Array) -> tuple[_State, Seen]:
        """One query: propose a point, judge it, and keep it if it is better."""
        restart, number = jnp.divmod(event, self.num_queries + 1)
        candidate = self._propose(problem, restart, number, state.best[0])
        logits = problem.logits_fn(candidate.reshape(problem.inputs.shape))
        finite = metrics.predicts(logits)
        margin = jnp.where(finite, problem.goal.excess(logits), -jnp.inf)

        def better_of(pair: tuple[Array, Array]) -> tuple[Array, Array]:
            return select(margin > pair[1], (candidate, margin), pair)

        best, kept = better_of(state.best), state.kept
        seen = Seen(problem.goal.reached(logits), best[1])
        if kept is not None:
            kept = better_of(kept)
            again = self._begin(problem, restart + 1), jnp.full_like(margin, -jnp.inf)
            best = select(number == self.num_queries, again, best)
        return _State(best, kept), seen

    def point(self, problem: Problem, state: _State) -> Array:
        point, _ = state.best if state.kept is None else state.kept
        return point.reshape(problem.inputs.shape)

    def info(
        self, problem: Problem, state: _State, progress: Progress, result: AttackResult
    ) -> dict[str, Array]:
        # The last event's.
        return {"restart": jnp.maximum(progress.event - 1, 0) // (self.num_queries + 1)}

    def _uniform(self, problem: Problem, restart: Array, number: Array, count: int) -> Array:
        """The draws of each example's point number `[B]` of a restart, `[B, count]` in [0, 1)."""
        fold_in = jax.vmap(jax.random.fold_in)
        keys = fold_in(fold_in(need_key(problem, "random squares"), restart), number)
        dtype = self.eps.dtype
        return jax.vmap(lambda key: jax.random.uniform(key, (count,), dtype))(keys)

    def _begin(self, problem: Problem, restart: Array) -> Array:
        """The starting point of each example's restart `[B]`, `[B, H, W, C]`."""
        images = _images(problem.inputs)
        batch, rows, columns, channels = images.shape
        linf = self.norm == "linf"
        count = columns * channels if linf else _square_bumps.num_draws(rows, columns, channels)
        draws = self._uniform(problem, restart, jnp.zeros_like(restart), count)
        if linf:
            stripes = _sign(draws).reshape(batch, 1, columns, channels)
            delta = norms.per_example(self.eps, images) * stripes
        else:
            delta = _square_bumps.grid(draws, images.shape, self.eps)
        return jnp.clip(images + delta, *self._bounds(problem))

    def _bounds(self, problem: Problem) -> tuple[Array, ...]:
        return tuple(end if end.ndim == 0 else _images(end) for end in problem.bounds)

    def _propose(self, problem: Problem, restart: Array, number: Array, best: Array) -> Array:
        """Each example's point of this number `[B]`: the best one with a window changed."""
        images, bounds = _images(problem.inputs), self._bounds(problem)
        channels = images.shape[-1]
        # Number 0 is the start, which is the best one so far.
        changes = (number > 0)[:, None, None, None]
        if self.norm == "linf":
            draws = self._uniform(problem, restart, number, 2 + channels)
            window = self._window(images.shape, number - 1, draws[:, :2])
            signs = _sign(draws[:, 2:])[:, None, None]
            painted = jnp.clip(images + norms.per_example(self.eps, images) * signs, *bounds)
            return jnp.where(window.inside(images.shape) & changes, painted, best)
        draws = self._uniform(problem, restart, number, 5 + channels)
        into = self._window(images.shape, number - 1, draws[:, :2])
        out_of = self._window(images.shape, number - 1, draws[:, 2:4])
        delta = _square_bumps.move(
            best - images, into, out_of, draws[:, 4] < 0.5, _sign(draws[:, 5:]), self.eps
        )
        return jnp.where(changes, jnp.clip(images + delta, *bounds), best)

    def _window(self, shape: tuple[int, ...], proposal: Array, draws: Array) -> Window:
        """Each example's window for its proposal number `[B]`, from 0, placed by `draws [B, 2]`."""
        _, rows, columns, _ = shape
        halvings = jnp.sum(proposal[:, None] > jnp.array(_HALVED_AFTER)[None], axis=1)
        share = self.p_init * 0.5 ** halvings.astype(self.p_init.dtype)
        height, width = _window_size(share, rows, columns, self.norm)

        def place(draw: Array, room: Array) -> Array:
            # As in the released code the first `room` of the `room + 1` places are equally likely;
            # there the last one is never taken, and what only it covers is out of reach.
            return jnp.floor(draw * (room + _LAST_PLACE)).astype(jnp.int32)

        return Window(
            place(draws[:, 0], rows - height), place(draws[:, 1], columns - width), height, width
        )
