"""DDN against a plain NumPy version of algorithm 1, exact minima, and saturation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, losses, nets

B, D, H, K = 8, 5, 7, 4
RNG = np.random.default_rng(2)
FIRST = RNG.normal(0, 1.5, (D, H))
SECOND = RNG.normal(0, 1, (H, K))
INPUTS = RNG.uniform(0.05, 0.95, (B, D)).astype(np.float32)


def network(weights, inputs):
    first, second = weights
    return jnp.tanh((inputs - 0.5) @ first) @ second


def make(scale=1.0, dtype=jnp.float32):
    weights = (jnp.asarray(FIRST, dtype), jnp.asarray(SECOND * scale, dtype))
    return nets.callable_logits_fn(network, weights)


def logits_of(x):
    return np.tanh((x - 0.5) @ FIRST) @ SECOND


LABELS = logits_of(INPUTS).argmax(1)
TARGETS = np.argsort(logits_of(INPUTS), axis=1)[:, -2]


def margin_weights(logits, goal):
    """The derivative of the margin by the logits, for one example."""
    others = np.where(np.arange(K) == goal, -np.inf, logits)
    return np.eye(K)[others.argmax()] - np.eye(K)[goal]


def cross_entropy_weights(logits, goal):
    probs = np.exp(logits - logits.max())
    return probs / probs.sum() - np.eye(K)[goal]


def soft_margin_weights(logits, goal):
    others = np.where(np.arange(K) == goal, -np.inf, logits)
    sharpness = (4 + np.log(K - 1)) / (logits.max() - logits.mean())
    probs = np.exp(sharpness * (others - others.max()))
    return probs / probs.sum() - np.eye(K)[goal]


def reference(x, goal, sign, weights_of, *, num_steps, gamma, initial_norm, step_size):
    """Algorithm 1 for one example in float64: the least distance, and the step first seen."""

    def gradient(point):
        hidden = np.tanh((point - 0.5) @ FIRST)
        by_logits = sign * weights_of(hidden @ SECOND, goal)
        return FIRST @ ((1 - hidden**2) * (SECOND @ by_logits))

    delta, norm, best, first = np.zeros(D), initial_norm, np.inf, -1
    adversarial = False
    for k in range(num_steps):
        g = gradient(x + delta)
        alpha = step_size * (0.01 + 0.99 * (1 + np.cos(np.pi * k / num_steps)) / 2)
        delta = delta + alpha * g / np.linalg.norm(g)
        norm *= 1 - gamma if adversarial else 1 + gamma
        norm = min(norm, np.linalg.norm(np.maximum(x, 1 - x)) + step_size)
        delta = np.clip(x + norm * delta / np.linalg.norm(delta), 0, 1) - x
        adversarial = (logits_of(x + delta).argmax() != goal) == (sign > 0)
        if adversarial:
            first = k + 1 if first < 0 else first
            best = min(best, np.linalg.norm(delta))
    return best, first


@pytest.mark.floor
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize(
    ("loss", "weights_of"),
    [
        (losses.margin, margin_weights),
        (losses.cross_entropy, cross_entropy_weights),
        (losses.soft_margin, soft_margin_weights),
    ],
    ids=["margin", "cross_entropy", "soft_margin"],
)
def test_against_numpy_in_double_precision(loss, weights_of, targeted):
    settings = {"num_steps": 30, "gamma": 0.1, "initial_norm": 0.1, "step_size": 0.2}
    goals, sign = (TARGETS, -1) if targeted else (LABELS, 1)
    rows = [
        reference(x.astype(np.float64), goal, sign, weights_of, **settings)
        for x, goal in zip(INPUTS, goals, strict=True)
    ]
    distance, first = np.array(rows).T
    assert np.isfinite(distance).sum() >= B - 1
    assert len(np.unique(first)) > 2
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        result = attacks.ddn(
            make(dtype=jnp.float64),
            None,
            INPUTS.astype(np.float64),
            LABELS,
            targets=TARGETS if targeted else None,
            loss=loss,
            **settings,
        )
        result = jax.tree.map(np.asarray, result)
    np.testing.assert_allclose(result.distance, distance, rtol=1e-8)
    np.testing.assert_array_equal(result.info["first_success"], first)
    np.testing.assert_array_equal(result.queries, np.full(B, 32))


@pytest.mark.parametrize("num_steps", [100, 300])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_exact_distance_of_linear_networks(classes, num_steps):
    rng = np.random.default_rng(0)
    many, size = 60, 12
    linear = rng.normal(0, 1, (size, classes)).astype(np.float32)
    inputs = rng.uniform(0.3, 0.7, (many, size)).astype(np.float32)
    logits = (inputs.astype(np.float64) - 0.5) @ linear
    labels = logits.argmax(1)
    gaps = logits.max(1, keepdims=True) - logits
    lengths = np.linalg.norm(linear.T[labels][:, None] - linear.T[None], axis=2)
    distances = np.divide(gaps, lengths, where=lengths > 0, out=np.full_like(gaps, np.inf))
    keep = distances.min(1) > 0.03  # the radius needs 68 steps from 1 to there
    assert keep.sum() > 30
    logits_fn = nets.callable_logits_fn(lambda w, x: (x - 0.5) @ w, jnp.asarray(linear))
    result = attacks.ddn(logits_fn, None, inputs, labels, num_steps=num_steps)
    assert np.all(result.success)
    ratio = (np.asarray(result.distance) / distances.min(1))[keep]
    assert ratio.min() >= 1 - 1e-5
    assert np.median(ratio) <= 1.06
    # The gradient leads to the classes of large logits, of which the nearest need not be one.
    assert ratio.max() <= (1.06 if classes == 2 else 1.3)


def test_saturated_logits_mask_the_cross_entropy_and_not_the_default():
    def attempt(scale, **kwargs):
        return attacks.ddn(make(scale), None, INPUTS, LABELS, num_steps=100, **kwargs)

    plain = attempt(1.0)
    assert np.all(plain.success)
    for scale in (16.0, 128.0, 1024.0):
        scaled = attempt(scale)
        np.testing.assert_array_equal(scaled.success, plain.success)
        np.testing.assert_array_equal(scaled.inputs, plain.inputs)
        np.testing.assert_array_equal(scaled.distance, plain.distance)
    # The published loss: as good at first, and blind in the end.
    published = attempt(1.0, loss=losses.cross_entropy)
    np.testing.assert_allclose(published.distance, plain.distance, rtol=0.1)
    masked = attempt(1024.0, loss=losses.cross_entropy)
    assert np.sum(masked.success) < B / 2


def test_the_radius_reaches_the_farthest_corner_and_stays_finite():
    # Adversarial in the last thousandth of one corner only, and after very many failures.
    corner = np.where(INPUTS[:1] > 0.5, 0.0, 1.0)  # the farthest one
    sign = 2 * corner - 1
    bias = 1e-3 - np.sum(sign * corner)

    def near_the_corner(x):
        return jnp.stack([jnp.zeros(len(x)), x @ jnp.asarray(sign[0], x.dtype) + bias], axis=1)

    result = attacks.ddn(
        near_the_corner, None, INPUTS[:1], np.zeros(1, int), num_steps=400, gamma=0.5
    )
    assert np.all(result.success)
    np.testing.assert_allclose(result.inputs, corner, atol=1e-3)
    result = attacks.ddn(
        lambda x: jnp.stack([x[:, 0] + 1, x[:, 0] * 0], axis=1),
        None,
        INPUTS,
        np.zeros(B, int),
        num_steps=400,
        gamma=0.5,
        trace=True,
    )
    assert not np.any(result.success)
    assert np.all(np.isfinite(result.info["trace"]))
    np.testing.assert_array_equal(result.info["first_success"], np.full(B, -1))


def test_the_trace_is_the_loss_after_each_step():
    result = attacks.ddn(
        make(), None, INPUTS, LABELS, num_steps=12, initial_norm=0.1, trace=True, loss=losses.margin
    )
    loss = np.asarray(result.info["trace"])
    assert loss.shape == (B, 12)
    # The margin is above 0 for the first time where the first success is.
    above = np.where(np.any(loss > 0, axis=1), np.argmax(loss > 0, axis=1) + 1, -1)
    np.testing.assert_array_equal(result.info["first_success"], above)
    assert np.any(above > 1)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"gamma": 1.0}, r"expected gamma in \[0\.001, 0\.5\], got 1\.0"),
        ({"gamma": np.nan}, r"expected gamma in \[0\.001, 0\.5\], got nan"),
        ({"initial_norm": 0}, "expected initial_norm > 0, got 0"),
        ({"step_size": -1.0}, r"expected step_size > 0, got -1\.0"),
        ({"step_size": np.ones(3)}, r"expected step_size to be a scalar or of shape \[B\]"),
        ({"num_steps": 0}, "expected num_steps to be a whole number >= 1, got 0"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        attacks.ddn(make(), None, INPUTS, LABELS, **kwargs)
