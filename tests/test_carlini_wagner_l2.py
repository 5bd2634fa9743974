"""Carlini and Wagner's L2 attack against an independent implementation of the released algorithm.

The reference below follows `l2_attack.py` of nn_robust_attacks, one example at a time in float64,
with the departures that `jdistill` makes on purpose:

* the distance is to the input itself, not to tanh(arctanh(0.999999 x)), which differs on the faces;
* other classes are masked with -inf instead of -10000;
* the early end of a search is decided by the example's own loss, not by the batch's sum;
* the point at which a search ends early still counts, instead of being thrown away;
* a failure returns the input itself with distance inf, not zeros.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks
from jdistill.attacks._core.constant_search import to_box
from tests import tiny

B, D, H, K = 6, 5, 7, 4
RNG = np.random.default_rng(5)
NET = tiny.Net(RNG.normal(0, 1.2, (D, H)), RNG.normal(0, 1, (H, K)))
make, logits_of = NET.logits_fn, NET.logits
INPUTS = RNG.uniform(0.05, 0.95, (B, D)).astype(np.float32)
INPUTS[0, :2] = [0, 1]  # on the box's faces
LABELS = logits_of(INPUTS).argmax(1)
TARGETS = np.argsort(logits_of(INPUTS), axis=1)[:, -2]
SETTINGS = {"num_searches": 6, "num_steps": 60, "learning_rate": 0.03, "initial_const": 0.01}


def reference(
    x,
    label,
    target,
    *,
    confidence,
    num_searches,
    num_steps,
    learning_rate,
    initial_const,
    abort_early=True,
    scale=1.0,
):
    """The best squared distance and its constant, or (inf, nan)."""
    goal, sign = (label, -1) if target is None else (target, 1)
    start = np.arctanh((2 * x - 1) * 0.999999)
    lower, upper, const = 0.0, 1e10, initial_const
    best, best_const = np.inf, np.nan
    for search in range(num_searches):
        if num_searches >= 10 and search == num_searches - 1:
            const = upper
        delta, m, v = np.zeros(D), np.zeros(D), np.zeros(D)
        succeeded, previous = False, np.inf
        for step in range(num_steps):
            tanh = np.tanh(start + delta)
            point = 0.5 * tanh + 0.5
            margin, gradient = NET.margin(point, goal)
            gap = sign * scale * margin  # below 0: the goal is passed
            squared = np.sum((point - x) ** 2)
            loss = squared + const * max(0.0, gap + confidence)
            if gap + confidence < 0:
                succeeded = True
                if squared < best:
                    best, best_const = squared, const
            if abort_early and step % max(num_steps // 10, 1) == 0:
                if loss > 0.9999 * previous:
                    break
                previous = loss
            slope = 2 * (point - x)
            if gap + confidence > 0:
                slope = slope + const * sign * scale * gradient
            slope = slope * 0.5 * (1 - tanh**2)
            m = 0.9 * m + 0.1 * slope
            v = 0.999 * v + 0.001 * slope**2
            corrected = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            delta = delta - learning_rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
        if succeeded:
            upper = min(upper, const)
        else:
            lower = max(lower, const)
        const = (lower + upper) / 2 if upper < 1e9 else const * 10
    return best, best_const


def references(*, targets=None, **kwargs):
    squared, const = tiny.each(reference, INPUTS, LABELS, targets, **kwargs)
    return np.sqrt(squared), const


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"confidence": 0.3},
        {"targets": TARGETS},
        {"targets": TARGETS, "confidence": 0.3},
        {"num_searches": 10, "num_steps": 20},
        {"abort_early": False},
        {"scale": 1e3},
        {"initial_const": 100.0, "num_searches": 4},
    ],
    ids=str,
)
def test_against_the_reference_in_double_precision(kwargs):
    kwargs = SETTINGS | {"confidence": 0.0} | kwargs
    distance, const = references(**kwargs)
    result = tiny.in_double(attacks.carlini_wagner_l2, NET, INPUTS, LABELS, **kwargs)
    np.testing.assert_array_equal(result.success, np.isfinite(distance))
    assert result.success.sum() >= B - 2
    np.testing.assert_allclose(result.distance, distance, rtol=1e-6)
    np.testing.assert_allclose(result.info["const"], const, rtol=1e-6)


@pytest.mark.floor
def test_against_the_reference_in_single_precision():
    distance, _ = references(confidence=0.0, **SETTINGS)
    result = attacks.carlini_wagner_l2(make(), None, INPUTS, LABELS, **SETTINGS)
    np.testing.assert_allclose(result.distance, distance, rtol=1e-3)


def test_the_confidence_is_passed():
    plain = attacks.carlini_wagner_l2(make(), None, INPUTS, LABELS, **SETTINGS)
    for confidence in (0.2, 0.5):
        result = attacks.carlini_wagner_l2(
            make(), None, INPUTS, LABELS, confidence=confidence, **SETTINGS
        )
        success = np.asarray(result.success)
        assert success.sum() >= B - 1
        excess = tiny.margins(logits_of(result.inputs), LABELS)
        assert np.all(excess[success] > confidence - 1e-5)
        assert np.all(result.distance > plain.distance)


def test_the_unreachable_is_a_failure_and_not_zeros():
    result = attacks.carlini_wagner_l2(
        *(tiny.unbreakable, None, INPUTS, np.zeros(B, int)), num_searches=3, num_steps=10
    )
    np.testing.assert_array_equal(result.inputs, INPUTS)
    assert not np.any(result.success)
    assert np.all(np.isinf(result.distance))
    assert np.all(np.isnan(result.info["const"]))
    np.testing.assert_array_equal(result.info["first_success"], np.full(B, -1))


@pytest.mark.parametrize(("low", "high"), [(-1.55, 2.46), (0.1, 0.7)])
def test_the_box_holds_to_the_last_bit(low, high):
    bounds = jnp.float32(low), jnp.float32(high)  # sums of these round, out of the box too
    with jax.disable_jit():  # compiled, tanh may end a bit below 1
        points = to_box(jnp.array([-100.0, 0.0, 100.0]), bounds)
    assert np.all((points >= bounds[0]) & (points <= bounds[1]))
    np.testing.assert_allclose(points, [low, (low + high) / 2, high], rtol=1e-6)


def test_distilled_logits_of_any_scale_stand_in_nobodys_way():
    distance, _ = references(confidence=0.0, **SETTINGS)
    for scale in (1e-2, 1e4):
        result = attacks.carlini_wagner_l2(
            make(scale), None, INPUTS, LABELS, **SETTINGS | {"num_searches": 9}
        )
        assert np.all(result.success)
        # Not equal: bisection from a constant that was far too large ends above the best one.
        assert np.all(result.distance < 2 * distance)


def test_the_trace_holds_the_loss_of_every_step():
    kwargs = {"num_searches": 2, "num_steps": 20, "initial_const": 1.0, "abort_early": False}
    result = attacks.carlini_wagner_l2(make(), None, INPUTS, LABELS, trace=True, **kwargs)
    loss = np.asarray(result.info["trace"])
    assert loss.shape == (B, 40)
    margin = -tiny.margins(logits_of(INPUTS), LABELS)
    # Each search begins at the input, the second with ten times the constant or with half of it.
    np.testing.assert_allclose(loss[:, 0], margin, rtol=1e-3)
    first = np.asarray(result.info["first_success"])
    second = np.where((first >= 1) & (first <= 20), 0.5, 10)
    assert len(np.unique(second)) == 2
    np.testing.assert_allclose(loss[:, 20], second * margin, rtol=1e-3)
    assert np.all(np.isfinite(loss))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"confidence": -1.0}, r"expected confidence >= 0, got -1\.0"),
        ({"learning_rate": 0.0}, r"expected learning_rate > 0, got 0\.0"),
        ({"initial_const": 0}, "expected initial_const > 0, got 0"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        attacks.carlini_wagner_l2(make(), None, INPUTS, LABELS, **kwargs)


@pytest.mark.floor
def test_each_search_starts_where_it_is_told():
    labels = np.asarray(LABELS)
    plain = attacks.carlini_wagner_l2(make(), None, INPUTS, labels, **SETTINGS)
    same = attacks.carlini_wagner_l2(make(), None, INPUTS, labels, init=INPUTS, **SETTINGS)
    np.testing.assert_allclose(same.distance, plain.distance, rtol=1e-4)
    # A start that fools the network is a success already, at any constant.
    found = np.asarray(plain.success)
    warm = attacks.carlini_wagner_l2(
        make(), None, INPUTS[found], labels[found], init=plain.inputs[found], **SETTINGS
    )
    assert np.all(warm.success)
    np.testing.assert_array_equal(warm.info["first_success"], np.ones(found.sum()))
