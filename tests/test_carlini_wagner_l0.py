"""Carlini and Wagner's L0 attack against an independent NumPy version and the greedy minimum."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks
from tests import tiny

B, D, H, K = 6, 14, 7, 4
RNG = np.random.default_rng(5)
NET = tiny.Net(RNG.normal(0, 0.8, (D, H)), RNG.normal(0, 1, (H, K)))
make, logits_of = NET.logits_fn, NET.logits
INPUTS = RNG.uniform(0.1, 0.9, (B, D)).astype(np.float32)
LABELS = logits_of(INPUTS).argmax(1)
TARGETS = np.argsort(logits_of(INPUTS), axis=1)[:, -2]
SETTINGS = {
    "num_steps": 60,
    "learning_rate": 0.05,
    "initial_const": 0.1,
    "largest_const": 1e3,
    "const_factor": 5.0,
}


def reference(
    x,
    label,
    target,
    *,
    confidence=0.0,
    num_steps,
    learning_rate,
    initial_const,
    largest_const,
    const_factor,
):
    """The fewest changed features of one example, the successful rounds and the last constant."""
    goal, sign = (label, -1) if target is None else (target, 1)
    w = np.arctanh((2 * x - 1) * 0.999999)
    free, const, best, rounds = np.ones(D, bool), initial_const, np.inf, 0
    while free.any() and const <= largest_const:
        m, v, met = np.zeros(D), np.zeros(D), False
        for step in range(num_steps):
            point = np.where(free, 0.5 * np.tanh(w) + 0.5, x)
            margin, gradient = NET.margin(point, goal)
            uphill = sign * gradient
            if sign * margin + confidence < 0:
                met, best = True, min(best, np.sum(point != x))
                break
            slope = (2 * (point - x) + const * uphill) * free * 0.5 * (1 - np.tanh(w) ** 2)
            m = 0.9 * m + 0.1 * slope
            v = 0.999 * v + 0.001 * slope**2
            corrected = m / (1 - 0.9 ** (step + 1)), v / (1 - 0.999 ** (step + 1))
            w = w - learning_rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
        if not met:
            const *= const_factor
            continue
        rounds += 1
        effect = np.abs(uphill * (point - x))
        order = [i for i in np.argsort(effect) if free[i]]
        for position, i in enumerate(order):
            small = position < 0.3 * np.sqrt(len(order)) - 1 + 1e-9
            if position == 0 or (small and effect[i] <= 0.01 * effect.sum()):
                free[i] = False
    return best, rounds, const


@pytest.mark.parametrize(
    "kwargs", [{}, {"confidence": 0.3}, {"targets": TARGETS}, {"initial_const": 10.0}], ids=str
)
def test_against_numpy_in_double_precision(kwargs):
    kwargs = SETTINGS | kwargs
    targets = kwargs.pop("targets", None)
    distance, rounds, const = tiny.each(reference, INPUTS, LABELS, targets, **kwargs)
    assert np.isfinite(distance).sum() >= B - 1
    assert rounds.max() > 5
    result = tiny.in_double(
        attacks.carlini_wagner_l0, NET, INPUTS, LABELS, targets=targets, **kwargs
    )
    np.testing.assert_array_equal(result.distance, distance)
    np.testing.assert_array_equal(result.info["rounds"], rounds)
    np.testing.assert_allclose(result.info["const"], const, rtol=1e-6)


def greedy(weights, inputs, gaps):
    """The least number of pixels for two classes: the most effective first, to the box's face."""
    room = np.where(weights > 0, 1 - inputs, inputs)
    effect = (room * np.abs(weights)).reshape(len(inputs), -1, weights.shape[-1]).sum(2)
    gains = np.cumsum(-np.sort(-effect, axis=1), axis=1)
    return 1 + np.sum(gains <= gaps[:, None], axis=1)


