"""Balls and boxes against NumPy and closed forms, at every scale of float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import norms

NORMS = ["linf", "l2"]
B, SHAPE = 7, (4, 3)
RNG = np.random.default_rng(1)
DELTA = RNG.normal(0, 1, (B, *SHAPE)).astype(np.float32)


def numpy_norm(delta, norm):
    order = {"linf": np.inf, "l2": 2}[norm]
    return np.linalg.norm(np.asarray(delta, np.float64).reshape(len(delta), -1), order, axis=1)


@pytest.mark.floor
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_distance_against_numpy(norm, scale):
    delta = DELTA * np.float32(scale)
    np.testing.assert_allclose(norms.distance(delta, norm), numpy_norm(delta, norm), rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_distance_of_nothing_is_zero(norm):
    np.testing.assert_array_equal(norms.distance(jnp.zeros((2, 3)), norm), [0, 0])


def numpy_project(delta, eps, norm):
    delta = np.asarray(delta, np.float64)
    if norm == "linf":
        return np.clip(delta, -eps, eps)
    length = numpy_norm(delta, norm).reshape(-1, 1, 1)
    return np.where(length > eps, delta / length * eps, delta)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e37])
def test_projection_against_numpy(norm, scale):
    eps = np.linspace(0.0, 4.0, B).astype(np.float32)  # from nothing to everything
    projected = norms.project(DELTA * np.float32(scale), eps, norm)
    expected = numpy_project(DELTA * np.float32(scale), eps.reshape(-1, 1, 1), norm)
    np.testing.assert_allclose(projected, expected, rtol=2e-6, atol=1e-37)
    assert np.all(norms.distance(projected, norm) <= eps * (1 + 1e-6))


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
    dual = {"linf": 1, "l2": 2}[norm]
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
def test_into_ball_and_box_is_in_both(norm):
    center = RNG.uniform(0, 1, (B, *SHAPE)).astype(np.float32)
    eps = np.linspace(0.0, 2.0, B).astype(np.float32)
    moved = norms.into_ball_and_box(center + 2 * DELTA, center, eps, norm, (0.0, 1.0))
    assert np.all((moved >= 0) & (moved <= 1))
    assert np.all(norms.distance(moved - center, norm) <= eps * (1 + 1e-5) + 1e-7)
    inner = norms.into_ball_and_box(center, center, eps, norm, (0.0, 1.0))
    np.testing.assert_array_equal(inner, center)
    assert np.all(numpy_norm(moved - center, norm)[1:] > 0)


def test_per_example_shapes():
    like = jnp.zeros((3, 2, 2))
    assert norms.per_example(0.5, like).shape == (3, 1, 1)
    np.testing.assert_array_equal(norms.per_example([1.0, 2.0, 3.0], like)[:, 0, 0], [1, 2, 3])


@pytest.mark.parametrize(
    "call",
    [
        lambda norm: norms.distance(DELTA, norm),
        lambda norm: norms.project(DELTA, 1.0, norm),
        lambda norm: norms.steepest(DELTA, norm),
        lambda norm: norms.random_start(jax.random.split(jax.random.key(0), B), DELTA, 1.0, norm),
        lambda norm: norms.into_ball_and_box(DELTA, DELTA, 1.0, norm, (0.0, 1.0)),
    ],
)
def test_an_unknown_norm_is_refused_with_the_known_ones(call):
    with pytest.raises(ValueError, match="expected norm to be one of 'linf', 'l2', got 'L2'"):
        call("L2")
