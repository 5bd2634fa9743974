"""Square Attack: random search by squares, without gradients."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, norms
from jdistill._precision import full_precision
from jdistill.attacks import _square_bumps
from jdistill.attacks._core import problem as _base
from jdistill.attacks._core.constant_search import select
from jdistill.attacks._core.problem import AttackResult, Problem
from jdistill.attacks._loop import until_done
from jdistill.attacks._square_bumps import Window
from jdistill.typing import Array, ArrayLike, LogitsFn

_NORMS = ("linf", "l2")
# After so many proposals of a start the share of the image that a window covers is halved.
_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
# How often a window touches the last row, or column, where 1 is how often it touches any other.
# The border of an image matters least, and an equal share of the queries is lost there.
_LAST_PLACE = 0.125


def square(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: str = "linf",
    num_queries: int = 5000,
    num_restarts: int = 1,
    p_init: ArrayLike = 0.8,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
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
        num_queries: proposals a start, at least 1; static. The start is one query more, and so
            are the clean input and the verification.
        num_restarts: starts, at least 1; static. Only survivors take the next one.
        p_init: share of the image that the first windows cover, in `[0, 1]`; scalar or `[B]`; may
            be traced.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label.
        trace: keep the margin after every query.

    Returns:
        The result. An example that resists is returned at its largest margin. `info`:
        `first_success [B]` int32, the number of points tried when it succeeded (1: the first
        start; 0: misclassified to begin with), -1 if never; `restart [B]` int32, the start it
        ended in; with `trace`, `margin [B, num_restarts, num_queries + 1]`, the largest so far in
        that start, NaN where the example had stopped.

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
        that is rescaled to `num_queries`, as in AutoAttack (Croce & Hein 2020).
    """
    _validate.one_of(_NORMS, norm=norm)
    _validate.count(num_queries=num_queries, num_restarts=num_restarts)
    _validate.within(0.0, 1.0, p_init=p_init)
    problem = _base.prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds)
    _base.need_key(problem, "random squares")
    search = _Search(
        problem,
        _base.radius(eps, problem.inputs),
        _base.one_per_example(p_init, problem.inputs, name="p_init"),
    )
    with full_precision():
        return _square(search, _Settings(norm, num_queries, num_restarts, trace))


class _Search(NamedTuple):
    """The checked arguments of one call."""

    problem: Problem
    eps: Array  # [B]
    p_init: Array  # [B]

    @property
    def images(self) -> Array:
        """The inputs as images `[B, H, W, C]`."""
        inputs = self.problem.inputs
        return inputs.reshape(inputs.shape[0], *_image_shape(inputs.shape[1:]))


class _Settings(NamedTuple):
    """What is static."""

    norm: str
    num_queries: int
    num_restarts: int
    trace: bool


class _Carry(NamedTuple):
    """The state of each example; every leaf leads with `[B]`.

    Attributes:
        candidate: `[B, H, W, C]`, the point to be tried.
        event: points tried since the start.
        best: the start's best point, and its margin.
        kept: with more starts than one, the best point of all, and its margin.
    """

    candidate: Array
    event: Array
    restart: Array
    done: Array
    best: tuple[Array, Array]
    kept: tuple[Array, Array] | None
    first_success: Array
    queries: Array
    margins: Array  # [B, num_restarts, num_queries + 1], or [B, 0, 0] without a trace


def _image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Rows, columns and channels of one input, whatever its axes are."""
    if len(shape) == 1:
        return 1, shape[0], 1
    if len(shape) == 2:
        return *shape, 1
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def _uniform(search: _Search, restart: Array, event: Array, count: int) -> Array:
    """The draws of an example's point number `event`, `[B, count]` in [0, 1)."""
    fold_in = jax.vmap(jax.random.fold_in)
    keys = fold_in(fold_in(_base.need_key(search.problem, "random squares"), restart), event)
    dtype = search.eps.dtype
    return jax.vmap(lambda key: jax.random.uniform(key, (count,), dtype))(keys)


def _sign(draws: Array) -> Array:
    return jnp.where(draws < 0.5, -1.0, 1.0).astype(draws.dtype)


def _window_size(share: Array, rows: int, columns: int, norm: str) -> tuple[Array, Array]:
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


def _window(search: _Search, norm: str, proposal: Array, draws: Array) -> Window:
    """Each example's window for its proposal number `[B]`, from 0, placed by `draws [B, 2]`."""
    _, rows, columns, _ = search.images.shape
    halvings = jnp.sum(proposal[:, None] > jnp.array(_HALVED_AFTER)[None], axis=1)
    share = search.p_init * 0.5 ** halvings.astype(search.p_init.dtype)
    height, width = _window_size(share, rows, columns, norm)

    def place(draw: Array, room: Array) -> Array:
        # As in the released code the first `room` of the `room + 1` places are equally likely;
        # there the last one is never taken, and what only it covers is out of reach.
        return jnp.floor(draw * (room + _LAST_PLACE)).astype(jnp.int32)

    return Window(
        place(draws[:, 0], rows - height), place(draws[:, 1], columns - width), height, width
    )


