"""Losses against NumPy in float64, against optax, and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

from jdistill import losses

B, K = 6, 5
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (B, K)).astype(np.float32)
LABELS = np.array([0, 4, 2, 1, 3, 3])
TARGETS = RNG.dirichlet(np.ones(K), B).astype(np.float32)
TARGETS[1] = np.eye(K)[4]
TARGETS[2, :2] = 0
TARGETS /= TARGETS.sum(1, keepdims=True)


def log_softmax(logits, temperature):
    scaled = np.asarray(logits, np.float64) / temperature
    scaled = scaled - scaled.max(1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(1, keepdims=True))


def entropy(targets):
    targets = targets.astype(np.float64)
    return -np.where(targets > 0, targets * np.log(np.where(targets > 0, targets, 1)), 0).sum(1)


@pytest.mark.floor
@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0, 100.0])
def test_against_numpy(temperature):
    log_probs = log_softmax(LOGITS, temperature)
    close = dict(rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(losses.tempered_log_softmax(LOGITS, temperature), log_probs, **close)
    np.testing.assert_allclose(
        losses.cross_entropy(LOGITS, LABELS, temperature=temperature),
        -log_probs[np.arange(B), LABELS],
        **close,
    )
    soft = -(TARGETS * log_probs).sum(1)
    np.testing.assert_allclose(
        losses.soft_cross_entropy(LOGITS, TARGETS, temperature=temperature), soft, **close
    )
    np.testing.assert_allclose(
        losses.kl_divergence(LOGITS, TARGETS, temperature=temperature),
        soft - entropy(TARGETS),
        **close,
    )


@pytest.mark.floor
def test_the_soft_margin():
    logits, rows = LOGITS.astype(np.float64), np.arange(B)
    tau = (logits.max(1) - logits.mean(1)) / (4 + np.log(K - 1))
    others = logits.copy()
    others[rows, LABELS] = -np.inf
    expected = tau * np.log(np.exp(others / tau[:, None]).sum(1)) - logits[rows, LABELS]
    found = losses.soft_margin(LOGITS, LABELS)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    hard = losses.margin(LOGITS, LABELS)
    assert np.all((hard <= found) & (found <= hard + tau * np.log(K - 1)))
    # It scales with the logits, and its gradient not at all: that of a cross-entropy at T = tau.
    for scale in (2.0**-20, 16.0, 1024.0):
        scaled = losses.soft_margin(scale * LOGITS, LABELS)
        np.testing.assert_array_equal(scaled, scale * found)
    gradient = jax.grad(lambda z: losses.soft_margin(z, LABELS).sum())
    grad = gradient(LOGITS)
    np.testing.assert_array_equal(gradient(1024 * LOGITS), grad)
    entropy = lambda z: losses.cross_entropy(z, LABELS, temperature=tau[:, None]).sum()  # noqa: E731
    fixed = np.asarray(jax.grad(entropy)(LOGITS))
    lengths = fixed[rows, LABELS] / grad[rows, LABELS]
    np.testing.assert_allclose(grad * lengths[:, None], fixed, rtol=1e-4, atol=1e-6)
    half = losses.soft_margin(jnp.asarray(LOGITS, jnp.bfloat16), LABELS)
    assert half.dtype == jnp.bfloat16
    # Of two classes it is the margin; equal logits have no spread, and no NaN.
    np.testing.assert_allclose(
        losses.soft_margin(LOGITS[:, :2], LABELS % 2), losses.margin(LOGITS[:, :2], LABELS % 2)
    )
    assert np.isfinite(losses.soft_margin(jnp.full((1, K), 7.0), np.zeros(1, int)))


def test_margin_against_numpy():
    others = [max(np.delete(row, label)) for row, label in zip(LOGITS, LABELS, strict=True)]
    np.testing.assert_array_equal(losses.largest_other(LOGITS, LABELS), others)
    np.testing.assert_array_equal(
        losses.margin(LOGITS, LABELS), np.array(others) - LOGITS[np.arange(B), LABELS]
    )


def test_equal_to_optax():
    np.testing.assert_allclose(
        losses.cross_entropy(LOGITS, LABELS),
        optax.softmax_cross_entropy_with_integer_labels(LOGITS, LABELS),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        losses.soft_cross_entropy(LOGITS, TARGETS, temperature=7.0),
        optax.softmax_cross_entropy(LOGITS / 7, TARGETS),
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        losses.kl_divergence(LOGITS, TARGETS, temperature=7.0),
        optax.kl_divergence(jax.nn.log_softmax(LOGITS / 7), TARGETS),
        rtol=1e-5,
        atol=1e-6,
    )


def test_hard_targets_are_soft_targets_of_one_class():
    one_hot = jax.nn.one_hot(LABELS, K)
    hard = losses.cross_entropy(LOGITS, LABELS, temperature=3.0)
    np.testing.assert_allclose(
        hard, losses.soft_cross_entropy(LOGITS, one_hot, temperature=3.0), rtol=1e-6
    )
    np.testing.assert_allclose(  # the entropy of a one-hot target is 0
        hard, losses.kl_divergence(LOGITS, one_hot, temperature=3.0), rtol=1e-6
    )


ALL = {
    "cross_entropy": lambda z, t: losses.cross_entropy(z, LABELS, temperature=t),
    "soft_cross_entropy": lambda z, t: losses.soft_cross_entropy(z, TARGETS, temperature=t),
    "kl_divergence": lambda z, t: losses.kl_divergence(z, TARGETS, temperature=t),
    "margin": lambda z, t: losses.margin(z, LABELS),
}


@pytest.mark.parametrize("name", ALL)
def test_one_value_per_example_and_no_more(name):
    whole = ALL[name](LOGITS, 20.0)
    assert whole.shape == (B,)
    assert whole.dtype == jnp.float32
    # Row 0 depends on row 0 alone.
    changed = LOGITS.copy()
    changed[1:] = np.nan
    np.testing.assert_array_equal(ALL[name](changed, 20.0)[0], whole[0])


@pytest.mark.floor
def test_a_target_that_is_not_a_number_is_not_taken_for_0():
    targets = np.array([[np.nan, 1.0], [0.0, 1.0]], np.float32)
    logits = np.array([[1.0, -np.inf], [-np.inf, 1.0]], np.float32)[:, ::-1]
    assert np.isnan(losses.soft_cross_entropy(logits, targets)[0])


@pytest.mark.parametrize("name", ALL)
def test_adding_a_constant_to_the_logits_changes_nothing(name):
    shift = np.arange(B, dtype=np.float32)[:, None] * 64 - 100
    np.testing.assert_allclose(
        ALL[name](LOGITS + shift, 20.0), ALL[name](LOGITS, 20.0), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", ALL)
def test_gradients_against_finite_differences(name):
    # Second order too, but for the margin, whose second derivative is 0 almost everywhere.
    order = 1 if name == "margin" else 2
    check_grads(
        lambda z: jnp.sum(ALL[name](z, 2.0)), (LOGITS,), order, ["rev"], rtol=2e-2, atol=2e-2
    )


@pytest.mark.floor
@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_gradient_is_prediction_minus_target_over_temperature(temperature):
    expected = (np.exp(log_softmax(LOGITS, temperature)) - TARGETS) / temperature
    for loss in (losses.soft_cross_entropy, losses.kl_divergence):
        gradient = jax.grad(lambda z, loss=loss: loss(z, TARGETS, temperature=temperature).sum())
        np.testing.assert_allclose(gradient(LOGITS), expected, atol=2e-6)
    gradient = jax.grad(lambda z: losses.cross_entropy(z, LABELS, temperature=temperature).sum())
    expected = (np.exp(log_softmax(LOGITS, temperature)) - np.eye(K)[LABELS]) / temperature
    np.testing.assert_allclose(gradient(LOGITS), expected, atol=2e-6)


def test_a_high_temperature_flattens_the_prediction():
    # softmax(z / T) -> 1 / K, and T (log K - loss) -> z_y - mean(z): the first-order term.
    temperature = 1e4
    loss = losses.cross_entropy(LOGITS, LABELS, temperature=temperature)
    np.testing.assert_allclose(loss, np.log(K), atol=3e-3)
    exact = np.log(K) - (LOGITS[np.arange(B), LABELS] - LOGITS.mean(1)) / temperature
    np.testing.assert_allclose(loss, exact, atol=1e-6)


def test_a_temperature_per_example():
    temperatures = np.array([[1.0], [2.0], [5.0], [20.0], [50.0], [100.0]], np.float32)
    together = losses.soft_cross_entropy(LOGITS, TARGETS, temperature=temperatures)
    for b in range(B):
        alone = losses.soft_cross_entropy(
            LOGITS[b : b + 1], TARGETS[b : b + 1], temperature=float(temperatures[b, 0])
        )
        np.testing.assert_allclose(together[b], alone[0], rtol=1e-6)


def test_a_traced_temperature_compiles_once():
    traces = []

    @jax.jit
    def loss(temperature):
        traces.append(temperature)
        return losses.kl_divergence(LOGITS, TARGETS, temperature=temperature)

    first, second = loss(1.0), loss(20.0)
    assert len(traces) == 1
    assert not np.allclose(first, second)


def test_a_zero_target_adds_nothing_even_where_the_log_probability_is_minus_infinity():
    logits = np.array([[0.0, 1.0, -np.inf], [2e38, 0.0, -2e38]], np.float32)
    targets = np.array([[0.25, 0.75, 0.0], [1.0, 0.0, 0.0]], np.float32)
    expected = [-(targets[0, :2] * log_softmax(logits[:1, :2], 1.0)[0]).sum(), 0.0]
    np.testing.assert_allclose(losses.soft_cross_entropy(logits, targets), expected, rtol=1e-6)
    kl = losses.kl_divergence(logits, targets)
    np.testing.assert_allclose(kl, expected - entropy(targets), atol=1e-6)
    gradient = jax.grad(lambda z: losses.soft_cross_entropy(z, targets).sum())(logits)
    expected = np.exp(log_softmax(logits, 1.0)) - targets
    np.testing.assert_allclose(gradient, expected, atol=1e-6)


def test_log_probabilities_do_not_saturate():
    logits = np.array([[0.0, 1e5]], np.float32)
    np.testing.assert_allclose(losses.cross_entropy(logits, np.array([0])), [1e5])
    np.testing.assert_allclose(losses.cross_entropy(logits, np.array([1])), [0.0])


@pytest.mark.parametrize("scale", [1e5, 1e30])
def test_margin_on_logits_of_any_size(scale):
    # A mask of -10000 would win here and report the wrong class.
    logits = np.array([[-3 * scale, -scale, -2 * scale], [scale, 2 * scale, 3 * scale]], np.float32)
    labels = np.array([1, 0])
    np.testing.assert_allclose(losses.margin(logits, labels), [-scale, 2 * scale], rtol=1e-6)
    gradient = jax.grad(lambda z: losses.margin(z, labels).sum())(logits)
    np.testing.assert_array_equal(gradient, [[0, -1, 1], [-1, 0, 1]])


def test_divergence_is_zero_only_at_the_targets_themselves():
    targets = np.exp(log_softmax(LOGITS, 5.0)).astype(np.float32)
    np.testing.assert_allclose(
        losses.kl_divergence(LOGITS, targets, temperature=5.0), 0.0, atol=1e-6
    )
    assert np.all(losses.kl_divergence(LOGITS, targets, temperature=4.0) > 1e-4)


@pytest.mark.parametrize("temperature", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["cross_entropy", "soft_cross_entropy", "kl_divergence"])
def test_a_bad_temperature_is_refused(name, temperature):
    with pytest.raises(ValueError, match=f"expected temperature > 0, got {temperature}"):
        ALL[name](LOGITS, temperature)


@pytest.mark.parametrize("bad", [-1, LOGITS.shape[1]])
@pytest.mark.parametrize("name", ["cross_entropy", "margin", "largest_other"])
def test_labels_out_of_range_are_named(name, bad):
    labels = LABELS.copy()
    labels[1] = bad
    with pytest.raises(ValueError, match=f"expected labels in 0..*got {bad} at index 1"):
        getattr(losses, name)(LOGITS, labels)


@pytest.mark.parametrize("num_masked", [1, 2, 3])
def test_a_class_that_is_masked_out_is_no_class(num_masked):
    rng = np.random.default_rng(0)
    logits, labels = jnp.asarray(rng.normal(0, 3, (20, 5)), jnp.float32), rng.integers(5, size=20)
    targets = (labels + 1) % 5
    more = jnp.full((20, num_masked), -jnp.inf)
    every = {
        "cross_entropy": lambda z: losses.cross_entropy(z, labels),
        "soft_cross_entropy": lambda z: losses.soft_cross_entropy(z, jnp.eye(z.shape[1])[labels]),
        "margin": lambda z: losses.margin(z, labels),
        "soft_margin": lambda z: losses.soft_margin(z, labels),
        "dlr": lambda z: losses.dlr(z, labels),
        "targeted_dlr": lambda z: losses.targeted_dlr(z, labels, targets),
    }
    for name, loss in every.items():
        masked = lambda z, loss=loss: loss(jnp.concatenate([z, more], 1))  # noqa: E731
        np.testing.assert_allclose(masked(logits), loss(logits), rtol=1e-5, err_msg=name)
        ours, theirs = (jax.grad(lambda z, f=f: f(z).sum())(logits) for f in (masked, loss))
        np.testing.assert_allclose(ours, theirs, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("left", [2, 3])
def test_few_classes_left_are_enough(left):
    """Losses that need three or four classes fall back where masks leave fewer."""
    logits = jnp.array([[2.0, 1.0, 0.5][:left] + [-jnp.inf] * (5 - left)])
    label, target = np.array([0]), np.array([1])
    expected = -1.0 if left == 2 else -1 / 1.5
    for loss in (
        lambda z: losses.dlr(z, label),
        lambda z: losses.targeted_dlr(z, label, target),
    ):
        np.testing.assert_allclose(loss(logits), [expected], rtol=1e-6)
        gradient = jax.grad(lambda z, loss=loss: loss(z).sum())(logits)
        assert np.all(np.isfinite(gradient))
        assert gradient[0, 0] < 0 < gradient[0, 1]


# Standardized logits


def numpy_standardize(logits):
    logits = np.asarray(logits, np.float64)
    return (logits - logits.mean(1, keepdims=True)) / logits.std(1, keepdims=True)


def numpy_standardized_kl(logits, teacher_logits, temperature):
    own = log_softmax(numpy_standardize(logits), temperature)
    its = log_softmax(numpy_standardize(teacher_logits), temperature)
    return (np.exp(its) * (its - own)).sum(1)


TEACHER = np.random.default_rng(1).normal(2, 9, (B, K)).astype(np.float32)


@pytest.mark.floor
@pytest.mark.parametrize("temperature", [0.5, 2.0, 20.0])
def test_standardized_losses_against_numpy(temperature):
    found = losses.standardize(LOGITS)
    np.testing.assert_allclose(found, numpy_standardize(LOGITS), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.mean(1), 0.0, atol=1e-6)
    np.testing.assert_allclose(found.std(1), 1.0, rtol=1e-6)
    assert np.abs(found).max() <= np.sqrt(K - 1) * (1 + 1e-6)
    value = losses.standardized_kl(LOGITS, TEACHER, temperature=temperature)
    assert value.shape == (B,)
    assert value.dtype == jnp.float32
    expected = numpy_standardized_kl(LOGITS, TEACHER, temperature)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
    own = losses.standardized_kl(LOGITS, LOGITS, temperature=temperature)
    np.testing.assert_allclose(own, 0.0, atol=1e-6)
    column = losses.standardized_kl(LOGITS, TEACHER, temperature=np.full((B, 1), temperature))
    np.testing.assert_allclose(column, value, rtol=1e-6)


@pytest.mark.floor
def test_standardized_losses_know_neither_scale_nor_shift():
    value = losses.standardized_kl(LOGITS, TEACHER, temperature=2.0)
    # Powers of two are exact; the largest would overflow where it is squared or subtracted.
    for scale in (2.0**-100, 0.25, 1024.0, 2.0**123):
        np.testing.assert_array_equal(
            losses.standardize(scale * LOGITS), losses.standardize(LOGITS)
        )
    shift = np.arange(B, dtype=np.float32)[:, None] * 64 - 100
    for own, its in ((3.7 * LOGITS + shift, TEACHER), (LOGITS, 0.13 * TEACHER - shift)):
        changed = losses.standardized_kl(own, its, temperature=2.0)
        np.testing.assert_allclose(changed, value, rtol=1e-3, atol=1e-5)
    tiny = 2.0**-24 * np.array([[1, 2, 3], [3, 3, 0]])
    for dtype, tolerance in ((jnp.float16, 2e-3), (jnp.bfloat16, 2e-2)):
        found = losses.standardize(jnp.asarray(tiny, dtype))
        assert found.dtype == dtype
        np.testing.assert_allclose(found, numpy_standardize(tiny), rtol=tolerance, atol=1e-6)
    below_normal = np.float32(2.0**-140) * LOGITS
    np.testing.assert_allclose(losses.standardize(below_normal), 0.0, atol=1e-6)
    wide = np.array([[3e38, 0.0, -3e38], [3e38, -3e38, -3e38]], np.float32)
    np.testing.assert_allclose(losses.standardize(wide), numpy_standardize(wide), rtol=1e-6)
    # So the gradient is of no length along the logits, nor along a constant.
    gradient = jax.grad(lambda z: losses.standardized_kl(z, TEACHER, temperature=2.0).sum())(LOGITS)
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_allclose((gradient * LOGITS).sum(1), 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient.sum(1), 0.0, atol=1e-6)


def test_gradients_of_standardized_losses_against_finite_differences():
    weights = RNG.normal(size=(B, K)).astype(np.float32)
    for loss in (
        lambda z: jnp.sum(weights * losses.standardize(z)),
        lambda z: jnp.sum(losses.standardized_kl(z, TEACHER, temperature=2.0)),
        lambda z: jnp.sum(losses.standardized_kl(LOGITS, z, temperature=2.0)),
    ):
        check_grads(loss, (LOGITS,), 2, ["rev"], rtol=2e-2, atol=2e-2)


@pytest.mark.floor
@pytest.mark.parametrize("constant", [0.0, 0.1, -1e30])
def test_equal_logits_standardize_to_0_and_have_a_gradient(constant):
    # The mean of ten times 0.1 is not 0.1 in float32: noise must not be blown up.
    equal = np.full((2, 10), constant, np.float32)
    equal[1] = np.arange(10)
    teacher = np.random.default_rng(2).normal(size=(2, 10)).astype(np.float32)
    np.testing.assert_array_equal(losses.standardize(equal)[0], np.zeros(10))
    gradient = jax.grad(lambda z: losses.standardized_kl(z, teacher, temperature=2.0).sum())(equal)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient[0]).max() > 0.01  # a student that starts at 0 can leave it
    targets = np.exp(log_softmax(numpy_standardize(teacher[:1]), 2.0))
    np.testing.assert_allclose(gradient[:1], (0.1 - targets) / 2, atol=1e-6)
    both = jax.grad(losses_sum, argnums=(0, 1))(equal, equal)
    assert all(np.isfinite(leaf).all() for leaf in both)


def losses_sum(logits, teacher_logits):
    return losses.standardized_kl(logits, teacher_logits, temperature=2.0).sum()


def test_a_masked_class_does_not_count_in_the_standardization():
    masked = np.concatenate([LOGITS, np.full((B, 2), -np.inf, np.float32)], axis=1)
    taught = np.concatenate([TEACHER, np.full((B, 2), -np.inf, np.float32)], axis=1)
    found = losses.standardize(masked)
    np.testing.assert_allclose(found[:, :K], losses.standardize(LOGITS), rtol=1e-5, atol=1e-6)
    assert np.isneginf(found[:, K:]).all()
    np.testing.assert_allclose(
        losses_sum(masked, taught), losses_sum(LOGITS, TEACHER), rtol=1e-5, atol=1e-6
    )
    gradient = jax.grad(losses_sum)(masked, taught)
    np.testing.assert_allclose(gradient[:, :K], jax.grad(losses_sum)(LOGITS, TEACHER), atol=1e-6)
    np.testing.assert_array_equal(gradient[:, K:], 0.0)


def test_standardized_losses_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"teacher_logits of the shape of logits, \(6, 5\), got"):
        losses.standardized_kl(LOGITS, TEACHER[:, 1:], temperature=2.0)
    with pytest.raises(ValueError, match="expected teacher_logits of rank 2, got"):
        losses.standardized_kl(LOGITS, TEACHER[0], temperature=2.0)
    with pytest.raises(ValueError, match="expected logits of rank 2, got"):
        losses.standardize(LOGITS[0])
    with pytest.raises(ValueError, match=r"expected temperature > 0, got 0\.0"):
        losses.standardized_kl(LOGITS, TEACHER, temperature=0.0)
