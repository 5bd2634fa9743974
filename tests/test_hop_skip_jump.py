"""HopSkipJump against a plain NumPy version of it, and exact optima of linear models."""

import functools

import jax
import numpy as np
import pytest

from jdistill import attacks
from tests import tiny

B, D, H, K = 6, 12, 9, 4
RNG = np.random.default_rng(6)
SMOOTH = tiny.Net(RNG.normal(0, 1, (D, H)), RNG.normal(0, 1, (H, K)), np.zeros((D, K)), np.zeros(K))
LINEAR = RNG.normal(0, 1, (D, K))
STRAIGHT = tiny.Net(np.zeros((D, H)), np.zeros((H, K)), LINEAR, -0.5 * LINEAR.sum(0))
INPUTS = RNG.uniform(0.35, 0.65, (B, D)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(6), B)
NUM_QUERIES, NUM_SAMPLES, MAX_SAMPLES = 1500, 20, 50
NORMS = {"l2": 2, "linf": np.inf}
norms = pytest.mark.parametrize("norm", NORMS)


@functools.cache
def run(norm, name):
    net = {"smooth": SMOOTH, "straight": STRAIGHT}[name]
    result = attacks.hop_skip_jump(
        net.logits_fn(),
        KEYS,
        INPUTS,
        net.logits(INPUTS).argmax(1),
        norm=norm,
        num_queries=NUM_QUERIES,
        num_samples=NUM_SAMPLES,
        max_samples=MAX_SAMPLES,
        gamma=0.1,
        trace=True,
    )
    return jax.tree.map(np.asarray, result)


class Budget(Exception):
    """No query is left."""


def reference(net, x, key, norm, num_queries, gamma=0.1):
    """Algorithm 2 for one example in float64: the least distance after each query, the rounds."""
    label = net.logits(x).argmax()
    order = NORMS[norm]
    distances, rounds = [np.inf], 0
    theta = gamma / D ** {"l2": 1.5, "linf": 2}[norm]

    def ask(candidate):
        if len(distances) == num_queries:
            raise Budget
        adversarial = net.logits(candidate).argmax() != label
        distance = np.linalg.norm(candidate - x, order) if adversarial else np.inf
        distances.append(min(distance, distances[-1]))
        return adversarial

    def bisect(far):
        low, high, point = 0.0, 1.0, far
        while high - low > theta:
            middle = (low + high) / 2
            if norm == "l2":
                candidate = (1 - middle) * x + middle * far
            else:
                limit = middle * np.abs(far - x).max()
                candidate = np.clip(far, x - limit, x + limit)
            if ask(candidate):
                high, point = middle, candidate
            else:
                low = middle
        return point

    def noise(round_, sample):
        folded = jax.random.fold_in(jax.random.fold_in(key, 1), round_)
        folded = jax.random.fold_in(folded, sample)
        if norm == "l2":
            draw = np.asarray(jax.random.normal(folded, (D,)), np.float64)
        else:
            draw = 2 * np.asarray(jax.random.uniform(folded, (D,)), np.float64) - 1
        return draw / np.linalg.norm(draw)

    try:
        draw = 0
        while True:
            folded = jax.random.fold_in(jax.random.fold_in(key, 0), draw)
            *draws, first, second = np.asarray(jax.random.uniform(folded, (D + 2,)), np.float64)
            first, second = (first, second) if draw % 2 else (0, 1)
            start = first + (second - first) * np.array(draws)
            if ask(start):
                break
            draw += 1
        while True:
            point = bisect(start)
            rounds += 1
            distance = np.linalg.norm(point - x, order)
            delta = 0.1 if rounds == 1 else gamma * distance / D
            samples, answers = [], []
            for sample in range(min(int(NUM_SAMPLES * np.sqrt(rounds)), MAX_SAMPLES)):
                candidate = np.clip(point + delta * noise(rounds, sample), 0, 1)
                samples.append((candidate - point) / delta)
                answers.append(1.0 if ask(candidate) else -1.0)
            answers = np.array(answers)
            if abs(answers.mean()) < 1:
                answers = answers - answers.mean()
            gradient = answers @ np.array(samples)
            step = np.sign(gradient) if norm == "linf" else gradient / np.linalg.norm(gradient)
            length = distance / np.sqrt(rounds)
            while not ask(np.clip(point + length * step, 0, 1)):
                length /= 2
            start = np.clip(point + length * step, 0, 1)
    except Budget:
        return np.array(distances), rounds


@norms
def test_the_rounds_are_those_of_a_plain_version(norm):
    found = run(norm, "smooth")
    assert np.all(found.success)
    num_queries = 320  # in hundreds more, rounding decides one sample and all that follows
    for row in (0, 1, 2):
        distances, rounds = reference(SMOOTH, np.float64(INPUTS[row]), KEYS[row], norm, num_queries)
        trace = found.info["trace"][row, : num_queries - 1]
        np.testing.assert_allclose(trace, distances[1:], rtol=1e-3)
        assert 4 < rounds < found.info["rounds"][row]


@norms
def test_linear_models_have_exact_distances(norm):
    exact = tiny.exact_distances(STRAIGHT.logits(INPUTS), LINEAR, norm).min(1)
    result = run(norm, "straight")
    assert np.all(result.success)
    ratio = result.distance / exact
    assert ratio.min() > 0.9999
    assert np.median(ratio) <= 1.03
