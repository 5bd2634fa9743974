"""Square Attack against a NumPy version fed with the same draws, and against exact optima."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, nets
from jdistill.attacks import _square, _square_bumps
from jdistill.attacks._square_bumps import Window
from tests import tiny

B, SHAPE, H, K = 4, (6, 5, 2), 8, 4
D = int(np.prod(SHAPE))
RNG = np.random.default_rng(3)
NET = tiny.Net(RNG.normal(0, 0.6, (D, H)), RNG.normal(0, 1, (H, K)))
INPUTS = RNG.uniform(0, 1, (B, *SHAPE)).astype(np.float32)
INPUTS[0, :2] = 0  # on the box's faces
KEYS = jax.random.split(jax.random.key(5), B)


def make(bias=0.0):
    """With a bias of class 0, which then wins everywhere."""
    return NET._replace(bias=bias * np.eye(K)[0]).logits_fn()


LABELS = NET.logits(INPUTS).argmax(1)


def margin_of(logits, label):
    return np.delete(logits, label).max() - logits[label]


# -------------------------------------------------------------------------------------------------
# Windows


@pytest.mark.parametrize(
    ("size", "norm", "sides"),
    [
        (28, "linf", [25, 18, 13, 9, 6, 4, 3, 2]),
        (32, "linf", [29, 20, 14, 10, 7, 5, 4, 3]),
        (28, "l2", [25, 19, 13, 9, 7, 5, 3, 3]),
    ],
)
def test_the_schedule_of_the_sides(size, norm, sides):
    # The last proposal of each size, and the first of the next one.
    last = np.array([10, 50, 200, 500, 1000, 2000, 4000])
    proposals = np.sort(np.r_[0, last, last + 1, 5000])
    count = len(proposals)
    method = _square._Square(
        eps=jnp.ones(count),
        p_init=jnp.full(count, 0.8),
        first=None,
        norm=norm,
        num_queries=5001,
        num_restarts=1,
    )
    draws = np.random.default_rng(0).uniform(0, 1, (count, 2)).astype(np.float32)
    draws[0], draws[1] = 0, np.nextafter(np.float32(1), np.float32(0))
    place = jax.jit(lambda method, *args: method._window((count, size, size, 1), *args))
    window = jax.tree.map(np.asarray, place(method, jnp.asarray(proposals), jnp.asarray(draws)))
    np.testing.assert_array_equal(window.height, np.repeat(sides, 2))
    np.testing.assert_array_equal(window.width, np.repeat(sides, 2))
    # Every corner of the image is in reach, the last row and column too.
    assert int(window.top[0]) == int(window.left[0]) == 0
    assert int(window.top[1] + window.height[1]) == int(window.left[1] + window.width[1]) == size
    assert np.all(window.top + window.height <= size)


@pytest.mark.parametrize(
    ("rows", "columns", "norm", "expected"),
    [
        (1, 100, "linf", [(1, 80), (1, 10), (1, 1)]),
        (100, 1, "linf", [(80, 1), (10, 1), (1, 1)]),
        (10, 40, "linf", [(10, 32), (6, 6), (2, 2)]),
        (1, 100, "l2", [(1, 80), (1, 10), (1, 3)]),
        (3, 2, "l2", [(3, 2), (1, 1), (1, 1)]),
        (4, 4, "linf", [(4, 4), (1, 1), (1, 1)]),
    ],
)
def test_windows_of_what_is_not_square(rows, columns, norm, expected):
    shares = jnp.array([0.8, 0.1, 0.01])
    height, width = _square._window_size(shares, rows, columns, norm)
    assert list(zip(height.tolist(), width.tolist(), strict=True)) == expected


def bump_by_loops(height, width):
    """The reference's: sums of centered rectangles, one pyramid a half."""

    def pyramid(rows, columns):
        total = np.zeros((rows, columns))
        for ring in range(max(rows, columns) // 2 + 1):
            for row in range(rows):
                for column in range(columns):
                    if abs(row - rows // 2) <= ring and abs(column - columns // 2) <= ring:
                        total[row, column] += 1 / (ring + 1) ** 2
        return total / max(np.linalg.norm(total), 1e-30)

    upper = height // 2
    whole = np.concatenate([pyramid(upper, width), -pyramid(height - upper, width)])
    return whole / np.linalg.norm(whole)


def test_bumps_are_those_of_loops():
    windows = np.array([(2, 1, 5, 5), (0, 0, 9, 9), (1, 3, 3, 3), (4, 2, 1, 6), (7, 8, 2, 1)])
    window = Window(*jnp.asarray(windows.T))
    bumps = jax.jit(lambda flags: _square_bumps.bump(window, flags, (5, 9, 9, 1), jnp.float32))
    for turned in (False, True):
        found = bumps(jnp.full(len(windows), turned))
        for b, (top, left, height, width) in enumerate(windows):
            expected = np.zeros((9, 9))
            shape = bump_by_loops(width, height).T if turned else bump_by_loops(height, width)
            expected[top : top + height, left : left + width] = shape
            np.testing.assert_allclose(found[b, :, :, 0], expected, atol=1e-6)


def test_a_move_between_windows_is_that_of_numpy():
    rng = np.random.default_rng(0)
    delta, eps = rng.normal(0, 1, (2, 9, 8, 3)), np.array([20.0, 5.0])
    lengths = np.sqrt(np.sum(delta**2, axis=(1, 2, 3), keepdims=True))
    delta *= np.array([12.0, 5.0]).reshape(2, 1, 1, 1) / lengths
    into, out_of = [(1, 2, 5, 3), (0, 0, 3, 3)], [(3, 0, 5, 3), (6, 5, 3, 3)]
    signs = np.where(rng.uniform(size=(2, 3)) < 0.5, -1.0, 1.0)
    found = jax.jit(_square_bumps.move)(
        jnp.asarray(delta, jnp.float32),
        *(Window(*jnp.asarray(np.array(w).T)) for w in (into, out_of)),
        jnp.array([False, True]),
        jnp.asarray(signs, jnp.float32),
        jnp.asarray(eps, jnp.float32),
    )
    for b, turned in enumerate((False, True)):
        masks = []
        for top, left, height, width in (into[b], out_of[b]):
            masks.append(np.zeros((9, 8), bool))
            masks[-1][top : top + height, left : left + width] = True
        top, left, height, width = into[b]
        shape = bump_by_loops(width, height).T if turned else bump_by_loops(height, width)
        expected = delta[b].copy()
        expected[masks[1]] = 0
        for c in range(3):
            old = delta[b, ..., c][masks[0]].reshape(height, width)
            new = shape * signs[b, c] + old / np.linalg.norm(old)
            budget = max(eps[b] ** 2 - np.sum(delta[b] ** 2), 0) / 3
            budget += np.sum(delta[b, ..., c][masks[0] | masks[1]] ** 2)
            new *= np.sqrt(budget) / np.linalg.norm(new)
            expected[..., c][masks[0]] = new.ravel()
        expected *= eps[b] / np.linalg.norm(expected)
        np.testing.assert_allclose(found[b], expected, rtol=1e-4, atol=1e-5)


def test_the_start_of_l2_is_a_grid_of_bumps():
    shape, eps = (2, 28, 28, 1), jnp.array([2.0, 3.0])
    count = _square_bumps.num_draws(*shape[1:])
    draws = jax.random.uniform(jax.random.key(0), (2, count))
    delta = np.asarray(jax.jit(lambda u: _square_bumps.grid(u, shape, eps))(draws))
    np.testing.assert_allclose(np.linalg.norm(delta.reshape(2, -1), axis=1), eps, rtol=1e-5)
    assert not delta[:, 0].any()  # 5 x 5 bumps of 5 x 5 pixels, in the middle
    assert not delta[:, -2:].any()
    signs = set()
    for top in range(1, 26, 5):
        for left in range(1, 26, 5):
            tile = delta[0, top : top + 5, left : left + 5, 0] * 5 / 2
            shapes = {
                (sign, turned): sign * (bump_by_loops(5, 5).T if turned else bump_by_loops(5, 5))
                for sign in (1, -1)
                for turned in (False, True)
            }
            fits = [k for k, v in shapes.items() if np.allclose(tile, v, atol=1e-4)]
            assert len(fits) == 1
            signs.update(fits)
    assert len(signs) == 4


# -------------------------------------------------------------------------------------------------
# The search


def reference(x, label, key, *, eps, num_queries, num_restarts, p_init):
    """Square for linf, one example: the best margins after each query, and the best point."""
    rows, columns, channels = x.shape
    margins, kept, tried = np.full((num_restarts, num_queries + 1), np.nan), (-np.inf, None), 0
    for restart in range(num_restarts):
        best = (-np.inf, None)
        for event in range(num_queries + 1):
            own = jax.random.fold_in(jax.random.fold_in(key, restart), event)
            count = columns * channels if event == 0 else 2 + channels
            draws = np.asarray(jax.random.uniform(own, (count,)))
            if event == 0:
                stripes = np.where(draws < 0.5, -eps, eps).reshape(1, columns, channels)
                candidate = (x + stripes).clip(0, 1)
            else:
                halvings = sum(event - 1 > after for after in (10, 50, 200))
                side = max(round(np.sqrt(p_init / 2**halvings * rows * columns)), 1)
                side = min(side, rows, columns)
                top = int(draws[0] * (rows - side + 0.125))  # the last place an eighth as often
                left = int(draws[1] * (columns - side + 0.125))
                signs = np.where(draws[2:] < 0.5, -2 * eps, 2 * eps)
                candidate = best[1].copy()
                candidate[top : top + side, left : left + side] += signs
                candidate = candidate.clip(x - eps, x + eps).clip(0, 1)
            margin = margin_of(NET.logits(candidate[None])[0], label)
            tried += 1
            if event == 0 or margin > best[0]:
                best = (margin, candidate)
            if best[0] > kept[0]:
                kept = best
            margins[restart, event] = best[0]
            if margin > 0:
                return margins, kept, tried, restart
    return margins, kept, -1, num_restarts - 1


@pytest.mark.floor
def test_every_query_is_that_of_numpy():
    settings = {"eps": 0.1, "num_queries": 40, "num_restarts": 2}
    result = attacks.square(make(), KEYS, INPUTS, LABELS, trace=True, p_init=0.5, **settings)
    result = jax.tree.map(np.asarray, result)
    for b in range(B):
        margins, (margin, point), tried, restart = reference(
            INPUTS[b].astype(float), LABELS[b], KEYS[b], p_init=0.5, **settings
        )
        np.testing.assert_allclose(result.info["trace"][b], margins.ravel(), atol=1e-5)
        np.testing.assert_allclose(result.inputs[b], point, atol=1e-6)
        assert result.info["first_success"][b] == tried
        assert result.info["restart"][b] == restart
        assert result.success[b] == (margin > 0)
        assert result.queries[b] == (tried if tried >= 0 else 82) + 2
    assert 0 < result.success.sum() < B


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_what_resists_is_returned_at_its_largest_margin(norm):
    model, eps = make(bias=50.0), {"linf": 0.1, "l2": 0.5}[norm]
    settings = {"eps": eps, "norm": norm, "num_queries": 40, "num_restarts": 2}
    result = attacks.square(model, KEYS, INPUTS, np.zeros(B, int), trace=True, **settings)
    assert not result.success.any()
    np.testing.assert_array_equal(result.info["first_success"], -1)
    np.testing.assert_array_equal(result.queries, 2 * 41 + 2)
    margins = np.asarray(result.info["trace"]).reshape(B, 2, 41)
    assert np.all(np.diff(margins, axis=2) >= 0)  # of each start, and never worse
    assert np.all(margins[:, :, -1] > margins[:, :, 0])
    logits = np.asarray(model(result.inputs))
    found = [margin_of(logits[b], 0) for b in range(B)]
    np.testing.assert_allclose(found, margins.max((1, 2)), atol=1e-4)
    distance = np.asarray(result.inputs - INPUTS).reshape(B, -1)
    lengths = np.abs(distance).max(1) if norm == "linf" else np.linalg.norm(distance, axis=1)
    assert np.all(lengths <= eps * (1 + 1e-5))
    assert np.all(lengths > 0.8 * eps)


def test_the_optimum_of_a_linear_network():
    # 4 x 4 pixels in the middle of the box; class 0 wins in the whole ball.
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(0, 1, (16, 2)), jnp.float32)
    inputs = rng.uniform(0.4, 0.6, (3, 4, 4, 1)).astype(np.float32)
    eps = np.array([0.05, 0.1, 0.2], np.float32)

    def logits_of(w, x):
        return x.reshape(x.shape[0], 16) @ w + jnp.array([[30.0, 0.0]])

    model = nets.callable_logits_fn(logits_of, weights)
    result = attacks.square(
        model, jax.random.key(0), inputs, np.zeros(3, int), eps=eps, num_queries=6000, trace=True
    )
    slope = np.asarray(weights[:, 1] - weights[:, 0], float)
    clean = inputs.reshape(3, 16).astype(float) @ slope - 30
    best = clean + eps * np.abs(slope).sum()
    np.testing.assert_allclose(result.info["trace"][:, -1], best, atol=2e-5)
    assert np.all(result.info["trace"][:, 0] < best - 0.1)  # the start is not it
    corner = inputs + eps[:, None, None, None] * np.sign(slope).reshape(1, 4, 4, 1)
    np.testing.assert_allclose(result.inputs, corner, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_an_injected_start_is_the_first_point(norm):
    model, eps = make(bias=50.0), {"linf": 0.1, "l2": 0.5}[norm]
    init = np.clip(INPUTS + RNG.normal(0, 0.2, INPUTS.shape), -0.5, 1.5)
    delta = init - INPUTS
    if norm == "linf":
        delta = np.clip(delta, -eps, eps)
    else:
        delta *= eps / np.sqrt(np.sum(delta**2, axis=(1, 2, 3), keepdims=True))
    start = np.clip(INPUTS + delta, 0, 1)
    expected = [margin_of(row, 0) for row in np.asarray(model(jnp.asarray(start, jnp.float32)))]
    settings = {"eps": eps, "norm": norm, "num_queries": 20, "trace": True}
    for num_restarts in (1, 2):
        result = attacks.square(
            *(model, KEYS, INPUTS, np.zeros(B, int)),
            init=init,
            num_restarts=num_restarts,
            **settings,
        )
        np.testing.assert_allclose(result.info["trace"][:, 0], expected, atol=1e-4)
        assert np.all(result.info["trace"][:, 20] > result.info["trace"][:, 0])
    # The second start is drawn, as it is without one.
    drawn = attacks.square(model, KEYS, INPUTS, np.zeros(B, int), num_restarts=2, **settings)
    np.testing.assert_allclose(result.info["trace"][:, 21:], drawn.info["trace"][:, 21:], atol=1e-4)
    assert not np.allclose(result.info["trace"][:, 0], drawn.info["trace"][:, 0], atol=1e-2)


# -------------------------------------------------------------------------------------------------
# Logits alone


def rounded(inputs):
    sums = inputs.reshape(inputs.shape[0], -1).mean(axis=1)
    return jnp.round(jnp.stack([20 - 0 * sums, 40 * sums], axis=1))


ROWS = collections.Counter()
SECRETIVE = tiny.secretive(rounded, ROWS)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize(("eps", "breaks"), [(1.0, True), (0.01, False)])
def test_only_logits_are_asked_for_and_counted(norm, eps, breaks):
    inputs = np.full((1, 5, 5, 1), 0.45, np.float32)
    eps *= 1 if norm == "linf" else 5
    ROWS.clear()
    result = attacks.square(
        SECRETIVE, jax.random.key(0), inputs, np.array([0]), eps=eps, norm=norm, num_queries=50
    )
    jax.block_until_ready(result)
    jax.effects_barrier()
    assert bool(result.success[0]) == breaks
    assert ROWS["rows"] == result.queries[0]
    assert result.queries[0] == (int(result.info["first_success"][0]) if breaks else 51) + 2


@pytest.mark.parametrize(
    ("norm", "shape"),
    [("linf", (7,)), ("linf", (2, 3, 4, 2)), ("l2", (7,)), ("l2", (4, 5)), ("l2", (2, 1, 3, 2))],
    ids=str,
)
def test_inputs_of_any_shape(norm, shape):
    size = int(np.prod(shape))

    def logits_of(x):
        first = x.reshape(x.shape[0], -1)[:, 0]
        return jnp.stack([jnp.full_like(first, 0.55), first], axis=1)

    inputs = np.full((2, *shape), 0.5, np.float32)
    eps = 0.1 if norm == "linf" else 0.1 * size**0.5
    result = attacks.square(
        logits_of, KEYS[:2], inputs, np.zeros(2, int), eps=eps, norm=norm, num_queries=300
    )
    assert result.inputs.shape == inputs.shape
    assert result.success.all()


def test_broken_logits_are_no_success_and_the_search_goes_on():
    # Broken wherever the first pixel is brighter than before, as in half of all starts.
    def logits_of(x):
        first, mean = x[:, 0, 0, :1], x.reshape(x.shape[0], -1).mean(axis=1, keepdims=True)
        good = jnp.concatenate([0 * mean + 0.52, mean], axis=1)
        return jnp.where(first > 0.5, jnp.nan, good)

    inputs = np.full((8, 4, 4, 1), 0.5, np.float32)
    result = attacks.square(
        logits_of, jax.random.key(0), inputs, np.zeros(8, int), eps=0.1, num_queries=80, trace=True
    )
    start = np.asarray(result.info["trace"])[:, 0]
    assert 0 < np.isneginf(start).sum() < 8
    assert result.success.all()
    assert np.all(result.inputs[:, 0, 0, 0] <= 0.5)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"norm": "l1"}, "expected norm to be one of 'linf', 'l2', got 'l1'"),
        ({"p_init": 1.5}, r"expected p_init in \[0, 1\], got 1\.5"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        attacks.square(make(), KEYS, INPUTS, LABELS, eps=0.1, **kwargs)
