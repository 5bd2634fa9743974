"""The boundary attack against a plain NumPy version of it, and exact optima of linear models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, nets
from tests import tiny

B, D, H, K = 6, 12, 9, 4
RNG = np.random.default_rng(4)
SMOOTH = tiny.Net(RNG.normal(0, 1, (D, H)), RNG.normal(0, 1, (H, K)), np.zeros((D, K)), np.zeros(K))
LINEAR = RNG.normal(0, 1, (D, K))
STRAIGHT = tiny.Net(np.zeros((D, H)), np.zeros((H, K)), LINEAR, -0.5 * LINEAR.sum(0))
INPUTS = RNG.uniform(0.35, 0.65, (B, D)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(5), B)
NUM_QUERIES = 1500


def run(net, inputs):
    labels = net.logits(inputs).argmax(1)
    settings = {"num_queries": NUM_QUERIES, "orthogonal_step": 0.5, "trace": True}
    result = attacks.boundary(net.logits_fn(), KEYS, inputs, labels, **settings)
    return jax.tree.map(np.asarray, result)


def reference(net, x, key, num_queries):
    """The walk of one example in float64: the distance after each query, and all step sizes."""
    label = net.logits(x).argmax()
    distances = [np.inf]  # of the clean input
    best, delta, epsilon = None, 0.5, 0.01

    def ask(candidate):
        nonlocal best
        adversarial = net.logits(candidate).argmax() != label
        if adversarial and np.linalg.norm(candidate - x) < min(distances) * (1 - 1e-5):
            best = candidate
        distances.append(np.inf if best is None else np.linalg.norm(best - x))
        return adversarial

    draw = 0
    while best is None:
        start_key = jax.random.fold_in(jax.random.fold_in(key, 0), draw)
        *noise, first, second = np.asarray(jax.random.uniform(start_key, (D + 2,)), np.float64)
        first, second = (first, second) if draw % 2 else (0, 1)
        ask(first + (second - first) * np.array(noise))
        draw += 1
    start, low, high = best, 0.0, 1.0
    for _ in range(10):
        middle = (low + high) / 2
        low, high = (low, middle) if ask(x + middle * (start - x)) else (middle, high)

    checks, moves, step, sizes = [], [], 0, []
    while len(distances) < num_queries:
        move_key = jax.random.fold_in(jax.random.fold_in(key, 1), step)
        eta = np.asarray(jax.random.normal(move_key, (D,)), np.float64)
        distance = np.linalg.norm(best - x)
        unit = (best - x) / distance
        eta -= (eta @ unit) * unit
        eta *= delta * distance / np.linalg.norm(eta)
        sphere = np.clip(x + (best - x + eta) / np.sqrt(1 + delta**2), 0, 1)
        if step % 10 == 9:
            checks.append(ask(sphere))
        else:
            length = np.linalg.norm(sphere - x)
            share = np.clip((1 - epsilon) * distance / length, 0, 1)
            moves.append(ask(x + share * (sphere - x)))
        if len(checks) == 10:
            factor = {True: 1.5, False: 1.0}[np.mean(checks) > 0.5]
            factor = 1 / 1.5 if np.mean(checks) < 0.2 else factor
            delta, epsilon, checks = delta * factor, epsilon * factor, []
        if len(moves) == 30:
            factor = {True: 1.5, False: 1.0}[np.mean(moves) > 0.25]
            epsilon, moves = epsilon / 1.5 if np.mean(moves) < 0.1 else epsilon * factor, []
        step += 1
        sizes.append((delta, epsilon))
    return np.array(distances), np.array(sizes)


@pytest.mark.slow
def test_the_walk_is_that_of_a_plain_version():
    found = run(SMOOTH, INPUTS)
    assert np.all(found.success)
    num_queries = 700
    for row in (0, 1, 2):
        distances, sizes = reference(SMOOTH, np.float64(INPUTS[row]), KEYS[row], num_queries)
        trace = found.info["trace"][row, : num_queries - 1]
        np.testing.assert_allclose(trace, distances[1:], rtol=1e-3)
        # Both steps adapted.
        assert np.all([len(np.unique(column)) >= 3 for column in sizes.T])


@pytest.mark.parametrize("offset", [0.0, 0.25])
def test_linear_models_have_exact_distances(offset):
    # With the offset the inputs are at the box's edge, and the box may cost some distance.
    inputs = np.clip(INPUTS - offset, 0.0, 1.0)
    exact = tiny.exact_distances(STRAIGHT.logits(inputs), LINEAR, "l2").min(1)
    result = run(STRAIGHT, inputs)
    assert np.all(result.success)
    ratio = result.distance / exact
    assert ratio.min() > 0.9999
    assert np.median(ratio) <= 1.02


def test_a_walk_that_has_converged_ends_before_its_budget():
    # In one dimension the boundary is one point.
    logits_fn = nets.callable_logits_fn(lambda w, x: x @ w, jnp.array([[1.0, -1.0]]))
    inputs = jnp.array([[0.25], [0.75]]) - 0.5
    result = attacks.boundary(
        logits_fn, KEYS[:2], inputs, np.array([1, 0]), bounds=(-1.0, 1.0), num_queries=3000
    )
    assert np.all(result.success)
    np.testing.assert_allclose(result.distance, 0.25, rtol=1e-3)
    assert np.all(result.queries < 2900)