def _begin(search: _Search, settings: _Settings, restart: Array) -> Array:
    """The starting point of each example's restart `[B]`, `[B, H, W, C]`."""
    images = search.images
    batch, rows, columns, channels = images.shape
    if settings.norm == "linf":
        draws = _uniform(search, restart, jnp.zeros_like(restart), columns * channels)
        stripes = _sign(draws).reshape(batch, 1, columns, channels)
        delta = norms.per_example(search.eps, images) * stripes
    else:
        count = _square_bumps.num_draws(rows, columns, channels)
        draws = _uniform(search, restart, jnp.zeros_like(restart), count)
        delta = _square_bumps.grid(draws, images.shape, search.eps)
    return jnp.clip(images + delta, *search.problem.bounds)


def _propose(
    search: _Search, settings: _Settings, restart: Array, event: Array, best: Array
) -> Array:
    """Each example's point number `event >= 1`: its best one with a window changed."""
    images, bounds, norm = search.images, search.problem.bounds, settings.norm
    channels = images.shape[-1]
    if norm == "linf":
        draws = _uniform(search, restart, event, 2 + channels)
        window = _window(search, norm, event - 1, draws[:, :2])
        signs = _sign(draws[:, 2:])[:, None, None]
        painted = jnp.clip(images + norms.per_example(search.eps, images) * signs, *bounds)
        return jnp.where(window.inside(images.shape), painted, best)
    draws = _uniform(search, restart, event, 5 + channels)
    into = _window(search, norm, event - 1, draws[:, :2])
    out_of = _window(search, norm, event - 1, draws[:, 2:4])
    delta = _square_bumps.move(
        best - images, into, out_of, draws[:, 4] < 0.5, _sign(draws[:, 5:]), search.eps
    )
    return jnp.clip(images + delta, *bounds)


def _init(search: _Search, settings: _Settings, clean_success: Array) -> _Carry:
    images = search.images
    zeros = jnp.zeros(search.eps.shape, jnp.int32)
    nothing = (images, jnp.full_like(search.eps, -jnp.inf))
    shape = (settings.num_restarts, settings.num_queries + 1) if settings.trace else (0, 0)
    return _Carry(
        candidate=_begin(search, settings, zeros),
        event=zeros,
        restart=zeros,
        done=clean_success,
        best=nothing,
        kept=nothing if settings.num_restarts > 1 else None,
        first_success=jnp.where(clean_success, 0, -1),
        queries=zeros + 1,  # the clean forward pass
        margins=jnp.full(zeros.shape + shape, jnp.nan, images.dtype),
    )


def _step(search: _Search, settings: _Settings, carry: _Carry) -> _Carry:
    """One query: judge each candidate, keep it if it is better, and make the next one."""
    problem, active = search.problem, ~carry.done
    logits = problem.logits_fn(carry.candidate.reshape(problem.inputs.shape))
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    margin = jnp.where(finite, problem.goal.excess(logits), -jnp.inf)
    success = active & problem.goal.reached(logits)

    def better_of(pair: tuple[Array, Array], better: Array) -> tuple[Array, Array]:
        return select(better, (carry.candidate, margin), pair)

    # A start is kept whatever it is worth, since the proposals change it and not the input.
    best = better_of(carry.best, active & ((carry.event == 0) | (margin > carry.best[1])))
    kept = carry.kept
    if kept is not None:
        kept = better_of(kept, active & (margin > kept[1]))

    spent = active & ~success & (carry.event == settings.num_queries)
    over = spent & (carry.restart == settings.num_restarts - 1)
    again = spent & ~over
    queries = carry.queries + active
    restart = carry.restart + again
    event = jnp.where(again, 0, carry.event + (active & ~success & ~over))
    candidate = _propose(search, settings, restart, event, best[0])
    if settings.num_restarts > 1:
        candidate = select(again, _begin(search, settings, restart), candidate)
    return _Carry(
        candidate=candidate,
        event=event,
        restart=restart,
        done=carry.done | success | over,
        best=best,
        kept=kept,
        # All queries but that of the clean input.
        first_success=jnp.where(success, queries - 1, carry.first_success),
        queries=queries,
        margins=_base.record(carry.margins, active, best[1], carry.restart, carry.event),
    )


@functools.partial(jax.jit, static_argnames="settings")
def _square(search: _Search, settings: _Settings) -> AttackResult:
    problem = search.problem
    clean_success = problem.goal.reached_clean(problem.logits_fn(problem.inputs))
    carry = until_done(
        lambda search, carry: _step(search, settings, carry),
        (search,),
        _init(search, settings, clean_success),
        at_most=settings.num_restarts * settings.num_queries,
        spread=search.problem.spread,
    )
    point, _ = carry.best if carry.kept is None else carry.kept
    info = {"first_success": carry.first_success, "restart": carry.restart}
    if settings.trace:
        info["margin"] = carry.margins
    return _base.finish(
        problem,
        point.reshape(problem.inputs.shape),
        clean_success=clean_success,
        found=jnp.ones(search.eps.shape, bool),
        queries=carry.queries,
        norm=settings.norm,
        info=info,
        minimum_norm=False,
    )
