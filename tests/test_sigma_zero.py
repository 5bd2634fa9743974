"""σ-zero against its algorithm in NumPy, and what its departures from the paper are for."""

import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks
from tests import tiny

B, D, H, K = 9, 12, 14, 5
RNG = np.random.default_rng(5)
NET = tiny.Net(RNG.normal(0, 0.5, (D, H)), RNG.normal(0, 1, (H, K)))
POOL = RNG.uniform(0.1, 0.9, (300, D)).astype(np.float32)
SURE = tiny.margins(NET.logits(POOL), NET.logits(POOL).argmax(1))
INPUTS = POOL[np.argsort(SURE)[:B]]  # far from any boundary
LABELS = NET.logits(INPUTS).argmax(1)
TARGETS = (LABELS + 1) % K


def reference(
    x, label, target=None, *, num_steps=60, sigma=1e-3, threshold=0.3, change=0.01, paper=None
):
    """One example, step by step: the fewest changed entries, and when the first was found.

    With `paper`, a scale of the logits, the steps are the paper's.
    """
    goal, sign = (label, 1) if target is None else (target, -1)

    def look(point):
        gain, gradient = NET.margin(point, goal)
        return sign * gain > 0, sign * gradient

    momentum = 0.6 if paper is None else 0.9
    delta, (mean, square) = np.zeros(D), np.zeros((2, D))
    adversarial, gradient = look(x)
    fewest, first = np.inf, -1
    for step in range(num_steps):
        share = 0.1 + 0.9 * (1 + np.cos(np.pi * step / num_steps)) / 2
        unit = gradient / np.abs(gradient).max()
        pull = 2 * delta * sigma / (delta**2 + sigma) ** 2
        if paper is not None:
            down = pull / D - (0 if adversarial else paper * gradient)
        elif adversarial:
            worth = np.maximum(unit * delta, 0)
            worth = worth / worth.max() if worth.max() > 0 else worth
            down = pull * (1 - worth)
        else:
            down = -unit
        down = down / np.abs(down).max() if np.any(down) else down
        mean, square = momentum * mean + (1 - momentum) * down, 0.999 * square + 0.001 * down**2
        corrected = square / (1 - 0.999 ** (step + 1))
        update = mean / (1 - momentum ** (step + 1)) / (np.sqrt(corrected) + 1e-8)
        delta = np.clip(x + delta - share * update, 0, 1) - x
        threshold = np.clip(threshold + (share if adversarial else -share) * change, 0, 1)
        delta[np.abs(delta) < threshold] = 0
        adversarial, gradient = look(x + delta)
        if adversarial:
            fewest = min(fewest, np.count_nonzero(delta))
            first = step + 1 if first < 0 else first
    return fewest, first


@pytest.mark.parametrize("targets", [None, TARGETS], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("num_steps", [20, 60])
def test_the_algorithm_step_by_step(targets, num_steps):
    result = tiny.in_double(
        attacks.sigma_zero, NET, INPUTS, LABELS, targets=targets, num_steps=num_steps
    )
    fewest, first = tiny.each(reference, INPUTS, LABELS, targets, num_steps=num_steps)
    np.testing.assert_array_equal(result.distance, fewest)
    np.testing.assert_array_equal(result.info["first_success"], first)
    assert result.success.mean() > 0.5
    assert len(set(result.distance[result.success])) > 1


def test_the_settings_are_those_of_the_algorithm():
    settings = {"sigma": 1e-2, "threshold": 0.1}
    result = tiny.in_double(
        attacks.sigma_zero, NET, INPUTS, LABELS, num_steps=40, threshold_step=0.05, **settings
    )
    fewest, first = tiny.each(reference, INPUTS, LABELS, num_steps=40, change=0.05, **settings)
    np.testing.assert_array_equal(result.distance, fewest)
    np.testing.assert_array_equal(result.info["first_success"], first)


def test_fewer_entries_than_the_paper_and_no_scale_of_the_logits_decides():
    settings = {"num_steps": 40}
    ours = tiny.in_double(attacks.sigma_zero, NET, INPUTS, LABELS, **settings)
    published = tiny.each(reference, INPUTS, LABELS, paper=1.0, **settings)[0]
    small = tiny.each(reference, INPUTS, LABELS, paper=1e-4, **settings)[0]
    assert np.all(ours.distance <= published)
    assert ours.distance.mean() < published.mean()
    # There the smooth norm outweighs the hinge of small logits.
    assert small.mean() > 1.3 * published.mean()
    scaled = tiny.in_double(attacks.sigma_zero, NET, INPUTS, LABELS, scale=2.0**-13, **settings)
    np.testing.assert_array_equal(scaled.inputs, ours.inputs)


def test_it_comes_back_from_where_the_logits_are_not_finite():
    # The first step changes all entries, which is more than this network bears.
    model, inputs, labels = NET.logits_fn(), INPUTS[:1], LABELS[:1]

    def network(x):
        far = jnp.sum(jnp.abs(x - inputs), axis=1, keepdims=True) > 3.0
        return jnp.where(far, jnp.nan, model(x))

    result = attacks.sigma_zero(network, None, inputs, labels, num_steps=100, trace=True)
    assert np.isnan(result.info["trace"][0, 0])
    assert bool(result.success[0])
    assert result.distance[0] == 1


def test_the_box_scales():
    # Another box: the same entries, as thresholds and steps are in units of its width.
    plain = tiny.in_double(attacks.sigma_zero, NET, INPUTS, LABELS, num_steps=40)
    with tiny.double_precision():
        model = NET.logits_fn(1.0, np.float64)
        wide = attacks.sigma_zero(
            lambda x: model(x / 256 - 1),
            None,
            256 * (INPUTS.astype(np.float64) + 1),
            LABELS,
            num_steps=40,
            bounds=(256.0, 512.0),
        )
    np.testing.assert_array_equal(wide.distance, plain.distance)
    moved = np.asarray(wide.inputs) / 256 - 1
    np.testing.assert_allclose(moved, plain.inputs, atol=1e-6)


def test_on_a_linear_network_the_entries_of_largest_effect_change():
    logits_fn, inputs, logits, weights = tiny.linear_problem(num_classes=2)
    labels = logits.argmax(1)
    result = attacks.sigma_zero(logits_fn, None, inputs, labels, num_steps=300)
    slopes = weights.T[1 - labels] - weights.T[labels]
    room = np.where(slopes > 0, 1 - inputs, inputs)
    effects = np.cumsum(-np.sort(-np.abs(slopes) * room, axis=1), axis=1)
    exact = 1 + np.sum(effects <= np.ptp(logits, axis=1)[:, None], axis=1)
    assert np.all(np.asarray(result.success))
    assert np.all(result.distance >= exact)
    assert np.mean(result.distance <= exact + 1) > 0.9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sigma": 0.0}, "expected sigma > 0, got 0.0"),
        ({"step_size": 0.0}, "expected step_size > 0, got 0.0"),
        ({"threshold": 1.1}, r"expected threshold in \[0, 1\].*, got 1.1"),
        ({"threshold_step": -0.1}, r"expected threshold_step in \[0, 1\].*, got -0.1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        attacks.sigma_zero(NET.logits_fn(), None, INPUTS, LABELS, **settings)
