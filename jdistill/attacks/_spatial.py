"""Rotations and translations of images: an attack without gradients and without a norm."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate, norms
from jdistill._precision import full_precision
from jdistill.attacks._core import problem as _base
from jdistill.attacks._core.problem import AttackResult, Problem
from jdistill.attacks._loop import until_done
from jdistill.typing import Array, ArrayLike, LogitsFn


def spatial(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    max_angle: ArrayLike = 30.0,
    max_shift: ArrayLike = 3.0,
    num_angles: int = 31,
    num_shifts: int = 5,
    num_draws: int | None = None,
    fill: ArrayLike = 0.0,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
) -> AttackResult:
    """Rotation and translation: the first on a grid, or among random ones, that succeeds.

    The image is turned around its center and then shifted, with bilinear interpolation. The grid
    has `num_angles · num_shifts²` transformations and is tried from the smallest to the largest,
    each in units of its maximum, so what is found is a mild one. No gradient is used: nothing
    about the network can mask this attack.

    Args:
        logits_fn: inputs `[B, H, W, C]` to logits `[B, K]`.
        key: for `num_draws`: one key, or `[B]` keys; else unused.
        inputs: `[B, H, W, C]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        max_angle: degrees, at least 0; positive angles turn counterclockwise; a scalar or `[B]`;
            may be traced.
        max_shift: pixels, at least 0, along each axis; a scalar or `[B]`; may be traced.
        num_angles: equally spaced angles of the grid in `[-max_angle, max_angle]`, at least 1 (an
            even number leaves out 0 degrees); static.
        num_shifts: likewise for each of the two shifts; static.
        num_draws: random transformations instead of the grid, uniform in the same ranges, at
            least 1; static. None takes the grid.
        fill: what is seen beyond the image's edges, inside `bounds`; a scalar; may be traced.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label.

    Returns:
        The result. An example that resists is returned in its worst transformation, that of the
        largest margin. `distance` is the largest change of a pixel (linf), though a turn by one
        degree may change one entirely. `info`: `angle [B]` in degrees and `shift [B, 2]` in
        pixels down and right, 0 for a clean input.

    Raises:
        ValueError: inputs that are not images `[B, H, W, C]`, max_angle or max_shift below 0,
            counts below 1, a grid without a transformation, no key for `num_draws`; else as every
            attack.

    Example:
        >>> logits_fn = lambda x: jnp.stack([x[:, 1, 1, 0], x[:, 1, 2, 0]], axis=1)
        >>> x = jnp.zeros((1, 3, 3, 1)).at[0, 1, 1, 0].set(1.0)  # a bright center
        >>> result = spatial(logits_fn, None, x, jnp.array([0]), max_shift=1.0, num_angles=1)
        >>> bool(result.success[0]), result.info["shift"].tolist()
        (True, [[0.0, 1.0]])

    References:
        Engstrom, Tran, Tsipras, Schmidt & Madry 2019, "Exploring the Landscape of Spatial
        Robustness", section 3 (grid of 31 · 5 · 5; worst of k). There the worst of the grid is
        that of the largest loss; here the first success ends the search.
    """
    _validate.non_negative(max_angle=max_angle, max_shift=max_shift)
    _validate.count(num_angles=num_angles, num_shifts=num_shifts)
    _validate.rank(0, fill=fill)
    if np.ndim(inputs) != 4:
        raise ValueError(
            f"expected images of shape [B, H, W, C], got shape {np.shape(inputs)}; only images can "
            "be turned: add the channel axis, inputs[..., None]"
        )
    given_key = None if num_draws is None else key
    problem = _base.prepare(logits_fn, given_key, inputs, labels, targets=targets, bounds=bounds)
    _validate.within(*_validate.bounds(bounds), fill=fill)
    if num_draws is None:
        grid = _grid(num_angles, num_shifts)
        table = jnp.broadcast_to(
            jnp.asarray(grid, problem.inputs.dtype), (*problem.inputs.shape[:1], *grid.shape)
        )
    else:
        _validate.count(num_draws=num_draws)
        keys = _base.need_key(problem, "random transformations")
        draw = functools.partial(
            jax.random.uniform, shape=(num_draws, 3), dtype=problem.inputs.dtype, minval=-1.0
        )
        table = jax.vmap(draw)(keys)
    angle = _base.one_per_example(max_angle, problem.inputs, name="max_angle")
    shift = _base.one_per_example(max_shift, problem.inputs, name="max_shift")
    limits = jnp.stack([angle, shift, shift], axis=1)
    with full_precision():
        return _spatial(problem, table * limits[:, None], jnp.asarray(fill, problem.inputs.dtype))


def _grid(num_angles: int, num_shifts: int) -> np.ndarray:
    """Angle and shifts in units of their maxima, `[T, 3]`, small ones first, without the zero."""
    angles, shifts = [
        np.linspace(-1.0, 1.0, count) if count > 1 else np.zeros(1)
        for count in (num_angles, num_shifts)
    ]
    grid = np.stack(np.meshgrid(angles, shifts, shifts, indexing="ij"), axis=-1).reshape(-1, 3)
    # Of equal size, positive ones first; rounded, so that equal sizes are.
    sizes = np.round(np.sum(np.square(grid), axis=1), 9)
    grid = grid[np.lexsort((*-grid.T[::-1], sizes))]
    grid = grid[np.any(grid != 0, axis=1)]
    if len(grid) == 0:
        raise ValueError(
            "expected a grid of transformations, got num_angles=1 and num_shifts=1; pass 2 or more "
            "of one of them"
        )
    return grid


class _Carry(NamedTuple):
    """The state of each example; every leaf leads with `[B]`."""

    step: Array
    done: Array
    best: Array
    best_excess: Array
    best_parameters: Array  # [B, 3], angle and shifts
    queries: Array


def _transform(image: Array, parameters: Array, fill: Array) -> Array:
    """One image `[H, W, C]` turned by an angle in degrees and moved by pixels down and right."""
    angle, *shifts = jnp.split(parameters, 3)
    cosine, sine = jnp.cos(jnp.deg2rad(angle)), jnp.sin(jnp.deg2rad(angle))
    centers = [(size - 1) / 2 for size in image.shape[:2]]
    grid = jnp.meshgrid(*[jnp.arange(size) for size in image.shape[:2]], indexing="ij")
    # Where each pixel of the result comes from.
    down, right = [
        axis.astype(image.dtype) - center - shift[:, None]
        for axis, center, shift in zip(grid, centers, shifts, strict=True)
    ]
    cosine, sine = cosine[:, None], sine[:, None]
    source = [
        cosine * down + sine * right + centers[0],
        cosine * right - sine * down + centers[1],
    ]
    sample = functools.partial(
        jax.scipy.ndimage.map_coordinates, coordinates=source, order=1, mode="constant"
    )
    # Beyond the edges there is 0, so the fill is the zero of what is sampled.
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image - fill) + fill


def _step(problem: Problem, table: Array, fill: Array, carry: _Carry) -> _Carry:
    """Try each example's next transformation."""
    active = ~carry.done
    parameters = jnp.take_along_axis(table, carry.step[:, None, None], axis=1)[:, 0]
    candidate = jax.vmap(_transform, in_axes=(0, 0, None))(problem.inputs, parameters, fill)
    candidate = jnp.clip(candidate, *problem.bounds)
    logits = problem.logits_fn(candidate)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    excess = jnp.where(finite, problem.goal.excess(logits), -jnp.inf)
    better = active & (excess > carry.best_excess)
    step = carry.step + active
    return _Carry(
        step=jnp.minimum(step, table.shape[1] - 1),
        done=carry.done | problem.goal.reached(logits) | (step == table.shape[1]),
        best=jnp.where(norms.per_example(better, candidate) > 0, candidate, carry.best),
        best_excess=jnp.where(better, excess, carry.best_excess),
        best_parameters=jnp.where(better[:, None], parameters, carry.best_parameters),
        queries=carry.queries + active,
    )


@jax.jit
def _spatial(problem: Problem, table: Array, fill: Array) -> AttackResult:
    clean_success = problem.goal.reached_clean(problem.logits_fn(problem.inputs))
    zeros = jnp.zeros(clean_success.shape, jnp.int32)
    carry = until_done(
        lambda problem, table, carry: _step(problem, table, fill, carry),
        (problem, table),
        _Carry(
            step=zeros,
            done=clean_success,
            best=problem.inputs,
            best_excess=jnp.full(zeros.shape, -jnp.inf, problem.inputs.dtype),
            best_parameters=jnp.zeros_like(table[:, 0]),
            queries=zeros + 1,  # the clean forward pass
        ),
        at_most=table.shape[1],
        spread=problem.spread,
    )
    return _base.finish(
        problem,
        carry.best,
        clean_success=clean_success,
        found=jnp.ones(clean_success.shape, bool),
        queries=carry.queries,
        norm="linf",
        info={"angle": carry.best_parameters[:, 0], "shift": carry.best_parameters[:, 1:]},
        minimum_norm=False,
    )
