"""Spatial attack: rotations and translations of images, without gradients and without a norm."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate, metrics
from jdistill._jax import register
from jdistill.attacks._core.engine import Method, Passes, Progress, Seen, run, select
from jdistill.attacks._core.problem import (
    AttackResult,
    Problem,
    need_key,
    one_per_example,
    prepare,
)
from jdistill.attacks._core.traits import facts
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn


@facts(title="Spatial", norms=("linf",), access="scores", freedom="turns and shifts the input")
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
    fill: ArrayLike | None = None,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    trace: bool = False,
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
        max_angle: degrees, at least 0; positive angles turn counterclockwise; scalar or `[B]`; may
            be traced.
        max_shift: pixels, at least 0, along each axis; scalar or `[B]`; may be traced.
        num_angles: equally spaced angles of the grid in `[-max_angle, max_angle]`, at least 1 (an
            even number leaves out 0 degrees); static.
        num_shifts: likewise for each of the two shifts; static.
        num_draws: random transformations instead of the grid, uniform in the same ranges, at
            least 1; static. None takes the grid.
        fill: what is seen beyond the image's edges, inside `bounds`; scalar; may be traced. None
            takes the low end of the box.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label.
        trace: keep the margin of every transformation tried.

    Returns:
        The result. An example that resists is returned in its worst transformation, that of the
        largest margin. `distance` is the largest change of a pixel (linf), though a turn by one
        degree may change one entirely. `info`: `angle [B]` in degrees and `shift [B, 2]` in
        pixels down and right, 0 for a clean input; `first_success`, the number of transformations
        tried; `gradients`, all 0; with `trace`, by how much each transformation passes the goal,
        `trace [B, T]` for `T` transformations. See `jdistill.attacks`.

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
    low, high = _validate.bounds(bounds, ())  # the images' edges are of all pixels alike
    fill = low if fill is None else fill
    _validate.scalar(fill=fill)
    if np.ndim(inputs) != 4:
        raise ValueError(
            f"expected images of shape [B, H, W, C], got shape {np.shape(inputs)}; only images can "
            "be turned: add the channel axis, inputs[..., None]"
        )
    given_key = None if num_draws is None else key
    problem = prepare(logits_fn, given_key, inputs, labels, targets=targets, bounds=bounds)
    _validate.within(low, high, fill=fill)
    if num_draws is None:
        grid = _grid(num_angles, num_shifts)
        table = jnp.broadcast_to(
            jnp.asarray(grid, problem.inputs.dtype), (*problem.inputs.shape[:1], *grid.shape)
        )
    else:
        _validate.count(num_draws=num_draws)
        keys = need_key(problem, "random transformations")
        draw = functools.partial(
            jax.random.uniform, shape=(num_draws, 3), dtype=problem.inputs.dtype, minval=-1.0
        )
        table = jax.vmap(draw)(keys)
    angle = one_per_example(max_angle, problem.inputs, name="max_angle")
    shift = one_per_example(max_shift, problem.inputs, name="max_shift")
    limits = jnp.stack([angle, shift, shift], axis=1)
    method = _Spatial(table=table * limits[:, None], fill=jnp.asarray(fill, problem.inputs.dtype))
    return run(method, problem, trace=trace)


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


class _State(NamedTuple):
    inputs: Array  # the worst transformation so far, the clean input before the first one
    excess: Array  # its margin
    parameters: Array  # [B, 3], its angle and shifts


@register
class _Spatial(Method):
    table: Array  # [B, T, 3], angles and shifts in the order they are tried
    fill: Array
    norm = "linf"
    moves_first = True
    passes = Passes(1, 0)

    @property
    def num_events(self) -> int:  # type: ignore[override]
        return self.table.shape[1]

    def init(self, problem: Problem) -> tuple[_State, Array]:
        nothing = jnp.full(problem.inputs.shape[:1], -jnp.inf, problem.inputs.dtype)
        state = _State(problem.inputs, nothing, jnp.zeros_like(self.table[:, 0]))
        return state, problem.logits_fn(problem.inputs)

    def step(self, problem: Problem, state: _State, event: Array) -> tuple[_State, Seen]:
        """Try each example's next transformation."""
        parameters = jnp.take_along_axis(self.table, event[:, None, None], axis=1, mode="clip")
        parameters = parameters[:, 0]
        candidate = jax.vmap(_transform, in_axes=(0, 0, None))(
            problem.inputs, parameters, self.fill
        )
        candidate = jnp.clip(candidate, *problem.bounds)
        logits = problem.logits_fn(candidate)
        finite = metrics.predicts(logits)
        excess = jnp.where(finite, problem.goal.excess(logits), -jnp.inf)
        tried = _State(candidate, excess, parameters)
        worst = select(excess > state.excess, tried, state)
        return worst, Seen(problem.goal.reached(logits), excess)

    def point(self, problem: Problem, state: _State) -> Array:
        return state.inputs

    def info(
        self, problem: Problem, state: Any, progress: Progress, result: AttackResult
    ) -> dict[str, Array]:
        return {"angle": state.parameters[:, 0], "shift": state.parameters[:, 1:]}
