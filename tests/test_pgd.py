"""FGSM and PGD against a plain NumPy implementation, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, losses, nets

B, D, H, K = 8, 5, 7, 4
RNG = np.random.default_rng(0)
FIRST = RNG.normal(0, 1.5, (D, H)).astype(np.float32)
SECOND = RNG.normal(0, 1, (H, K)).astype(np.float32)
INPUTS = RNG.uniform(0.05, 0.95, (B, D)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(0), B)
NORMS = ["linf", "l2"]
CALLS = []


def network(weights, inputs):
    first, second = weights
    jax.debug.callback(lambda: CALLS.append(1))  # counts forward passes, not traces
    return jnp.tanh(inputs @ first) @ second


def make(scale=1.0):
    weights = (jnp.asarray(FIRST), jnp.asarray(SECOND * np.float32(scale)))
    return nets.callable_logits_fn(network, weights)


MODEL = make()


def numpy_forward(inputs):
    hidden = np.tanh(inputs @ FIRST.astype(np.float64))
    return hidden, hidden @ SECOND


LABELS = numpy_forward(INPUTS)[1].argmax(1)
TARGETS = (LABELS + 1) % K


def numpy_gradient(inputs, labels):
    """Of the cross-entropy, `[B, D]`."""
    hidden, logits = numpy_forward(inputs)
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    return ((probs - np.eye(K)[labels]) @ SECOND.T * (1 - hidden**2)) @ FIRST.T


def numpy_pgd(inputs, labels, eps, step_size, num_steps, norm, start=None, sign=1):
    """The textbook loop; each example stops at its first success. Returns points and steps."""
    clean = inputs.astype(np.float64)
    x = clean.copy() if start is None else start.astype(np.float64)
    first = np.full(len(x), -1)
    for step in range(num_steps + 1):
        wins = numpy_forward(x)[1].argmax(1)
        success = wins != labels if sign > 0 else wins == labels
        first = np.where((first < 0) & success, step, first)
        active = first < 0
        gradient = sign * numpy_gradient(x, labels)
        if norm == "linf":
            moved = clean + np.clip(x + step_size * np.sign(gradient) - clean, -eps, eps)
        else:
            delta = x + step_size * gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
            delta -= clean
            length = np.linalg.norm(delta, axis=1, keepdims=True)
            moved = clean + delta * np.minimum(1, eps / length)
        if step < num_steps:
            x = np.where(active[:, None], moved.clip(0, 1), x)
    return x, first


@pytest.mark.floor
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targeted", [False, True])
def test_fgsm_against_numpy_and_one_step_of_pgd(norm, targeted):
    labels, sign, kwargs = (TARGETS, -1, {"targets": TARGETS}) if targeted else (LABELS, 1, {})
    eps = {"linf": 0.08, "l2": 0.2}[norm]
    expected, first = numpy_pgd(INPUTS, labels, eps, eps, 1, norm, sign=sign)
    fgsm = attacks.fgsm(MODEL, None, INPUTS, LABELS, eps=eps, norm=norm, **kwargs)
    np.testing.assert_allclose(fgsm.inputs, expected, atol=1e-6)
    np.testing.assert_array_equal(fgsm.success, first >= 0)
    pgd = attacks.pgd(
        MODEL,
        None,
        INPUTS,
        LABELS,
        eps=eps,
        norm=norm,
        num_steps=1,
        step_size=eps,
        random_start=False,
        **kwargs,
    )
    np.testing.assert_array_equal(pgd.inputs, fgsm.inputs)
    np.testing.assert_array_equal(pgd.success, fgsm.success)


@pytest.mark.floor
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("injected", [False, True])
def test_pgd_against_numpy(norm, injected):
    eps = {"linf": 0.12, "l2": 0.3}[norm]
    kwargs, start = {"init": None}, None
    if injected:
        start = (INPUTS + eps / 4 * np.sin(np.arange(B * D)).reshape(B, D)).astype(np.float32)
        start = start.clip(0, 1)
        kwargs = {"init": start}
    expected, first = numpy_pgd(INPUTS, LABELS, eps, eps / 4, 7, norm, start)
    assert 0 < np.sum(first < 0) < B  # some resist
    assert len(np.unique(first)) > 3  # the others fall at different steps
    result = attacks.pgd(
        MODEL,
        None,
        INPUTS,
        LABELS,
        eps=eps,
        norm=norm,
        num_steps=7,
        step_size=eps / 4,
        random_start=False,
        trace=True,
        **kwargs,
    )
    np.testing.assert_allclose(result.inputs, expected, atol=1e-5)
    np.testing.assert_array_equal(result.info["first_success"], first)
    np.testing.assert_array_equal(result.success, first >= 0)
    # Clean pass, one pass a judged iterate, verification; the last iterate is judged by it alone.
    np.testing.assert_array_equal(
        result.queries, 2 + np.where(first < 0, 7, np.minimum(first + 1, 7))
    )
    # The trace: the cross-entropy at the start, then rising.
    loss = np.asarray(result.info["loss"])[:, 0]
    at_start = losses.cross_entropy(MODEL(INPUTS if start is None else start), LABELS)
    np.testing.assert_allclose(loss[:, 0], at_start, rtol=1e-5)
    assert np.all(loss[first < 0, 3] > loss[first < 0, 0])


@pytest.mark.parametrize("norm", NORMS)
def test_an_init_is_projected(norm):
    eps = 0.05
    result = attacks.pgd(
        MODEL,
        None,
        INPUTS,
        LABELS,
        eps=eps,
        norm=norm,
        num_steps=1,
        step_size=0,
        init=np.full((B, D), 7.0, np.float32),
        random_start=False,
    )
    delta = np.asarray(result.inputs) - INPUTS
    length = np.abs(delta).max(1) if norm == "linf" else np.linalg.norm(delta, axis=1)
    np.testing.assert_allclose(length, eps, rtol=0.2)
    assert length.max() <= eps * (1 + 1e-5)


def count_calls(attack, index, **kwargs):
    """Forward passes truly run for one example alone, and what the result claims."""
    jax.effects_barrier()
    CALLS.clear()
    one = slice(index, index + 1)
    result = attack(MODEL, KEYS[one], INPUTS[one], LABELS[one], **kwargs)
    jax.block_until_ready(result)
    jax.effects_barrier()
    return len(CALLS), int(result.queries[0]), result


def test_queries_are_the_forward_passes_that_were_run():
    index = 3
    for eps in (0.001, 0.3):
        run, claimed, _ = count_calls(attacks.fgsm, index, eps=eps)
        assert run == claimed == 2
        run, claimed, result = count_calls(attacks.pgd, index, eps=eps, num_steps=6, num_restarts=2)
        assert run == claimed
        # Both starts used up: clean, 7 iterates judged, 6 judged, and the verification.
        assert result.success[0] or claimed == 1 + 7 + 6 + 1
    kwargs = {"num_searches": 2, "num_steps": 12, "learning_rate": 0.05}
    run, claimed, _ = count_calls(attacks.carlini_wagner_l2, index, **kwargs)
    assert run == claimed
    run, claimed, _ = count_calls(attacks.carlini_wagner_l2, index, abort_early=False, **kwargs)
    assert run == claimed == 1 + 2 * 12 + 1


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("power", [-30, 8, 60])
def test_the_scale_of_the_logits_changes_nothing_for_the_margin(norm, power):
    kwargs = {"eps": 0.1, "norm": norm, "num_steps": 5, "loss": losses.margin}
    plain = attacks.pgd(MODEL, KEYS, INPUTS, LABELS, **kwargs)
    scaled = attacks.pgd(make(2.0**power), KEYS, INPUTS, LABELS, **kwargs)
    jax.tree.map(np.testing.assert_array_equal, plain, scaled)
    assert 0 < plain.success.sum() < B


def test_more_restarts_only_help_and_only_survivors_take_them():
    kwargs = {"eps": 0.1, "num_steps": 2, "step_size": 0.01}
    one = attacks.pgd(MODEL, KEYS, INPUTS, LABELS, **kwargs)
    many = attacks.pgd(MODEL, KEYS, INPUTS, LABELS, num_restarts=20, **kwargs)
    first_start = np.asarray(many.info["restart"]) == 0
    assert one.success.sum() < many.success.sum()
    np.testing.assert_array_equal(np.asarray(one.success), np.asarray(many.success) & first_start)
    np.testing.assert_allclose(
        many.inputs[np.asarray(one.success)], one.inputs[np.asarray(one.success)], atol=1e-6
    )


def test_random_starts_fill_the_ball():
    # No step is taken, so the result is the start: uniform, inside, other for every restart.
    flat = nets.callable_logits_fn(lambda x: jnp.stack([x[:, 0] * 0, x[:, 0] * 0 - 1], axis=1))
    inputs = np.full((500, 4), 0.5, np.float32)
    labels = np.zeros(500, int)
    starts = [
        np.asarray(
            attacks.pgd(
                flat, jax.random.key(seed), inputs, labels, eps=0.2, num_steps=1, step_size=0.0
            ).inputs
        )
        for seed in range(2)
    ]
    noise = (starts[0] - 0.5) / 0.2
    assert np.abs(noise).max() <= 1 + 1e-6
    np.testing.assert_allclose(np.sort(noise.ravel()), np.linspace(-1, 1, noise.size), atol=0.09)
    assert not np.array_equal(*starts)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_steps": 0}, "expected num_steps to be a whole number >= 1, got 0"),
        ({"num_restarts": 0}, "expected num_restarts to be a whole number >= 1, got 0"),
        ({"num_steps": 2.0}, r"got 2\.0; pass a Python int"),
        ({"step_size": -0.1}, r"expected step_size >= 0, got -0\.1"),
        ({"step_size": np.nan}, "expected step_size >= 0, got nan"),
        ({"init": INPUTS[:2]}, r"expected init of the inputs' shape \(8, 5\), got \(2, 5\)"),
        ({"init": INPUTS * np.nan}, "got nan"),
        ({"num_restarts": 2, "random_start": False}, "expected num_restarts=1 without random"),
        ({"num_restarts": 2, "init": INPUTS, "key": None}, "expected a PRNG key for random"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    key = kwargs.pop("key", KEYS)
    with pytest.raises(ValueError, match=message):
        attacks.pgd(MODEL, key, INPUTS, LABELS, eps=0.1, **kwargs)
