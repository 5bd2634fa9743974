"""Expectation over transformation and BPDA: closed forms, laws, and attacks through them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, losses, nets

B, D, K = 6, 5, 3
RNG = np.random.default_rng(3)
WEIGHTS = jnp.asarray(RNG.normal(0, 1, (D, K)), jnp.float32)
INPUTS = RNG.uniform(0.1, 0.9, (B, D)).astype(np.float32)
KEY = jax.random.key(5)
TRACES = []


def linear(weights, inputs):
    return inputs @ weights


def noisy_square(weights, key, inputs):
    """Logits with a gradient that depends on the draw: `((1 + n) · x²) W`."""
    TRACES.append(inputs.shape)
    noise = jax.random.normal(key, inputs.shape)
    return ((1 + noise) * inputs**2) @ weights


RANDOM = nets.callable_logits_fn(noisy_square, WEIGHTS)


def draws(key, num_draws):
    """What each draw adds, `[num_draws, D]`, by hand."""
    keys = [jax.random.fold_in(key, d) for d in range(num_draws)]
    return np.stack([np.asarray(jax.random.normal(k, (1, D)))[0] for k in keys])


@pytest.mark.floor
@pytest.mark.parametrize("num_draws", [1, 7])
def test_the_expectation_is_the_mean_and_so_is_its_gradient(num_draws):
    logits_fn = attacks.expectation(RANDOM, KEY, num_draws=num_draws)
    mean = 1 + draws(KEY, num_draws).mean(0)
    expected = (mean * INPUTS**2) @ np.asarray(WEIGHTS)
    np.testing.assert_allclose(logits_fn(INPUTS), expected, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(logits_fn(x)[:, 1]))(INPUTS)
    expected = 2 * mean * INPUTS * np.asarray(WEIGHTS)[:, 1]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)


def test_an_examples_draws_do_not_depend_on_its_batch_but_on_the_key():
    logits_fn = attacks.expectation(RANDOM, KEY, num_draws=3)
    whole = np.asarray(logits_fn(INPUTS))
    np.testing.assert_allclose(logits_fn(INPUTS[4:]), whole[4:], rtol=1e-6)
    np.testing.assert_allclose(logits_fn(INPUTS[::-1]), whole[::-1], rtol=1e-6)
    other = attacks.expectation(RANDOM, jax.random.key(6), num_draws=3)
    assert np.all(np.abs(other(INPUTS) - whole).max(1) > 1e-3)
    raw = attacks.expectation(RANDOM, jax.random.key_data(KEY), num_draws=3)
    np.testing.assert_array_equal(raw(INPUTS), whole)


def shifting(key, inputs):
    """The label's logit is ahead but for a random sign that hides the slope of one draw."""
    sign = jax.random.rademacher(key, (1, 1), inputs.dtype)
    true_slope = jnp.sum(inputs, axis=1, keepdims=True)
    score = 3.5 - true_slope + 3 * sign * inputs[:, :1]
    return jnp.concatenate([score, -score], axis=1)


def test_an_attack_needs_the_mean_where_one_draw_misleads():
    inputs = np.full((2, D), 0.5, np.float32)
    labels = np.zeros(2, int)
    num_draws = 64

    def signs(key):
        keys = [jax.random.fold_in(key, d) for d in range(num_draws)]
        return [float(jax.random.rademacher(k, (1, 1), jnp.float32)[0, 0]) for k in keys]

    # A first draw whose gradient points the other way than the mean's.
    key = next(k for k in map(jax.random.key, range(20)) if signs(k)[0] > 0)
    assert 3 * np.mean(signs(key)) - 1 < 0
    fgsm = functools.partial(attacks.fgsm, eps=0.25, loss=losses.margin)
    one = fgsm(attacks.expectation(shifting, key, num_draws=1), None, inputs, labels)
    many = fgsm(attacks.expectation(shifting, key, num_draws=num_draws), None, inputs, labels)
    np.testing.assert_allclose(one.inputs[:, 0], 0.25)
    np.testing.assert_allclose(many.inputs[:, 0], 0.75)


def quantize(levels, inputs):
    return jnp.round(inputs * levels) / levels


QUANTIZE = nets.callable_logits_fn(quantize, jnp.float32(4.0))


@pytest.mark.floor
def test_a_quantizer_has_no_gradient_and_bpda_has():
    logits_fn = nets.callable_logits_fn(linear, WEIGHTS)
    plain = nets.callable_logits_fn(lambda x: logits_fn(QUANTIZE(x)))
    defended = attacks.bpda(logits_fn, QUANTIZE)
    expected = (np.round(INPUTS * 4) / 4) @ np.asarray(WEIGHTS)
    np.testing.assert_allclose(defended(INPUTS), expected, rtol=1e-5, atol=1e-6)

    def gradient(fun):
        return np.asarray(jax.grad(lambda x: jnp.sum(fun(x)[:, 2]))(INPUTS))

    assert np.all(gradient(plain) == 0)
    np.testing.assert_allclose(gradient(defended), np.tile(WEIGHTS[:, 2], (B, 1)), rtol=1e-6)
    # A substitute's gradient at the inputs themselves, and a downstream one at what it is fed.
    squared = attacks.bpda(lambda x: linear(WEIGHTS, x**2), QUANTIZE, jnp.sin)
    quantized = np.round(INPUTS * 4) / 4
    expected = 2 * quantized * np.asarray(WEIGHTS)[:, 2] * np.cos(INPUTS)
    np.testing.assert_allclose(gradient(squared), expected, rtol=1e-5, atol=1e-6)


