"""SPSA and NES: estimates against true gradients, exact optima, and logits alone."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, nets, norms
from jdistill.attacks import _estimated
from jdistill.attacks._core import problem as _base
from tests import tiny

B, SHAPE, D = 3, (3, 4), 12
RNG = np.random.default_rng(4)
WEIGHTS = RNG.normal(0, 1, (D, 2)).astype(np.float32)
SLOPE = (WEIGHTS[:, 1] - WEIGHTS[:, 0]).astype(float)  # of the margin of class 0
INPUTS = RNG.uniform(0.4, 0.6, (B, *SHAPE)).astype(np.float32)
LABELS = np.zeros(B, int)
KEYS = jax.random.split(jax.random.key(9), B)
METHODS = {"spsa": attacks.spsa, "nes": attacks.nes}
REACH = {"spsa": {"delta": 0.01}, "nes": {"sigma": 0.01}}

both = pytest.mark.parametrize("name", METHODS)


def network(weights, inputs):
    matrix, bias = weights
    return inputs.reshape(inputs.shape[0], -1) @ matrix + bias[None]


def make():
    """A linear network in which class 0 leads by 20 in the middle of the box."""
    bias = np.array([20.0, SLOPE.sum() * -0.5], np.float32)
    return nets.callable_logits_fn(network, (jnp.asarray(WEIGHTS), jnp.asarray(bias)))


def estimate(name, num_samples, num_parallel, inputs, reach):
    problem = _base.prepare(make(), KEYS, inputs, LABELS, targets=None, bounds=(0.0, 1.0))
    decay = {"spsa": None, "nes": jnp.zeros(B)}[name]
    method = _estimated._ascent(
        problem, 0.1, "linf", 1, num_samples, reach, None, num_parallel, None, decay
    )
    step = jnp.zeros(B, jnp.int32)
    return jax.jit(lambda method: method.estimate(problem, problem.inputs, step))(method)


@both
def test_the_estimate_converges_to_the_gradient(name):
    inputs = INPUTS.copy()
    inputs[0].flat[:6] = [0, 1, 0, 1, 0.004, 0.996]  # on and near the faces of the box
    reach = jnp.full(B, 0.01)
    errors = []
    for num_samples in (256, 4096):
        found = estimate(name, num_samples, 256, inputs, reach)
        # Two ends, so many samples, and a direction of variance 1.
        found = np.asarray(found).reshape(B, D) / (2 * 0.01 * num_samples)
        errors.append(np.linalg.norm(found - SLOPE, axis=1) / np.linalg.norm(SLOPE))
    # The error is that of a mean of random directions.
    assert np.all(errors[1] < 2.5 * np.sqrt(D / 4096))
    assert errors[1].mean() < 0.5 * errors[0].mean()


def test_the_number_in_parallel_changes_nothing():
    reach = jnp.array([0.01, 0.02, 0.005])
    # All at once; whole groups and a rest; one by one.
    found = [estimate("nes", 10, n, INPUTS, reach) for n in (10, 4, 1)]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-4, atol=1e-6)
    assert np.all(np.asarray(found) != 0)


@both
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_optimum_of_a_linear_network(name, norm):
    eps = np.array([0.05, 0.1, 0.2], np.float32)
    settings = {"eps": eps, "norm": norm, "num_steps": 60, "num_samples": 48} | REACH[name]
    attack = METHODS[name]
    result = attack(make(), KEYS, INPUTS, LABELS, trace=True, **settings)
    assert not result.success.any()
    np.testing.assert_array_equal(result.queries, 60 * (2 * 48 + 1) + 2)
    np.testing.assert_array_equal(result.info["first_success"], -1)
    delta = np.asarray(result.inputs - INPUTS, float).reshape(B, D)
    gain = delta @ SLOPE
    best = eps * np.linalg.norm(SLOPE, {"linf": 1, "l2": 2}[norm])
    assert np.all(gain <= best * (1 + 1e-4))
    assert np.all(gain >= 0.98 * best)
    # The iterate of the largest margin is the one that is returned.
    logits = np.asarray(make()(result.inputs))
    margins = np.asarray(result.info["trace"])
    np.testing.assert_allclose(margins.max(1), logits[:, 1] - logits[:, 0], atol=1e-4)
    assert margins.shape == (B, 60)


def rounded(inputs):
    sums = inputs.reshape(inputs.shape[0], -1).mean(axis=1)
    return jnp.round(200 * jnp.stack([0.5 + 0 * sums, sums], axis=1))


ROWS = collections.Counter()
SECRETIVE = tiny.secretive(rounded, ROWS)


@both
@pytest.mark.parametrize(("eps", "breaks"), [(0.2, True), (0.02, False)])
def test_only_logits_are_asked_for_and_counted(name, eps, breaks):
    inputs = np.full((1, *SHAPE), 0.45, np.float32)
    settings = {"num_steps": 30, "num_samples": 10, "num_parallel": 4}
    settings |= {"delta": 0.05} if name == "spsa" else {"sigma": 0.05}
    ROWS.clear()
    result = METHODS[name](SECRETIVE, KEYS[:1], inputs, np.array([0]), eps=eps, **settings)
    jax.block_until_ready(result)
    jax.effects_barrier()
    assert bool(result.success[0]) == breaks
    assert ROWS["rows"] == result.queries[0]
    steps = int(result.info["first_success"][0]) if breaks else 30
    assert result.queries[0] == steps * (2 * 10 + 1) + 2


@both
def test_broken_logits_are_no_guide_and_no_success(name):
    # They break on the way of the first feature, which says nothing of where class 1 is.
    def logits_of(x):
        flat = x.reshape(x.shape[0], -1)
        good = jnp.stack([jnp.full_like(flat[:, 0], 0.52), flat[:, 1:].mean(axis=1)], axis=1)
        return jnp.where(flat[:, :1] > 0.515, jnp.nan, good)

    inputs = np.full((8, *SHAPE), 0.5, np.float32)
    settings = {"eps": 0.1, "num_steps": 30, "num_samples": 8, "trace": True} | REACH[name]
    result = METHODS[name](logits_of, jax.random.key(0), inputs, np.zeros(8, int), **settings)
    flat = np.asarray(result.inputs).reshape(8, D)
    assert np.all(flat[:, 0] <= 0.515)
    np.testing.assert_array_equal(result.success, flat[:, 1:].mean(axis=1) > 0.52)
    # Where one end of every direction is broken, nothing leads on; elsewhere it does.
    assert result.success.sum() >= 4
    assert np.isneginf(result.info["trace"]).any()


def test_the_decay_is_that_of_the_accumulated_direction():
    def two_steps(decay):
        # The first one along the first direction; the second along what both add up to.
        settings = {"eps": 1.0, "norm": "l2", "num_samples": 4, "sigma": 0.01, "step_size": 0.1}
        ends = []
        for num_steps in (1, 2):
            result = attacks.nes(
                make(), KEYS, INPUTS, LABELS, num_steps=num_steps, decay=decay, **settings
            )
            ends.append(np.asarray(result.inputs, float))
        return (ends[0] - INPUTS) / 0.1, (ends[1] - ends[0]) / 0.1

    first, second = two_steps(0.0)
    for decay in (0.5, np.array([0.9, 1.0, 2.0])):
        start, turned = two_steps(decay)
        np.testing.assert_allclose(start, first, atol=1e-4)
        expected = np.reshape(decay * np.ones(B), (B, 1, 1)) * first + second
        expected /= np.linalg.norm(expected.reshape(B, -1), axis=1).reshape(B, 1, 1)
        np.testing.assert_allclose(turned, expected, atol=1e-4)


@both
def test_an_injected_start_is_where_it_begins(name):
    # Without a step only the projection is left, and it is judged.
    init = np.where(np.arange(D).reshape(SHAPE) % 2, 0.95, -0.5) * np.ones((B, 1, 1))
    settings = {"num_steps": 1, "num_samples": 2, "step_size": 0.0, "init": init} | REACH[name]
    result = METHODS[name](make(), KEYS, INPUTS, LABELS, eps=0.5, trace=True, **settings)
    expected = np.clip(np.clip(init, INPUTS - 0.5, INPUTS + 0.5), 0, 1)
    np.testing.assert_allclose(result.inputs, expected, atol=1e-6)
    logits = np.asarray(make()(result.inputs))
    np.testing.assert_allclose(result.info["trace"][:, 0], logits[:, 1] - logits[:, 0], atol=1e-5)


def test_everything_is_asked_for_inside_the_box():
    seen = []

    def logits_of(x):
        jax.debug.callback(lambda low, high: seen.append((float(low), float(high))), *ends(x))
        return x.reshape(x.shape[0], -1)[:, :2] + jnp.array([[9.0, 0.0]])

    def ends(x):
        return x.min(), x.max()

    inputs = RNG.integers(0, 2, (B, *SHAPE)).astype(np.float32)
    settings = {"eps": 0.1, "num_steps": 3, "num_samples": 4, "sigma": 0.01}
    result = attacks.nes(logits_of, KEYS, inputs, LABELS, **settings)
    jax.block_until_ready(result)
    jax.effects_barrier()
    assert len(seen) >= 8
    assert min(low for low, _ in seen) >= 0
    assert max(high for _, high in seen) <= 1
    assert np.all(norms.distance(result.inputs - inputs, "linf") > 0)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("spsa", {"norm": "l1"}, "expected norm to be one of 'linf', 'l2', got 'l1'"),
        ("spsa", {"delta": 0.0}, r"expected delta > 0, got 0\.0"),
        ("nes", {"sigma": -1.0}, r"expected sigma > 0, got -1\.0"),
    ],
)
def test_bad_settings_are_named(name, kwargs, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name](make(), KEYS, INPUTS, LABELS, eps=0.1, **kwargs)
