"""DDN against a plain NumPy version of algorithm 1, exact minima, and saturation."""

import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, losses
from tests import tiny

B, D, H, K = 8, 5, 7, 4
RNG = np.random.default_rng(2)
NET = tiny.Net(RNG.normal(0, 1.5, (D, H)), RNG.normal(0, 1, (H, K)))
make, logits_of = NET.logits_fn, NET.logits
INPUTS = RNG.uniform(0.05, 0.95, (B, D)).astype(np.float32)
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


def reference(x, goal, _, sign, weights_of, *, num_steps, gamma, initial_norm, step_size):
    """Algorithm 1 for one example in float64: the least distance, and the step first seen."""

    delta, norm, best, first = np.zeros(D), initial_norm, np.inf, -1
    adversarial = False
    for k in range(num_steps):
        logits, jacobian = NET.at(x + delta)
        g = sign * weights_of(logits, goal) @ jacobian
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
    distance, first = tiny.each(
        reference, INPUTS, goals, sign=sign, weights_of=weights_of, **settings
    )
    assert np.isfinite(distance).sum() >= B - 1
    assert len(np.unique(first)) > 2
    targets = TARGETS if targeted else None
    result = tiny.in_double(
        attacks.ddn, NET, INPUTS, LABELS, targets=targets, loss=loss, **settings
    )
    np.testing.assert_allclose(result.distance, distance, rtol=1e-8)
    np.testing.assert_array_equal(result.info["first_success"], first)
    np.testing.assert_array_equal(result.queries, np.full(B, 32))


@pytest.mark.parametrize("num_steps", [100, 300])
@pytest.mark.parametrize("classes", [2, 5])
def test_the_exact_distance_of_linear_networks(classes, num_steps):
    logits_fn, inputs, logits, weights = tiny.linear_problem(60, 12, classes, low=0.3, high=0.7)
    exact = tiny.exact_distances(logits, weights, "l2").min(1)
    keep = exact > 0.03  # the radius needs 68 steps from 1 to there
    assert keep.sum() > 30
    result = attacks.ddn(logits_fn, None, inputs, logits.argmax(1), num_steps=num_steps)
    assert np.all(result.success)
    ratio = (np.asarray(result.distance) / exact)[keep]
    assert ratio.min() >= 1 - 1e-5
    assert np.median(ratio) <= 1.06
    # The gradient leads to the classes of large logits, of which the nearest need not be one.
    assert ratio.max() <= (1.06 if classes == 2 else 1.3)


def test_saturated_logits_mask_the_cross_entropy_and_not_the_default():
    def attempt(scale, **kwargs):
        return attacks.ddn(make(scale), None, INPUTS, LABELS, num_steps=100, **kwargs)

    plain = attempt(1.0)
    assert np.all(plain.success)
    assert np.all(attempt(1024.0).success)
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
        *(tiny.unbreakable, None, INPUTS, np.zeros(B, int)), num_steps=400, gamma=0.5, trace=True
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
        ({"initial_norm": 0}, "expected initial_norm > 0, got 0"),
        ({"step_size": -1.0}, r"expected step_size > 0, got -1\.0"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        attacks.ddn(make(), None, INPUTS, LABELS, **kwargs)


@pytest.mark.parametrize(
    "num_classes",
    [2, pytest.param(10, marks=pytest.mark.slow), 100, pytest.param(1000, marks=pytest.mark.slow)],
)
def test_the_boundary_of_many_linear_classes(num_classes):
    logits_fn, inputs, labels, exact = tiny.many_classes(num_classes, "l2")
    found = attacks.ddn(logits_fn, None, inputs, labels, num_steps=300)
    ratio = found.distance / exact
    assert float(ratio.min()) > 1 - 1e-4
    assert float(jnp.median(ratio)) < 1.005, ratio
    assert float(ratio.mean()) < 1.03, ratio