def test_attacks_pass_through_a_quantizer_by_bpda_alone():
    logits_fn = nets.callable_logits_fn(linear, WEIGHTS)
    labels = np.asarray(logits_fn(QUANTIZE(INPUTS))).argmax(1)
    plain = nets.callable_logits_fn(lambda x: logits_fn(QUANTIZE(x)))
    attack = functools.partial(attacks.pgd, eps=0.45, num_steps=10, loss=losses.margin)
    masked = attack(plain, KEY, INPUTS, labels, random_start=False)
    found = attack(attacks.bpda(logits_fn, QUANTIZE), KEY, INPUTS, labels, random_start=False)
    assert not np.any(masked.success)
    np.testing.assert_array_equal(masked.inputs, INPUTS)
    assert np.mean(found.success) >= 0.5
    # Success is that of the defense itself, whose forward pass is untouched.
    wins = np.asarray(plain(found.inputs)).argmax(1)
    np.testing.assert_array_equal(wins != labels, found.success)


def test_a_preprocessing_that_cannot_be_traced_backwards():
    def on_the_host(inputs):
        shape = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
        return jax.pure_callback(lambda x: np.floor(x * 4) / 4, shape, inputs)

    defended = attacks.bpda(nets.callable_logits_fn(linear, WEIGHTS), on_the_host)
    gradient = jax.grad(lambda x: jnp.sum(defended(x)[:, 0]))(INPUTS)
    np.testing.assert_allclose(gradient, np.tile(WEIGHTS[:, 0], (B, 1)), rtol=1e-6)


def test_one_in_the_other():
    random = nets.callable_logits_fn(noisy_square, WEIGHTS)

    def behind_a_quantizer(weights, key, inputs):
        inner = nets.callable_logits_fn(noisy_square, weights, key)
        return attacks.bpda(inner, QUANTIZE)(inputs)

    nested = nets.callable_logits_fn(behind_a_quantizer, WEIGHTS)
    nested = attacks.expectation(nested, KEY, num_draws=4)
    outer = attacks.bpda(attacks.expectation(random, KEY, num_draws=4), QUANTIZE)
    np.testing.assert_allclose(nested(INPUTS), outer(INPUTS), rtol=1e-5)
    gradients = [jax.grad(lambda x, f=f: jnp.sum(f(x)[:, 0]))(INPUTS) for f in (nested, outer)]
    np.testing.assert_allclose(*gradients, rtol=1e-5)
    assert np.abs(gradients[0]).max() > 0.1


def wrapped(weights, levels, key):
    random = nets.callable_logits_fn(noisy_square, weights)
    quantizer = nets.callable_logits_fn(quantize, levels)
    return attacks.bpda(attacks.expectation(random, key, num_draws=2), quantizer)


def test_new_weights_keys_and_settings_compile_nothing_and_stack():
    labels = np.zeros(B, int)
    fgsm = functools.partial(attacks.fgsm, eps=0.3)
    results, counts = [], []
    settings = [(WEIGHTS, 4.0, KEY), (-WEIGHTS, 8.0, jax.random.key(1))]
    models = [wrapped(w, jnp.float32(levels), key) for w, levels, key in settings]
    for model in models:
        results.append(fgsm(model, None, INPUTS, labels))
        counts.append(len(TRACES))
    assert counts[0] == counts[1]
    assert not np.array_equal(results[0].inputs, results[1].inputs)
    vmapped = jax.vmap(lambda f: fgsm(f, None, INPUTS, labels))(nets.stack(models))
    for r, result in enumerate(results):
        np.testing.assert_allclose(vmapped.inputs[r], result.inputs, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: attacks.expectation(RANDOM, KEY, num_draws=0), "expected num_draws to be a whole"),
        (lambda: attacks.expectation(RANDOM, None, num_draws=2), "expected a PRNG key, got None"),
        (
            lambda: attacks.expectation(RANDOM, jax.random.split(KEY, 3), num_draws=2),
            r"expected one key, got keys of shape \(3,\)",
        ),
        (lambda: attacks.expectation(3, KEY, num_draws=2), "expected a callable, got int"),
        (lambda: attacks.bpda(3, jnp.round), "expected a callable, got int"),
        (lambda: attacks.bpda(jnp.sin, 3), "expected a callable, got int"),
        (lambda: attacks.bpda(jnp.sin, jnp.round, 3), "expected a callable, got int"),
        (
            lambda: attacks.bpda(jnp.sin, lambda x: x[:, ::2])(INPUTS),
            r"expected substitute to return what preprocess does, \(\(6, 3\), 'float32'\), got",
        ),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
