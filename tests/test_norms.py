"""Balls and boxes against NumPy and closed forms, at every scale of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from jdistill import norms

NORMS = ["linf", "l2", "l1"]
NORMS_AND_L0 = [*NORMS, "l0"]
ORDERS = {"linf": np.inf, "l2": 2, "l1": 1, "l0": 0}
B, SHAPE = 7, (4, 3)
RNG = np.random.default_rng(1)
DELTA = RNG.normal(0, 1, (B, *SHAPE)).astype(np.float32)


def numpy_norm(delta, norm):
    flat = np.asarray(delta, np.float64).reshape(len(delta), -1)
    return np.linalg.norm(flat, ORDERS[norm], axis=1)


@pytest.mark.floor
@pytest.mark.parametrize("norm", NORMS_AND_L0)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_distance_against_numpy(norm, scale):
    delta = DELTA * np.float32(scale)
    delta[1, 0] = 0
    np.testing.assert_allclose(norms.distance(delta, norm), numpy_norm(delta, norm), rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS_AND_L0)
def test_distance_of_nothing_is_zero(norm):
    np.testing.assert_array_equal(norms.distance(jnp.zeros((2, 3)), norm), [0, 0])


def numpy_project(delta, eps, norm):
    delta = np.asarray(delta, np.float64)
    if norm == "linf":
        return np.clip(delta, -eps, eps)
    if norm == "l1":  # shrink all entries by the threshold that leaves eps, found by bisection
        low, high = np.zeros_like(delta[:, :1, :1]), np.abs(delta).max((1, 2), keepdims=True)
        for _ in range(200):
            middle = (low + high) / 2
            over = np.maximum(np.abs(delta) - middle, 0).sum((1, 2), keepdims=True) > eps
            low, high = np.where(over, middle, low), np.where(over, high, middle)
        inside = np.abs(delta).sum((1, 2), keepdims=True) <= eps
        return np.where(inside, delta, np.sign(delta) * np.maximum(np.abs(delta) - high, 0))
    length = numpy_norm(delta, norm).reshape(-1, 1, 1)
    return np.where(length > eps, delta / length * eps, delta)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e37])
def test_projection_against_numpy(norm, scale):
    eps = np.linspace(0.0, 4.0, B).astype(np.float32)  # from nothing to everything
    projected = norms.project(DELTA * np.float32(scale), eps, norm)
    expected = numpy_project(DELTA * np.float32(scale), eps.reshape(-1, 1, 1), norm)
    # The reference subtracts its threshold from delta, and so keeps no digits of a tiny ball.
    if (norm, scale) != ("l1", 1e37):
        np.testing.assert_allclose(projected, expected, rtol=2e-6, atol=1e-37)
    assert np.all(norms.distance(projected, norm) <= eps * (1 + 1e-6))
    outside = numpy_norm(DELTA * np.float32(scale), norm) > eps
    np.testing.assert_allclose(numpy_norm(projected, norm)[outside], eps[outside], rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_idempotent_and_leaves_inner_points_alone(norm):
    once = norms.project(DELTA, 0.7, norm)
    np.testing.assert_allclose(norms.project(once, 0.7, norm), once, rtol=5e-7)
    np.testing.assert_array_equal(norms.project(DELTA, 100.0, norm), DELTA)
    np.testing.assert_array_equal(norms.project(DELTA, 0.0, norm), np.zeros_like(DELTA))


@pytest.mark.parametrize("norm", NORMS)
def test_projection_is_the_closest_point(norm):
    eps = 0.7
    projected = norms.project(DELTA, eps, norm)
    keys = jax.random.split(jax.random.key(0), B)
    distance = numpy_norm(projected - DELTA, "l2")
    for trial in range(20):
        other = norms.random_start(
            jax.vmap(lambda k, t=trial: jax.random.fold_in(k, t))(keys),
            jnp.asarray(DELTA),
            eps,
            norm,
        )
        assert np.all(numpy_norm(other - DELTA, "l2") >= distance - 1e-5)


@pytest.mark.floor
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e-34, 1e30, 1e37])
def test_steepest_has_unit_norm_and_reaches_the_dual_norm_at_every_scale(norm, scale):
    gradient = DELTA * np.float32(scale)
    direction = np.asarray(norms.steepest(gradient, norm), np.float64)
    np.testing.assert_allclose(numpy_norm(direction, norm), 1.0, rtol=1e-6)
    dual = {"linf": 1, "l2": 2, "l1": np.inf}[norm]
    flat = gradient.astype(np.float64).reshape(B, -1)
    np.testing.assert_allclose(
        (flat * direction.reshape(B, -1)).sum(1), np.linalg.norm(flat, dual, axis=1), rtol=1e-6
    )


@pytest.mark.parametrize("norm", NORMS)
def test_steepest_of_zero_and_of_broken_gradients(norm):
    gradient = jnp.array([[0.0, 0.0], [jnp.nan, 2.0], [-jnp.inf, -3.0], [jnp.nan, jnp.nan]])
    np.testing.assert_array_equal(norms.steepest(gradient, norm), [[0, 0], [0, 1], [0, -1], [0, 0]])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("power", [-40, 3, 60])
def test_steepest_ignores_powers_of_two_exactly(norm, power):
    np.testing.assert_array_equal(
        norms.steepest(DELTA * np.float32(2.0**power), norm), norms.steepest(DELTA, norm)
    )


def test_the_l1_projection_of_a_huge_point_keeps_the_largest_entry():
    huge = jnp.array([[1e37, -2e37, 1.9e37], [3e38, 3e38, -3e38]])
    np.testing.assert_allclose(
        norms.project(huge, 0.5, "l1"), [[0, -0.5, 0], [1 / 6, 1 / 6, -1 / 6]], rtol=1e-6
    )


def test_the_l1_projection_of_many_entries_stays_in_the_ball():
    delta = RNG.normal(0, 1, (3, 32, 32, 3)).astype(np.float32)
    for eps in (0.01, 1.0, 40.0, 2000.0):
        projected = norms.project(delta, eps, "l1")
        np.testing.assert_allclose(numpy_norm(projected, "l1"), eps, rtol=5e-6)


def test_the_l0_projection_keeps_the_largest_entries():
    delta = jnp.array([[3.0, -4.0, 0.5, 4.0]])
    for eps, expected in [
        (0, [0, 0, 0, 0]),
        (1, [0, -4, 0, 0]),  # of equal ones the first
        (2.5, [0, -4, 0, 4]),
        (3, [3, -4, 0, 4]),
        (9, [3, -4, 0.5, 4]),
    ]:
        np.testing.assert_array_equal(norms.project(delta, eps, "l0"), [expected])
    eps = np.arange(B).astype(np.float32)
    projected = np.asarray(norms.project(DELTA, eps, "l0"))
    np.testing.assert_array_equal(norms.distance(projected, "l0"), eps)
    for row, kept in zip(DELTA, projected, strict=True):
        largest = np.sort(np.abs(row).ravel())[::-1][: np.sum(kept != 0)]
        np.testing.assert_array_equal(np.sort(np.abs(kept[kept != 0]))[::-1], largest)
        np.testing.assert_array_equal(kept[kept != 0], row[kept != 0])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1.0, 1e-34, 1e37])
def test_normalized_values_have_unit_norm_and_their_direction(norm, scale):
    value = DELTA * np.float32(scale)
    value[2] = 0
    unit = norms.normalize(value, norm)
    length = np.where(np.arange(B) == 2, 1, numpy_norm(value, norm)).reshape(-1, 1, 1)
    np.testing.assert_allclose(unit, value / length, rtol=2e-6)
    broken = norms.normalize(jnp.array([[jnp.nan, -2.0], [jnp.inf, jnp.nan]]), norm)
    np.testing.assert_array_equal(broken, [[0, -1], [0, 0]])


def best_in_box(gradient, inputs, length):
    """The maximum of a linear function over a piece of the l1 ball and the unit box, by SciPy."""
    size = len(gradient)
    # d = up - down with both parts at least 0.
    answer = scipy.optimize.linprog(
        np.concatenate([-gradient, gradient]),
        A_ub=np.ones((1, 2 * size)),
        b_ub=[length],
        bounds=[*((0, 1 - x) for x in inputs), *((0, x) for x in inputs)],
    )
    return -answer.fun


@pytest.mark.parametrize("length", [0.0, 0.05, 0.7, 3.0, 50.0])
@pytest.mark.parametrize("scale", [1.0, 1e-34])
def test_an_l1_step_is_the_best_one_within_the_box(length, scale):
    inputs = RNG.uniform(0, 1, (B, 12)).astype(np.float32)
    inputs[:, ::5], inputs[:, 1::5] = 0, 1
    gradient = DELTA.reshape(B, 12).copy()
    gradient[0, 3] = gradient[1, :] = 0
    moved = norms.ascend(inputs, gradient * np.float32(scale), length, "l1", (0.0, 1.0))
    assert np.all((moved >= 0) & (moved <= 1 + 1e-7))
    change = np.asarray(moved, np.float64) - inputs
    assert np.all(numpy_norm(change, "l1") <= length * (1 + 1e-6) + 1e-6)
    np.testing.assert_array_equal(change[gradient == 0], 0)
    for row in range(B):
        best = best_in_box(gradient[row].astype(np.float64), inputs[row], length)
        np.testing.assert_allclose(gradient[row] @ change[row], best, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_far_from_the_box_is_the_steepest_direction(norm):
    length = np.linspace(0, 3, B).astype(np.float32)
    moved = norms.ascend(jnp.zeros((B, *SHAPE)), DELTA, length, norm, (-50.0, 50.0))
    expected = length.reshape(-1, 1, 1) * norms.steepest(DELTA, norm)
    np.testing.assert_allclose(moved, expected, rtol=1e-6)
    broken = jnp.array([[jnp.nan, 1.0], [0.0, 0.0], [jnp.inf, -jnp.inf]])
    moved = norms.ascend(jnp.full((3, 2), 0.5), broken, 0.25, norm, (0.0, 1.0))
    np.testing.assert_array_equal(moved, [[0.5, 0.75], [0.5, 0.5], [0.5, 0.5]])


def draws(norm, *, dimensions, number=4000, eps=0.5, seed=0):
    keys = jax.random.split(jax.random.key(seed), number)
    return np.asarray(norms.random_start(keys, jnp.zeros((number, dimensions)), eps, norm))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dimensions", [2, 5, 30])
def test_random_starts_are_uniform_in_the_ball(norm, dimensions):
    eps = 0.5
    noise = draws(norm, dimensions=dimensions, eps=eps)
    radius = numpy_norm(noise, norm) / eps
    assert radius.max() <= 1 + 1e-6
    # The share of the ball's volume within radius r is r^d, so radius^d is uniform in [0, 1]:
    # Kolmogorov-Smirnov, with a bound that a uniform sample passes but for one seed in 10^6.
    sample = np.sort(radius**dimensions)
    steps = np.arange(1, len(sample) + 1) / len(sample)
    assert np.abs(sample - steps).max() < 2.7 / np.sqrt(len(sample))
    # Directions: centered, and no coordinate is preferred.
    spread = noise.std(0)
    assert np.abs(noise.mean(0)).max() < 5 * spread.max() / np.sqrt(len(noise))
    assert spread.max() / spread.min() < 1.15


@pytest.mark.parametrize("norm", NORMS)
def test_each_example_draws_from_its_own_key(norm):
    keys = jax.random.split(jax.random.key(3), B)
    like = jnp.zeros((B, *SHAPE))
    whole = norms.random_start(keys, like, 0.5, norm)
    order = np.array([3, 1, 6])
    np.testing.assert_array_equal(
        norms.random_start(keys[order], like[order], 0.5, norm), whole[order]
    )
    assert len(np.unique(whole[:, 0, 0])) == B


@pytest.mark.parametrize("norm", NORMS)
def test_random_start_scales_with_each_radius(norm):
    keys = jax.random.split(jax.random.key(3), B)
    eps = np.linspace(0, 3, B).astype(np.float32)
    unit = norms.random_start(keys, jnp.zeros((B, *SHAPE)), 1.0, norm)
    scaled = norms.random_start(keys, jnp.zeros((B, *SHAPE)), eps, norm)
    np.testing.assert_allclose(scaled, unit * eps.reshape(-1, 1, 1), rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_into_ball_and_box_is_the_projection_of_points_inside_the_box(norm):
    center, other = RNG.uniform(0, 1, (2, B, 4)).astype(np.float32)
    result = norms.into_ball_and_box(other, center, 0.3, norm, (0.0, 1.0))
    # The closest point z, where <other - z, w - z> <= 0 for every w in ball and box.
    for _ in range(300):
        direction = RNG.normal(0, 1, (B, 4)).astype(np.float32)
        w = norms.into_ball_and_box(center + direction, center, 0.3, norm, (0.0, 1.0))
        assert np.all(np.sum((other - result) * (w - result), axis=1) <= 1e-6)


@pytest.mark.parametrize("norm", NORMS_AND_L0)
def test_into_ball_and_box_is_in_both(norm):
    center = RNG.uniform(0.01, 0.99, (B, *SHAPE)).astype(np.float32)
    eps = np.linspace(0.0, 2.0, B).astype(np.float32) * (3 if norm == "l0" else 1)
    moved = norms.into_ball_and_box(center + 2 * DELTA, center, eps, norm, (0.0, 1.0))
    assert np.all((moved >= 0) & (moved <= 1))
    assert np.all(norms.distance(moved - center, norm) <= eps * (1 + 1e-5) + 1e-7)
    inner = norms.into_ball_and_box(center, center, eps, norm, (0.0, 1.0))
    np.testing.assert_array_equal(inner, center)
    assert np.all(numpy_norm(moved - center, norm)[eps >= 1] > 0)
    if norm != "l0":
        assert np.all(numpy_norm(moved - center, norm)[1:] > 0)


def test_per_example_shapes():
    like = jnp.zeros((3, 2, 2))
    assert norms.per_example(0.5, like).shape == (3, 1, 1)
    np.testing.assert_array_equal(norms.per_example([1.0, 2.0, 3.0], like)[:, 0, 0], [1, 2, 3])


BALLS = "'linf', 'l2', 'l1', 'l0'"
DIRECTIONS = "'linf', 'l2', 'l1'"
ANY_KEYS = jax.random.split(jax.random.key(0), B)


@pytest.mark.parametrize(
    ("call", "known"),
    [
        (lambda norm: norms.distance(DELTA, norm), BALLS),
        (lambda norm: norms.project(DELTA, 1.0, norm), BALLS),
        (lambda norm: norms.into_ball_and_box(DELTA, DELTA, 1.0, norm, (0.0, 1.0)), BALLS),
        (lambda norm: norms.normalize(DELTA, norm), DIRECTIONS),
        (lambda norm: norms.steepest(DELTA, norm), DIRECTIONS),
        (lambda norm: norms.ascend(DELTA, DELTA, 1.0, norm, (0.0, 1.0)), DIRECTIONS),
        (lambda norm: norms.random_start(ANY_KEYS, jnp.asarray(DELTA), 1.0, norm), DIRECTIONS),
    ],
)
def test_an_unknown_norm_is_refused_with_the_known_ones(call, known):
    for bad in ("L2", "l0") if known is DIRECTIONS else ("L2",):
        with pytest.raises(ValueError, match=f"norm to be one of {known}, got '{bad}'"):
            call(bad)


@pytest.mark.parametrize("eps", [-1.0, np.nan, np.array([0.1] * (B - 1) + [-0.1])])
def test_a_radius_below_0_is_named(eps):
    keys = jax.random.split(jax.random.key(0), B)
    for call in (
        lambda: norms.project(DELTA, eps, "linf"),
        lambda: norms.random_start(keys, DELTA, eps, "l2"),
        lambda: norms.into_ball_and_box(DELTA, DELTA, eps, "l1", (-5.0, 5.0)),
    ):
        with pytest.raises(ValueError, match="expected eps >= 0, got"):
            call()


@pytest.mark.parametrize("norm", NORMS_AND_L0)
def test_a_projection_inside_shard_map_is_that_of_each_part(norm):
    delta = RNG.normal(0, 1, (8, 4, 3)).astype(np.float32)
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("batch",))
    rows = jax.sharding.PartitionSpec("batch")
    project = jax.shard_map(
        lambda delta: norms.project(delta, 2.0, norm), mesh=mesh, in_specs=rows, out_specs=rows
    )
    np.testing.assert_allclose(jax.jit(project)(delta), norms.project(delta, 2.0, norm), rtol=1e-6)


def test_the_l0_projection_counts_beyond_what_its_type_can():
    kept = norms.project(jnp.ones((1, 785), jnp.bfloat16), 1000.0, "l0")
    assert int(jnp.sum(kept != 0)) == 785


def test_the_distance_of_whole_numbers():
    assert norms.distance(jnp.array([[3, -4]], jnp.int8), "linf").tolist() == [4]
