"""Measures against closed forms, finite differences and arithmetic of a wider range."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill import losses, metrics, nets

B, SHAPE, D, H, K = 5, (3, 2), 6, 8, 4


def network(weights, inputs):
    """A small smooth network on inputs `[B, 3, 2]`."""
    first, second, scale = weights
    return scale * jnp.tanh(inputs.reshape(inputs.shape[0], -1) @ first) @ second


def make(scale=1.0, seed=0):
    rng = np.random.default_rng(seed)
    first = rng.normal(0, 1, (D, H)).astype(np.float32)
    second = rng.normal(0, 1, (H, K)).astype(np.float32)
    weights = (jnp.asarray(first), jnp.asarray(second), jnp.float32(scale))
    inputs = rng.uniform(0, 1, (B, *SHAPE)).astype(np.float32)
    return nets.callable_logits_fn(network, weights), weights, inputs


def numpy_network(weights, inputs):
    """Logits `[B, K]` and Jacobian `[B, K, D]` in float64."""
    first, second, scale = (np.asarray(w, np.float64) for w in weights)
    hidden = np.tanh(inputs.reshape(B, -1).astype(np.float64) @ first)
    jacobian = np.einsum("hk,bh,dh->bkd", second, 1 - hidden**2, first)
    return scale * hidden @ second, scale * jacobian


# -------------------------------------------------------------------------------------------------
# Shares and accuracy


@pytest.mark.floor
@pytest.mark.parametrize(("successes", "total"), [(0, 10), (10, 10), (1, 3), (990, 1000), (1, 1)])
@pytest.mark.parametrize(("confidence", "z"), [(0.95, 1.959963984540054), (0.99, 2.5758293035489)])
def test_proportion_is_wilsons_closed_form(successes, total, confidence, z):
    share = successes / total
    middle = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    half = z / (1 + z**2 / total) * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    interval = metrics.proportion(successes, total, confidence=confidence)
    np.testing.assert_allclose(interval, (share, middle - half, middle + half), atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(-5, 20), st.integers(-5, 15))
def test_proportion_refuses_counts_that_do_not_fit(successes, total):
    if 0 <= successes <= total and total >= 1:
        value, low, high = metrics.proportion(successes, total)
        assert 0 <= low <= value <= high <= 1
        assert high - low > 0.01
    else:
        with pytest.raises(ValueError, match=f"got {successes} of {total}; pass counts"):
            metrics.proportion(successes, total)


def test_proportion_refuses_a_bad_confidence():
    for confidence in (0.0, 1.0, 95, math.nan):
        with pytest.raises(ValueError, match="confidence"):
            metrics.proportion(1, 2, confidence=confidence)


def test_correct_against_argmax_and_refuses_broken_logits():
    logits = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    labels = np.arange(50) % 3
    np.testing.assert_array_equal(metrics.correct(logits, labels), logits.argmax(1) == labels)
    for bad in (np.nan, np.inf):
        for position in range(3):
            broken = np.array([[3.0, 2.0, 1.0]], np.float32)
            broken[0, position] = bad
            assert not metrics.correct(broken, [0])[0]
    masked = np.array([[-np.inf, 2.0, 1.0]] * 3)
    assert metrics.correct(masked, np.arange(3)).tolist() == [False, True, False]
    assert not metrics.correct(np.full((1, 3), -np.inf), [0])[0]


@pytest.mark.parametrize("dtype", [np.float32, np.float64, jnp.bfloat16, np.float16])
def test_correct_takes_the_first_of_the_largest(dtype):
    tied = np.asarray([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]], dtype)
    if dtype != np.float64:
        found = metrics.correct(jnp.asarray(tied), np.array([0, 1]))
        np.testing.assert_array_equal(found, [True, True])
    assert metrics.correct(tied, np.array([0, 1])).tolist() == [True, True]
    assert metrics.correct(tied, np.array([1, 2])).tolist() == [False, False]


def test_accuracy_counts_what_the_mask_keeps():
    logits = jnp.eye(4)
    labels = np.array([0, 1, 0, 3])
    assert metrics.accuracy(logits, labels) == metrics.proportion(3, 4)
    assert metrics.accuracy(logits, labels, np.array([1, 1, 0, 0])) == metrics.proportion(2, 2)
    assert metrics.accuracy(logits, labels, np.array([0.0, 0, 1, 1])) == metrics.proportion(1, 2)
    with pytest.raises(ValueError, match="with a real example, got 0"):
        metrics.accuracy(logits, labels, np.zeros(4))


def test_accuracy_does_not_depend_on_a_temperature():
    logits_fn, _, inputs = make(scale=10.0)
    labels = np.arange(B) % K
    for temperature in (0.5, 100.0):
        divided = nets.with_temperature(logits_fn, temperature)(inputs)
        assert metrics.accuracy(divided, labels) == metrics.accuracy(logits_fn(inputs), labels)


def test_robustness_is_over_the_successes_and_says_how_many():
    distance = np.array([0.0, 1.0, 2.0, 5.0, np.inf, 7.0], np.float32)
    success = np.array([1, 1, 1, 1, 0, 0], bool)  # a failure counts for nothing, inf or not
    result = metrics.robustness(distance, success)
    assert (result.mean, result.median) == (2.0, 1.5)
    assert result.success_rate == metrics.proportion(4, 6)
    none = metrics.robustness(distance, np.zeros(6, bool))
    assert math.isnan(none.mean)
    assert math.isnan(none.median)
    assert none.success_rate.value == 0
    with pytest.raises(ValueError, match="got 0 of 0"):
        metrics.robustness([], [])


# -------------------------------------------------------------------------------------------------
# Sensitivities


def test_sensitivity_logits_of_a_linear_network():
    weights = np.random.default_rng(2).normal(size=(D, K)).astype(np.float32)
    inputs = np.zeros((B, *SHAPE), np.float32)
    value = metrics.sensitivity_logits(lambda x: x.reshape(B, -1) @ weights, inputs)
    np.testing.assert_allclose(value, np.full(B, np.abs(weights.sum(1)).mean()), rtol=1e-6)


@pytest.mark.floor
def test_sensitivity_logits_against_finite_differences():
    logits_fn, weights, inputs = make(scale=20.0)
    step = 1e-6
    derivative = np.zeros((B, D))
    for d in range(D):
        shift = np.zeros(D)
        shift[d] = step
        up, down = (
            numpy_network(weights, inputs + sign * shift.reshape(SHAPE))[0].sum(1)
            for sign in (1, -1)
        )
        derivative[:, d] = (up - down) / (2 * step)
    expected = np.abs(derivative).mean(1)
    np.testing.assert_allclose(metrics.sensitivity_logits(logits_fn, inputs), expected, rtol=1e-4)


def wide_reference(weights, inputs, temperature):
    """The same mean in numbers of 80 bits, whose range ends at 1e-4932."""
    logits, jacobian = numpy_network(weights, inputs)
    scaled = logits.astype(np.longdouble) / temperature
    scaled = scaled - scaled.max(1, keepdims=True)
    probs = np.exp(scaled)
    probs = probs / probs.sum(1, keepdims=True)
    difference = jacobian[:, :, None, :] - jacobian[:, None, :, :]  # [B, k, j, D]
    slope = probs[:, :, None] * (probs[:, None, :, None] * difference).sum(2) / temperature
    return np.log10(np.abs(slope).mean((1, 2)))


@pytest.mark.skipif(
    np.finfo(np.longdouble).minexp > -10000, reason="no wider float on this machine"
)
@pytest.mark.parametrize(
    ("scale", "temperature"), [(1.0, 1.0), (30.0, 1.0), (30.0, 20.0), (1000.0, 1.0), (4000.0, 2.0)]
)
def test_sensitivity_softmax_far_below_the_range_of_float32(scale, temperature):
    logits_fn, weights, inputs = make(scale)
    value = metrics.log10_sensitivity_softmax(logits_fn, inputs, temperature=temperature)
    expected = wide_reference(weights, inputs, temperature)
    np.testing.assert_allclose(value, expected.astype(np.float64), rtol=2e-6, atol=2e-5)
    if scale >= 1000:
        assert expected.min() < -400  # float32 arithmetic gives exactly 0


@pytest.mark.floor
@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_sensitivity_softmax_is_plain_autodiff_where_that_works(temperature):
    logits_fn, _, inputs = make(scale=2.0)
    jacobian = jax.jacrev(lambda x: jax.nn.softmax(logits_fn(x) / temperature))(inputs)
    rows = jacobian[np.arange(B), :, np.arange(B)]  # [B, K, 3, 2]
    expected = jnp.log10(jnp.abs(rows).mean((1, 2, 3)))
    value = metrics.log10_sensitivity_softmax(logits_fn, inputs, temperature=temperature)
    np.testing.assert_allclose(value, expected, atol=1e-5)


def test_sensitivity_softmax_of_a_constant_network_is_zero():
    value = metrics.log10_sensitivity_softmax(
        lambda x: jnp.zeros((B, K)) + 0 * x[:, 0, :1], np.ones((B, *SHAPE), np.float32)
    )
    np.testing.assert_array_equal(value, np.full(B, -np.inf))


def test_sensitivities_are_per_example_and_work_under_jit_and_vmap():
    models = [make(scale)[0] for scale in (1.0, 50.0)]
    inputs = make()[2]
    for measure in (metrics.sensitivity_logits, metrics.log10_sensitivity_softmax):
        jitted = jax.jit(measure)
        looped = np.stack([jitted(model, inputs) for model in models])
        stacked = jax.jit(jax.vmap(measure, in_axes=(0, None)))(nets.stack(models), inputs)
        np.testing.assert_allclose(stacked, looped, rtol=1e-5)
        np.testing.assert_allclose(measure(models[0], inputs[2:3])[0], looped[0, 2], rtol=1e-5)


def test_the_two_sensitivities_part_ways_as_logits_grow():
    inputs = make()[2]
    small, large = make(1.0)[0], make(100.0)[0]
    ratio = metrics.sensitivity_logits(large, inputs) / metrics.sensitivity_logits(small, inputs)
    np.testing.assert_allclose(ratio, 100.0, rtol=1e-5)
    collapse = metrics.log10_sensitivity_softmax(large, inputs)
    assert np.all(collapse < metrics.log10_sensitivity_softmax(small, inputs) - 5)


def test_log10_mean():
    values = np.array([-3.0, -1.0, 0.5, -2.0])
    assert metrics.log10_mean(values) == pytest.approx(np.log10(np.mean(10.0**values)), abs=1e-12)
    # Of 10^-400 and 3 * 10^-400, neither of which is a float64.
    assert metrics.log10_mean([-400.0, -400 + np.log10(3)]) == pytest.approx(-400 + np.log10(2))
    assert metrics.log10_mean([-np.inf, -40.0]) == pytest.approx(-40 - np.log10(2))
    assert metrics.log10_mean([-np.inf, -np.inf]) == -np.inf
    assert metrics.log10_mean(jnp.array([-5.0])) == -5.0
    assert math.isnan(metrics.log10_mean([np.nan, 0.0]))


# -------------------------------------------------------------------------------------------------
# Vanished gradients


@pytest.mark.floor
def test_zero_gradient_marks_the_saturated_examples():
    # The example's own logit gap is 1000 x; float32 saturates at about 17 with the label on top.
    logits_fn = lambda x: x @ jnp.array([[1000.0, 0.0]])  # noqa: E731
    inputs = np.array([[1.0], [0.5], [0.01], [1.0]], np.float32)
    labels = np.array([0, 0, 0, 1])
    np.testing.assert_array_equal(
        metrics.zero_gradient(logits_fn, inputs, labels), [True, True, False, False]
    )
    # At the training temperature the gradient is back.
    np.testing.assert_array_equal(
        metrics.zero_gradient(logits_fn, inputs, labels, temperature=100.0), np.zeros(4, bool)
    )


def test_zero_gradient_is_where_the_attacks_own_loss_is_flat():
    inputs = make()[2]
    labels = np.argmax(make()[0](inputs), axis=1)
    for scale in (1.0, 20.0, 1000.0):
        logits_fn = make(scale)[0]
        gradient = jax.grad(lambda x, f=logits_fn: losses.cross_entropy(f(x), labels).sum())(inputs)
        flat = np.all(np.asarray(gradient).reshape(B, -1) == 0, axis=1)
        np.testing.assert_array_equal(metrics.zero_gradient(logits_fn, inputs, labels), flat)
    assert flat.any()


@pytest.mark.parametrize("temperature", [0.0, -2.0, np.nan])
def test_a_bad_temperature_is_refused(temperature):
    logits_fn, _, inputs = make()
    for call in (
        lambda: metrics.log10_sensitivity_softmax(logits_fn, inputs, temperature=temperature),
        lambda: metrics.zero_gradient(logits_fn, inputs, np.zeros(B, int), temperature=temperature),
    ):
        with pytest.raises(ValueError, match=f"expected temperature > 0, got {temperature}"):
            call()


def test_an_empty_batch_has_no_values():
    def logits_fn(inputs):
        return inputs.sum(axis=(1, 2))

    inputs = jnp.zeros((0, 3, 2, 4))
    values = (
        metrics.sensitivity_logits(logits_fn, inputs),
        metrics.log10_sensitivity_softmax(logits_fn, inputs),
        metrics.zero_gradient(logits_fn, inputs, jnp.zeros(0, int)),
    )
    assert [value.shape for value in values] == [(0,)] * 3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.proportion(2.5, 10), "expected whole 0 <= successes"),
        (lambda: metrics.proportion(-1, 10), "expected whole 0 <= successes"),
        (lambda: metrics.proportion(np.nan, 10), "expected whole 0 <= successes"),
        (lambda: metrics.proportion(3, 10.5), "expected whole 0 <= successes"),
        (
            lambda: metrics.robustness([1.0, 2.0], [0.5, 1.0]),
            "expected success to be True or False",
        ),
        (lambda: metrics.robustness([1.0, np.nan], [True, True]), "expected finite distances >= 0"),
        (lambda: metrics.robustness([1.0, -2.0], [True, True]), "expected finite distances >= 0"),
        (lambda: metrics.robustness([1.0, np.inf], [True, True]), "expected finite distances >= 0"),
        (lambda: metrics.robustness([1.0], [True, True]), "expected distance and success"),
        (lambda: metrics.worst_case({"a": [0.2, 0.9]}), "expected success of 'a' to be True or"),
        (lambda: metrics.worst_case({"a": ["no", "yes"]}), "expected success of 'a' to be True or"),
        (lambda: metrics.worst_case({"a": [np.nan, 1.0]}), "expected success of 'a' to be True or"),
        (lambda: metrics.paired([0.3, 0.5], [True, False]), "expected first to be True or False"),
        (lambda: metrics.paired([True, False], [2, 1]), "expected second to be True or False"),
    ],
)
def test_what_a_measure_cannot_mean_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_truths_may_be_zeros_and_ones():
    assert metrics.worst_case({"a": [0, 1]})[1].tolist() == [False, True]
    assert metrics.robustness([3.0, np.inf], np.array([1.0, 0.0])).mean == 3
