"""What holds for every attack that asks for decisions only: `boundary` and `hop_skip_jump`."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, nets

B, D, H, K = 5, 8, 7, 4
RNG = np.random.default_rng(3)
WEIGHTS = {
    "first": RNG.normal(0, 1.5, (D, H)).astype(np.float32),
    "second": RNG.normal(0, 1, (H, K)).astype(np.float32),
    "bias": np.zeros(K, np.float32),
    "scale": np.float32(1),
    "form": np.int32(0),  # what is made of the logits, a row of `forms`
}
NUM_QUERIES, NUM_STARTS = 160, 20
KEYS = jax.random.split(jax.random.key(0), B)
COMMON = {"num_queries": NUM_QUERIES, "num_starts": NUM_STARTS, "trace": True}
CASES = {
    "boundary": functools.partial(attacks.boundary, **COMMON),
    "hop_skip_jump-l2": functools.partial(
        attacks.hop_skip_jump, norm="l2", num_samples=20, **COMMON
    ),
    "hop_skip_jump-linf": functools.partial(
        attacks.hop_skip_jump, norm="linf", num_samples=20, **COMMON
    ),
}
all_cases = pytest.mark.parametrize("attack", CASES.values(), ids=CASES)
l2_cases = pytest.mark.parametrize("attack", [*CASES.values()][:2], ids=[*CASES][:2])

ROWS = collections.Counter()


def network(weights, inputs):
    """A small network of whose logits only the order may matter."""
    logits = jnp.tanh((inputs - 0.5) @ weights["first"]) @ weights["second"]
    logits = weights["scale"] * (logits + weights["bias"][None])
    ranks = jnp.argsort(jnp.argsort(logits, axis=1), axis=1).astype(logits.dtype)
    hard = jax.nn.one_hot(jnp.argmax(logits, axis=1), K, dtype=logits.dtype)
    forms = jnp.stack([logits, jnp.sinh(logits), ranks, hard])
    return forms[weights["form"]]


def counting(weights, inputs):
    """The network, and a count of its rows; not in all tests, since no cache holds a callback."""
    jax.debug.callback(lambda rows: ROWS.update(rows=len(rows)), inputs[:, 0])
    return network(weights, inputs)


def make(**weights):
    return nets.callable_logits_fn(network, WEIGHTS | weights)


def logits_of(inputs):
    return np.tanh((np.asarray(inputs) - 0.5) @ WEIGHTS["first"]) @ WEIGHTS["second"]


MODEL = make()
INPUTS = RNG.uniform(0, 1, (B, D)).astype(np.float32)
CLEAN = logits_of(INPUTS)
LABELS = CLEAN.argmax(1)
LABELS[-1] = CLEAN[-1].argmin()  # wrong already
RIGHT = np.arange(B) < B - 1


def run(attack, logits_fn=MODEL, rows=slice(None), **settings):
    result = attack(logits_fn, KEYS[rows], INPUTS[rows], LABELS[rows], **settings)
    return jax.tree.map(np.asarray, result)


@pytest.mark.slow
@all_cases
def test_only_the_predicted_class_decides(attack):
    plain = run(attack)
    assert np.all(plain.success)
    distances = plain.distance[RIGHT]
    assert np.all(distances > 0)
    others = [make(form=1), make(form=2), make(form=3), make(scale=np.float32(1024))]
    for logits_fn in others:
        jax.tree.map(np.testing.assert_array_equal, run(attack, logits_fn), plain)
    # The ranks and the one-hot rows have no gradient that an attack could follow.
    for logits_fn in others[1:3]:
        _, pull = jax.vjp(logits_fn, jnp.asarray(INPUTS))
        np.testing.assert_array_equal(pull(jnp.ones((B, K)))[0], 0)
        masked = attacks.pgd(logits_fn, None, INPUTS, LABELS, eps=1.0, random_start=False)
        assert not np.any(masked.success[RIGHT])


@l2_cases
def test_every_query_is_one_row_and_is_counted(attack):
    together = run(attack)
    np.testing.assert_array_equal(together.queries, np.where(RIGHT, NUM_QUERIES, 1))
    for row in (0, 1):
        ROWS.clear()
        counted = nets.callable_logits_fn(counting, WEIGHTS)
        alone = run(attack, counted, rows=slice(row, row + 1))
        jax.effects_barrier()
        assert ROWS["rows"] == alone.queries[0] == NUM_QUERIES
        np.testing.assert_allclose(alone.inputs[0], together.inputs[row], atol=1e-5)


@all_cases
def test_without_a_start_the_draws_are_counted_and_nothing_is_claimed(attack):
    bias = np.full(K, -99, np.float32)
    bias[LABELS[0]] = 0
    result = run(attack, make(bias=bias))
    sure = LABELS[0] == LABELS
    np.testing.assert_array_equal(result.queries, np.where(sure, 1 + NUM_STARTS + 1, 1))
    np.testing.assert_array_equal(result.inputs, INPUTS)
    np.testing.assert_array_equal(result.info["first_success"], np.where(sure, -1, 0))
    np.testing.assert_array_equal(result.distance, np.where(sure, np.inf, 0))
    np.testing.assert_array_equal(result.success, ~sure)


@all_cases
def test_the_trace_goes_down_to_the_distance(attack):
    result = run(attack)
    trace = result.info["trace"]
    assert trace.shape == (B, NUM_QUERIES - 2)
    assert np.all(np.isnan(trace[-1]))
    assert np.all(trace[RIGHT, 1:] <= trace[RIGHT, :-1])
    np.testing.assert_allclose(trace[RIGHT, -1], result.distance[RIGHT], rtol=1e-6)
    first = result.info["first_success"]
    for row in np.flatnonzero(RIGHT):
        assert np.all(np.isinf(trace[row, : first[row] - 1]))
        assert np.isfinite(trace[row, first[row] - 1])
        assert trace[row, -1] < 0.9 * trace[row, first[row] - 1]


@l2_cases
def test_the_trace_is_what_a_smaller_budget_finds(attack):
    larger = run(attack)
    smaller = run(attack, num_queries=60)
    np.testing.assert_allclose(smaller.distance[RIGHT], larger.info["trace"][RIGHT, 57], rtol=1e-5)
    assert np.all(smaller.distance[RIGHT] > larger.distance[RIGHT])
    np.testing.assert_array_equal(smaller.queries, np.where(RIGHT, 60, 1))


def test_a_network_that_takes_uniform_noise_for_the_label_has_starts():
    # Class 1 is dark or bright: the mean of uniform draws in 64 dimensions is neither.
    def network(weights, x):
        off = jnp.abs(jnp.mean(x, axis=1) - weights)
        return jnp.stack([0 * off, off - 0.15], axis=1)

    uniform = np.random.default_rng(0).uniform(0, 1, (10_000, 64)).astype(np.float32)
    logits_fn = nets.callable_logits_fn(network, jnp.float32(0.5))
    assert np.all(np.argmax(logits_fn(uniform), axis=1) == 0)
    result = attacks.boundary(
        logits_fn, jax.random.key(0), uniform[:B], np.zeros(B, int), num_queries=60
    )
    assert np.all(result.success)


@l2_cases
def test_an_init_of_the_target_is_tried_first(attack):
    # The target is so rare that no random draw is of its class.
    target = 2
    pool = np.random.default_rng(0).uniform(0, 1, (10_000, D)).astype(np.float32)
    excess = logits_of(pool)[:, target] - np.delete(logits_of(pool), target, axis=1).max(1)
    bias = -np.sort(excess)[-10] * np.eye(K, dtype=np.float32)[target]
    init = pool[np.argsort(excess)[-B:]]
    init[0] = INPUTS[0]  # not of the target
    labels = (logits_of(INPUTS) + bias).argmax(1)
    targets = np.full(B, target)
    result = attack(make(bias=bias), KEYS, INPUTS, labels, targets=targets, init=init)
    assert not result.success[0]
    assert result.queries[0] == 1 + 1 + NUM_STARTS + 1
    assert np.all(result.success[1:])
    np.testing.assert_array_equal(result.info["first_success"][1:], 1)
    np.testing.assert_array_equal((logits_of(result.inputs) + bias).argmax(1)[1:], target)
    assert np.all(result.distance[1:] < np.linalg.norm(init - INPUTS, axis=1)[1:])


@all_cases
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_queries": 2}, "expected num_queries to be a whole number >= 3, got 2"),
        ({"init": np.full_like(INPUTS, np.nan)}, "expected finite (inputs|init), got nan"),
    ],
)
def test_bad_settings_are_named(attack, settings, message):
    with pytest.raises(ValueError, match=message):
        run(attack, **settings)
