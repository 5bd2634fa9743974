"""Rotations and translations against SciPy, exact cases, and the laws of an attack."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from jdistill import attacks, nets
from jdistill.attacks import _spatial

B, H, W, C, K = 6, 7, 6, 2, 3
RNG = np.random.default_rng(0)
INPUTS = RNG.uniform(0, 1, (B, H, W, C)).astype(np.float32)
WEIGHTS = RNG.normal(0, 0.3, (H * W * C, K))
KEYS = jax.random.split(jax.random.key(2), B)
TRACES = []
SMALL = {"num_angles": 5, "num_shifts": 3, "max_angle": 20.0, "max_shift": 1.5}


def network(weights, inputs):
    TRACES.append(inputs.shape)
    return inputs.reshape(inputs.shape[0], -1) @ weights


def make(scale=1.0):
    return nets.callable_logits_fn(network, jnp.asarray(WEIGHTS * scale, jnp.float32))


def logits_of(x):
    return x.reshape(len(x), -1).astype(np.float64) @ WEIGHTS


LABELS = logits_of(INPUTS).argmax(1)
LABELS[-1] = logits_of(INPUTS)[-1].argmin()
TARGETS = np.argsort(logits_of(INPUTS), axis=1)[:, -2]


def numpy_transform(image, parameters, fill=0.0):
    """The same by SciPy, as an affine map from the result to its source."""
    angle = np.deg2rad(parameters[0])
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    center = (np.array(image.shape[:2]) - 1) / 2
    offset = center - matrix @ (center + parameters[1:])
    channels = [
        scipy.ndimage.affine_transform(
            image[..., c], matrix, offset, order=1, mode="grid-constant", cval=fill
        )
        for c in range(image.shape[-1])
    ]
    return np.stack(channels, axis=-1)


@pytest.mark.parametrize("fill", [0.0, 0.7])
def test_against_scipy(fill):
    for parameters in RNG.uniform(-1, 1, (8, 3)) * np.array([180, 3, 3]):
        image = INPUTS[0].astype(np.float64)
        found = _spatial._transform(
            jnp.asarray(INPUTS[0]), jnp.asarray(parameters, jnp.float32), jnp.float32(fill)
        )
        np.testing.assert_allclose(found, numpy_transform(image, parameters, fill), atol=2e-5)


def test_whole_pixels_and_right_angles_are_exact():
    square = INPUTS[:1, :6, :6]
    kwargs = {"num_angles": 1, "num_shifts": 1}
    zero = jnp.float32(0)

    def transform(*parameters):
        return np.asarray(_spatial._transform(jnp.asarray(square[0]), jnp.array(parameters), zero))

    np.testing.assert_array_equal(transform(0.0, 0.0, 0.0), square[0])
    np.testing.assert_allclose(transform(90.0, 0.0, 0.0), np.rot90(square[0]), atol=1e-5)
    moved = np.zeros_like(square[0])
    moved[2:, :-1] = square[0, :-2, 1:]  # 2 down, 1 left
    np.testing.assert_array_equal(transform(0.0, 2.0, -1.0), moved)
    with pytest.raises(ValueError, match="expected a grid of transformations"):
        attacks.spatial(make(), None, INPUTS, LABELS, **kwargs)


def test_the_grid_is_complete_and_grows():
    grid = _spatial._grid(31, 5)
    assert grid.shape == (31 * 5 * 5 - 1, 3)
    assert len(np.unique(grid, axis=0)) == len(grid)
    sizes = np.sum(grid**2, axis=1)
    assert np.all(np.diff(sizes) > -1e-8)
    assert sizes[0] == pytest.approx(1 / 15**2)
    assert sizes[-1] == pytest.approx(3)


@pytest.mark.floor
@pytest.mark.parametrize("targets", [None, TARGETS], ids=["untargeted", "targeted"])
def test_the_first_success_or_the_worst_of_the_grid(targets):
    result = attacks.spatial(make(), None, INPUTS, LABELS, targets=targets, trace=True, **SMALL)
    grid = _spatial._grid(5, 3) * np.array([20.0, 1.5, 1.5])
    outcomes = []
    for b in range(B - 1):
        images = np.stack([numpy_transform(INPUTS[b].astype(float), p) for p in grid])
        logits = logits_of(images)
        goal = LABELS[b] if targets is None else targets[b]
        others = np.where(np.arange(K) == goal, -np.inf, logits).max(1)
        excess = (others - logits[:, goal]) * (1 if targets is None else -1)
        wins = np.flatnonzero(excess > 0)
        chosen = wins[0] if len(wins) else excess.argmax()
        outcomes.append(len(wins) > 0)
        assert result.success[b] == (len(wins) > 0)
        tried = chosen + 1 if len(wins) else len(grid)
        assert result.queries[b] == 1 + tried + 1
        assert result.info["first_success"][b] == (tried if len(wins) else -1)
        trace = np.where(np.arange(len(grid)) < tried, excess, np.nan)
        np.testing.assert_allclose(result.info["trace"][b], trace, atol=1e-4)
        found = np.r_[result.info["angle"][b], result.info["shift"][b]]
        np.testing.assert_allclose(found, grid[chosen], atol=1e-5)
        np.testing.assert_allclose(result.inputs[b], images[chosen].clip(0, 1), atol=1e-5)
        change = np.abs(images[chosen] - INPUTS[b]).max()
        np.testing.assert_allclose(result.distance[b], change, atol=1e-5)
    assert any(outcomes)  # otherwise nothing above was a success
    if targets is None:
        row = (result.success[-1], result.distance[-1], result.queries[-1])
        assert row == (True, 0, 1)
        np.testing.assert_array_equal(result.inputs[-1], INPUTS[-1])
        np.testing.assert_array_equal(result.info["shift"][-1], 0)


def test_no_range_no_change():
    ranges = {"max_angle": 0.0, "max_shift": 0.0}
    result = attacks.spatial(make(), None, INPUTS, LABELS, **SMALL | ranges)
    np.testing.assert_allclose(result.inputs, INPUTS, atol=1e-6)
    assert not np.any(result.success[:-1])


def test_random_ones_are_each_examples_own():
    kwargs = {"num_draws": 6, "max_angle": 40.0, "max_shift": 2.0}
    whole = attacks.spatial(make(), KEYS, INPUTS, LABELS, **kwargs)
    assert np.all(np.abs(whole.info["angle"]) <= 40)
    assert np.all(np.abs(whole.info["shift"]) <= 2)
    assert len(np.unique(whole.info["angle"])) >= B - 1
    order = RNG.permutation(B)
    permuted = attacks.spatial(make(), KEYS[order], INPUTS[order], LABELS[order], **kwargs)
    np.testing.assert_allclose(permuted.inputs, whole.inputs[order], atol=1e-6)
    np.testing.assert_array_equal(permuted.success, whole.success[order])
    alone = attacks.spatial(make(), KEYS[:1], INPUTS[:1], LABELS[:1], **kwargs)
    np.testing.assert_allclose(alone.inputs, whole.inputs[:1], atol=1e-6)
    other = attacks.spatial(make(), jax.random.key(3), INPUTS, LABELS, **kwargs)
    assert not np.array_equal(other.info["angle"], whole.info["angle"])
    more = attacks.spatial(make(), KEYS, INPUTS, LABELS, **kwargs | {"num_draws": 60})
    assert np.sum(more.success) >= np.sum(whole.success)


def test_new_ranges_and_weights_compile_nothing_and_stack():
    models = [make(), make(-1.0)]
    results, counts = [], []
    for model, angle in zip(models, (20.0, np.linspace(5, 25, B)), strict=True):
        kwargs = SMALL | {"max_angle": angle}
        results.append(attacks.spatial(model, None, INPUTS, LABELS, **kwargs))
        counts.append(len(TRACES))
    assert counts[0] == counts[1]
    vmapped = jax.jit(jax.vmap(lambda f: attacks.spatial(f, None, INPUTS, LABELS, **SMALL).inputs))(
        nets.stack(models)
    )
    np.testing.assert_allclose(vmapped[0], results[0].inputs, atol=1e-6)


def test_not_a_number_is_no_success_and_stays_where_it_is():
    def broken(x):
        logits = network(jnp.asarray(WEIGHTS, jnp.float32), x)
        corner = x[:, 0, 0, :1]  # turned images have another value there
        hit = jnp.arange(x.shape[0])[:, None] == 1
        return jnp.where(hit & (corner != INPUTS[1, 0, 0, 0]), jnp.nan, logits)

    result = attacks.spatial(broken, None, INPUTS, LABELS, **SMALL)
    healthy = attacks.spatial(make(), None, INPUTS, LABELS, **SMALL)
    assert not result.success[1]
    np.testing.assert_array_equal(result.inputs[1], INPUTS[1])
    others = np.arange(B) != 1
    np.testing.assert_allclose(result.inputs[others], healthy.inputs[others], atol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_angle": -1.0}, r"expected max_angle >= 0, got -1\.0"),
        ({"max_shift": np.nan}, "expected max_shift >= 0, got nan"),
        ({"max_shift": np.ones(3)}, r"expected max_shift to be a scalar or of shape \[B\]"),
        ({"num_angles": 0}, "expected num_angles to be a whole number >= 1, got 0"),
        ({"num_draws": 0}, "expected num_draws to be a whole number >= 1, got 0"),
        ({"num_draws": 3}, "expected a PRNG key for random transformations, got None"),
        ({"fill": 2.0}, r"expected fill in \[0, 1\], got 2\.0"),
        ({"inputs": INPUTS[..., 0]}, r"expected images of shape \[B, H, W, C\], got .*\(6, 7, 6\)"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    inputs = kwargs.pop("inputs", INPUTS)
    with pytest.raises(ValueError, match=message):
        attacks.spatial(make(), None, inputs, LABELS, **kwargs)