def linear_problem(shape, seed):
    """A linear network of two classes, its weights, inputs of class 0 and their gaps."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(0, 1, shape)
    inputs = rng.uniform(0.2, 0.8, (12, *shape)).astype(np.float32)
    axes = tuple(range(1, inputs.ndim))
    far = weights.size / 15
    signed = np.sum((inputs.astype(np.float64) - 0.5) * weights, axis=axes)
    inputs[signed > 0] = 1 - inputs[signed > 0]
    gaps = -np.sum((inputs.astype(np.float64) - 0.5) * weights, axis=axes) + far

    def logits_fn(x):
        second = jnp.sum((x - 0.5) * jnp.asarray(weights[None], x.dtype), axis=axes) - far
        return jnp.stack([0 * second, second], axis=1)

    return logits_fn, weights, inputs, gaps


@pytest.mark.floor
@pytest.mark.parametrize(
    ("shape", "channels"), [((20,), 1), ((4, 5, 1), 1), ((4, 5, 3), 3)], ids=str
)
def test_within_one_of_greedy_on_linear_networks(shape, channels):
    logits_fn, weights, inputs, gaps = linear_problem(shape, seed=1)
    by_pixel = weights.reshape(-1, channels)
    exact = greedy(by_pixel, inputs.reshape(len(inputs), -1, channels), gaps)
    assert len(np.unique(exact)) > 1
    assert exact.max() > 2
    result = attacks.carlini_wagner_l0(
        logits_fn,
        None,
        inputs,
        np.zeros(len(inputs), int),
        num_steps=200,
        learning_rate=0.05,
        initial_const=0.1,
        const_factor=10.0,
    )
    assert np.all(result.success)
    differs = (np.asarray(result.inputs) != inputs).reshape(len(inputs), -1, channels)
    np.testing.assert_array_equal(result.distance, differs.any(2).sum(1))
    assert np.all(result.distance >= exact)
    assert np.all(result.distance <= exact + 1)


def test_a_pixel_is_a_position_of_an_image_only():
    logits_fn, _, inputs, _ = linear_problem((4, 5, 3), seed=1)
    labels = np.zeros(len(inputs), int)
    settings = SETTINGS | {"num_steps": 100}
    image = attacks.carlini_wagner_l0(logits_fn, None, inputs, labels, **settings)
    flat = attacks.carlini_wagner_l0(
        lambda x: logits_fn(x.reshape(-1, 4, 5, 3)),
        None,
        inputs.reshape(len(inputs), 60),
        labels,
        **settings,
    )
    # Fewer positions than entries, with more entries in them.
    assert np.all(image.distance <= flat.distance)
    assert np.mean(image.distance) < 0.8 * np.mean(flat.distance)
    entries = (np.asarray(image.inputs) != inputs).reshape(len(inputs), -1).sum(1)
    assert np.all(entries >= flat.distance)


def test_the_unreachable_is_a_failure_after_all_constants():
    settings = SETTINGS | {"num_steps": 10, "initial_const": 10.0, "largest_const": 300.0}
    result = attacks.carlini_wagner_l0(
        *(tiny.unbreakable, None, INPUTS, np.zeros(B, int)), **settings
    )
    np.testing.assert_array_equal(result.inputs, INPUTS)
    assert np.all(np.isinf(result.distance))
    # The constants 10, 50 and 250, between the clean pass and the verification.
    np.testing.assert_array_equal(result.queries, np.full(B, 1 + 3 * 10 + 1))
    np.testing.assert_array_equal(result.info["rounds"], np.zeros(B))


def test_inputs_without_a_say_are_left_alone():
    def first_two(x):
        return jnp.stack([x[:, 0] + x[:, 1], 0 * x[:, 0] + 0.6], axis=1)

    inputs = np.full((2, D), 0.4, np.float32)
    inputs[1, 1] = 0.55
    settings = SETTINGS | {"num_steps": 100}
    result = attacks.carlini_wagner_l0(first_two, None, inputs, np.zeros(2, int), **settings)
    np.testing.assert_array_equal(result.distance, [1, 1])
    assert np.all(np.asarray(result.inputs)[:, 2:] == inputs[:, 2:])


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"initial_const": 0.1, "largest_const": 100.0, "const_factor": 10.0},
        {"initial_const": 1e4},  # above the largest already
    ],
    ids=str,
)
def test_the_trace_has_room_for_every_step(kwargs):
    settings = SETTINGS | {"num_steps": 15} | kwargs
    attack = functools.partial(attacks.carlini_wagner_l0, **settings)
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
        D
        + np.ceil(
            max(np.log(settings["largest_const"] / settings["initial_const"]), 0)
            / np.log(settings["const_factor"])
        )
        + 1
    )
    without = attack(make(), None, INPUTS, LABELS)
    np.testing.assert_array_equal(without.queries, result.queries)
    np.testing.assert_allclose(without.inputs, result.inputs, atol=1e-5)


def test_a_trace_needs_settings_that_are_known():
    @jax.jit
    def attempt(inputs):
        return attacks.carlini_wagner_l0(make(), None, inputs, LABELS, trace=True)

    with pytest.raises(ValueError, match=r"concrete settings, .* trace=False"):
        attempt(INPUTS)


def test_the_first_round_starts_where_it_is_told():
    plain = attacks.carlini_wagner_l0(make(), None, INPUTS, LABELS, **SETTINGS)
    same = attacks.carlini_wagner_l0(make(), None, INPUTS, LABELS, init=INPUTS, **SETTINGS)
    jax.tree.map(np.testing.assert_array_equal, same, plain)
    # A start that fools the network is a success already, at any constant.
    found = np.asarray(plain.success)
    warm = attacks.carlini_wagner_l0(
        make(), None, INPUTS[found], LABELS[found], init=plain.inputs[found], **SETTINGS
    )
    assert np.all(warm.info["rounds"] >= 1)
    assert np.all(warm.distance <= plain.distance[found] * (1 + 1e-4))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"learning_rate": -0.1}, r"expected learning_rate > 0, got -0\.1"),
        ({"initial_const": 0}, "expected initial_const > 0, got 0"),
        ({"largest_const": 0}, "expected largest_const > 0, got 0"),
        ({"const_factor": 1}, r"expected const_factor in \[1\.01, 1e\+06\], got 1"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        attacks.carlini_wagner_l0(make(), None, INPUTS, LABELS, **kwargs)
