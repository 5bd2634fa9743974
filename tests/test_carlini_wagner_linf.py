"""Carlini and Wagner's Linf attack against an independent NumPy version and exact distances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, nets
from tests import tiny

B, D, H, K = 6, 5, 7, 4
RNG = np.random.default_rng(5)
NET = tiny.Net(RNG.normal(0, 1.2, (D, H)), RNG.normal(0, 1, (H, K)))
make, logits_of = NET.logits_fn, NET.logits
INPUTS = RNG.uniform(0.05, 0.95, (B, D)).astype(np.float32)
INPUTS[0, :2] = [0, 1]  # on the box's faces
LABELS = logits_of(INPUTS).argmax(1)
TARGETS = np.argsort(logits_of(INPUTS), axis=1)[:, -2]
SETTINGS = {
    "num_steps": 40,
    "learning_rate": 0.02,
    "shrink": 0.9,
    "initial_const": 1e-2,
    "largest_const": 20.0,
    "const_factor": 4.0,
}


def reference(
    x,
    label,
    target,
    *,
    confidence=0.0,
    num_steps,
    learning_rate,
    shrink,
    initial_const,
    largest_const,
    const_factor,
):
    """The least Linf distance of one example, the thresholds met and the last constant."""
    goal, sign = (label, -1) if target is None else (target, 1)
    w = np.arctanh((2 * x - 1) * 0.999999)
    threshold, const, best, rounds = 1.0, initial_const, np.inf, 0
    while threshold >= 1 / 256 and const <= largest_const:
        m, v, met = np.zeros(D), np.zeros(D), False
        for step in range(num_steps):
            point = 0.5 * np.tanh(w) + 0.5
            margin, gradient = NET.margin(point, goal)
            gap = sign * margin + confidence
            distance = np.abs(point - x).max()
            if gap < 0:
                best = min(best, distance)
                if distance <= threshold:
                    met = True
                    break
            slope = np.sign(point - x) * (np.abs(point - x) > threshold)
            if gap >= 0:
                slope = slope + const * sign * gradient
            slope = slope * 0.5 * (1 - np.tanh(w) ** 2)
            m = 0.9 * m + 0.1 * slope
            v = 0.999 * v + 0.001 * slope**2
            corrected = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            w = w - learning_rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
        if met:
            rounds += 1
            threshold = shrink * min(threshold, distance)
        else:
            const *= const_factor
    return best, rounds, const


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"confidence": 0.3},
        {"targets": TARGETS},
        {"shrink": 0.7, "num_steps": 25},
        {"initial_const": 15.0, "const_factor": 2.0},
    ],
    ids=str,
)
def test_against_numpy_in_double_precision(kwargs):
    kwargs = SETTINGS | kwargs
    targets = kwargs.pop("targets", None)
    distance, rounds, const = tiny.each(reference, INPUTS, LABELS, targets, **kwargs)
    assert np.isfinite(distance).sum() >= B - 1
    assert rounds.min() >= 1
    result = tiny.in_double(
        attacks.carlini_wagner_linf, NET, INPUTS, LABELS, targets=targets, **kwargs
    )
    np.testing.assert_array_equal(result.success, np.isfinite(distance))
    np.testing.assert_allclose(result.distance, distance, rtol=1e-6)
    np.testing.assert_array_equal(result.info["rounds"], rounds)
    np.testing.assert_allclose(result.info["const"], const, rtol=1e-6)


@pytest.mark.floor
def test_the_exact_distance_of_linear_networks():
    rng = np.random.default_rng(0)
    many, size = 24, 12
    weights = rng.normal(0, 1, size)
    inputs = rng.uniform(0.3, 0.7, (many, size)).astype(np.float32)
    signed = (inputs.astype(np.float64) - 0.5) @ weights
    exact = np.abs(signed) / np.abs(weights).sum()
    labels = (signed < 0).astype(int)
    assert exact.max() < 0.3  # far from the box

    def logits_fn(x):
        first = (x - 0.5) @ jnp.asarray(weights, x.dtype)
        return jnp.stack([first, 0 * first], axis=1)

    result = attacks.carlini_wagner_linf(
        logits_fn, None, inputs, labels, num_steps=200, initial_const=0.1
    )
    assert np.all(result.success)
    keep = exact > 1 / 256  # the search ends there
    assert keep.sum() > many / 2
    ratio = (np.asarray(result.distance) / exact)[keep]
    assert ratio.min() >= 1 - 1e-5
    assert ratio.max() <= 1.12
    assert np.all(np.asarray(result.distance)[~keep] < 1.12 / 256)


def test_the_confidence_is_passed():
    result = attacks.carlini_wagner_linf(make(), None, INPUTS, LABELS, confidence=0.3, **SETTINGS)
    success = np.asarray(result.success)
    assert success.sum() >= B - 1
    excess = tiny.margins(logits_of(result.inputs), LABELS)
    assert np.all(excess[success] > 0.3 - 1e-5)


def test_the_unreachable_is_a_failure_after_all_constants():
    settings = SETTINGS | {"num_steps": 10, "initial_const": 1.0, "largest_const": 20.0}
    result = attacks.carlini_wagner_linf(
        *(tiny.unbreakable, None, INPUTS, np.zeros(B, int)), **settings
    )
    np.testing.assert_array_equal(result.inputs, INPUTS)
    assert np.all(np.isinf(result.distance))
    np.testing.assert_array_equal(result.info["const"], np.full(B, 64.0))
    # The constants 1, 4 and 16, between the clean pass and the verification.
    np.testing.assert_array_equal(result.queries, np.full(B, 1 + 3 * 10 + 1))
    np.testing.assert_array_equal(result.info["first_success"], np.full(B, -1))
    np.testing.assert_array_equal(result.info["rounds"], np.zeros(B))


def test_without_a_gradient_it_ends_at_once():
    flat = nets.callable_logits_fn(lambda x: jnp.stack([x[:, 0] * 0 + 1, x[:, 0] * 0], axis=1))
    result = attacks.carlini_wagner_linf(flat, None, INPUTS, np.zeros(B, int))
    assert not np.any(result.success)
    np.testing.assert_array_equal(result.queries, np.full(B, 3))


@pytest.mark.parametrize(
    "bad",
    [
        {"shrink": 1.0},
        {"shrink": np.nan},
        {"const_factor": 0.5},
        {"initial_const": np.nan},
        {"initial_const": 0.0},
        {"largest_const": np.inf},
    ],
    ids=str,
)
def test_traced_values_that_no_check_can_see_end_all_the_same(bad):
    settings = SETTINGS | {"num_steps": 5} | bad
    num_steps = settings.pop("num_steps")

    @jax.jit
    def attempt(settings):
        return attacks.carlini_wagner_linf(
            make(), None, INPUTS, LABELS, num_steps=num_steps, **settings
        )

    result = attempt(settings)
    assert np.all(np.isfinite(result.inputs))


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"shrink": 0.5},  # a power of it is just what the search ends below
        {"initial_const": 0.02, "largest_const": 20.0, "const_factor": 10.0},
        {"initial_const": 50.0},  # above the largest already
    ],
    ids=str,
)
def test_the_trace_has_room_for_every_step(kwargs):
    settings = SETTINGS | {"num_steps": 15} | kwargs
    attack = functools.partial(attacks.carlini_wagner_linf, **settings)
    result = attack(make(), None, INPUTS, LABELS, trace=True)
    trace = np.asarray(result.info["trace"])
    at_first = -settings["initial_const"] * tiny.margins(logits_of(INPUTS), LABELS)
    np.testing.assert_allclose(trace[:, 0], at_first, rtol=1e-3)
    used = np.isfinite(trace).sum(axis=1)
    np.testing.assert_array_equal(used, result.queries - 2)
    assert np.all(used < trace.shape[1])
    # As many steps as the cost of the attack is taken for.
    cost = attacks.cost(attack, shape=(D,), num_classes=K)
    assert cost == (trace.shape[1] + 2, trace.shape[1])
    assert cost.backward == settings["num_steps"] * (
        np.ceil(np.log(256) / -np.log(settings["shrink"]))
        + np.ceil(
            max(np.log(settings["largest_const"] / settings["initial_const"]), 0)
            / np.log(settings["const_factor"])
        )
        + 2
    )
    without = attack(make(), None, INPUTS, LABELS)
    np.testing.assert_array_equal(without.queries, result.queries)
    np.testing.assert_allclose(without.inputs, result.inputs, atol=1e-5)


def test_a_trace_needs_settings_that_are_known():
    @jax.jit
    def attempt(inputs):
        return attacks.carlini_wagner_linf(make(), None, inputs, LABELS, trace=True)

    with pytest.raises(ValueError, match=r"concrete settings, .* trace=False"):
        attempt(INPUTS)


def test_the_first_round_starts_where_it_is_told():
    plain = attacks.carlini_wagner_linf(make(), None, INPUTS, LABELS, **SETTINGS)
    same = attacks.carlini_wagner_linf(make(), None, INPUTS, LABELS, init=INPUTS, **SETTINGS)
    jax.tree.map(np.testing.assert_array_equal, same, plain)
    # A start that fools the network is a success already, at any constant.
    found = np.asarray(plain.success)
    warm = attacks.carlini_wagner_linf(
        make(), None, INPUTS[found], LABELS[found], init=plain.inputs[found], **SETTINGS
    )
    assert np.all(warm.info["rounds"] >= 1)
    assert np.all(warm.distance <= plain.distance[found] * (1 + 1e-4))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"confidence": -1.0}, r"expected confidence >= 0, got -1\.0"),
        ({"learning_rate": 0.0}, r"expected learning_rate > 0, got 0\.0"),
        ({"shrink": 1.0}, r"expected shrink in \[0\.01, 0\.99\], got 1\.0"),
        ({"initial_const": 0}, "expected initial_const > 0, got 0"),
        ({"const_factor": 1}, r"expected const_factor in \[1\.01, 1e\+06\], got 1"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        attacks.carlini_wagner_linf(make(), None, INPUTS, LABELS, **kwargs)
