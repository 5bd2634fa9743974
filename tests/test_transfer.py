"""Transfer: on a network to itself, between networks, and against the strength of the attack."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, data, nets

B = 24


def network(weights, inputs):
    first, offset, second = weights
    flat = inputs.reshape(inputs.shape[0], -1)
    return jnp.tanh((flat - 0.5) @ first + offset[None]) @ second


def train(inputs, labels, seed, scale=10.0):
    """Random features, and the least squares from them to one-hot rows."""
    rng = np.random.default_rng(seed)
    first = rng.normal(0, 0.15, (inputs[0].size, 150))
    offset = rng.normal(0, 0.5, 150)
    hidden = np.tanh((inputs.reshape(len(inputs), -1) - 0.5) @ first + offset)
    second = np.linalg.solve(
        hidden.T @ hidden + 10 * np.eye(150), hidden.T @ (np.eye(10)[labels] - 0.1)
    )
    weights = [np.float32(array) for array in (first, offset, scale * second)]
    return nets.callable_logits_fn(network, weights)


@pytest.fixture(scope="module")
def digits():
    """Inputs and labels that both networks get right, and the networks."""
    split = data.load("digits").train
    inputs, labels = np.float32(split.inputs), split.labels
    half = len(inputs) // 2
    parts = [slice(0, half), slice(half, None)]
    networks = [train(inputs[part], labels[part], seed) for seed, part in enumerate(parts)]
    test = data.load("digits").test
    x, y = np.float32(test.inputs), test.labels
    right = np.all([np.argmax(f(x), axis=1) == y for f in networks], axis=0)
    assert right.mean() > 0.85
    return x[right][:B], y[right][:B], networks


pgd = functools.partial(attacks.pgd, eps=0.2, num_steps=5)
carlini_wagner = functools.partial(
    attacks.carlini_wagner_l2, num_searches=4, num_steps=60, learning_rate=0.1, initial_const=0.1
)


def as_numpy(result):
    return jax.tree.map(np.asarray, result)


def test_transfer_rises_with_the_confidence(digits):
    x, y, (source, judged) = digits
    rates, distances = [], []
    for confidence in (0.0, 2.0, 4.0, 8.0):
        attack = functools.partial(carlini_wagner, confidence=confidence)
        result = as_numpy(attacks.transfer(judged, None, x, y, source=source, attack=attack))
        assert result.info["source_success"].mean() > 0.9
        rates.append(result.success.mean())
        distances.append(np.mean(result.info["crafted_distance"][result.info["source_success"]]))
    assert np.all(np.diff(rates) >= 0)
    assert rates[0] < 0.4 < 0.9 < rates[-1]
    assert np.all(np.diff(distances) > 0)


@pytest.mark.parametrize("attack", [pgd, carlini_wagner], ids=["budget", "minimum norm"])
def test_to_itself_it_is_the_attack(digits, attack):
    x, y, (source, _) = digits
    y = np.where(np.arange(B) == 3, (y + 1) % 10, y)  # wrong already
    direct = as_numpy(attack(source, jax.random.key(1), x, y))
    result = as_numpy(
        attacks.transfer(source, jax.random.key(1), x, y, source=source, attack=attack)
    )
    for name in ("inputs", "success", "distance"):
        np.testing.assert_array_equal(getattr(result, name), getattr(direct, name))
    np.testing.assert_array_equal(result.info["source_success"], direct.success)
    np.testing.assert_array_equal(result.info["source_queries"], direct.queries)
    np.testing.assert_array_equal(result.queries, np.where(np.arange(B) == 3, 1, 2))
    assert direct.success.sum() > 0


def test_who_is_wrong_already(digits):
    x, y, (source, judged) = digits
    off_source = nets.callable_logits_fn(lambda f, z: -f(z), source)
    off_judged = nets.callable_logits_fn(lambda f, z: -f(z), judged)
    run = functools.partial(attacks.transfer, attack=pgd)
    # Only the judged network: nothing is needed.
    result = as_numpy(run(off_judged, jax.random.key(0), x, y, source=source))
    np.testing.assert_array_equal(result.inputs, x)
    assert np.all(result.success)
    np.testing.assert_array_equal(result.distance, 0)
    np.testing.assert_array_equal(result.queries, 1)
    assert np.all(result.info["crafted_distance"] > 0)
    # Only the source: nothing is crafted, and the judged network is still right.
    result = as_numpy(run(judged, jax.random.key(0), x, y, source=off_source))
    np.testing.assert_array_equal(result.inputs, x)
    assert not np.any(result.success)
    np.testing.assert_array_equal(result.distance, 0)
    np.testing.assert_array_equal(result.queries, 2)
    assert np.all(result.info["source_success"])


def test_a_failure_is_shown_at_the_point_that_failed(digits):
    x, y, (source, judged) = digits
    result = as_numpy(attacks.transfer(judged, None, x, y, source=source, attack=carlini_wagner))
    lost = result.info["source_success"] & ~result.success
    assert lost.sum() >= 3
    delta = (result.inputs - x).reshape(B, -1)
    np.testing.assert_allclose(result.distance, np.linalg.norm(delta, axis=1), rtol=1e-5)
    assert np.all(result.distance > 0)
    np.testing.assert_array_equal(np.argmax(judged(result.inputs), axis=1)[lost], y[lost])
    assert np.all(np.argmax(source(result.inputs), axis=1) != y)
    # Where nothing can be crafted the clean input is what was judged.
    sure = nets.callable_logits_fn(lambda rows, z: rows + 0 * z[:, :1, 0, 0], np.eye(10)[y] * 9)
    nothing = as_numpy(attacks.transfer(judged, None, x, y, source=sure, attack=carlini_wagner))
    assert not np.any(nothing.success)
    np.testing.assert_array_equal(nothing.inputs, x)
    assert np.all(np.isinf(nothing.distance))


def test_targets_and_bounds_reach_the_attack(digits):
    x, y, (source, judged) = digits
    seen = {}

    def spy(logits_fn, keys, inputs, labels, **rest):
        seen.update(rest, keys=keys)
        return pgd(logits_fn, keys, inputs, labels, **rest)

    targets = (y + 1) % 10
    result = as_numpy(
        attacks.transfer(
            judged, jax.random.key(2), x, y, source=source, attack=spy, targets=targets,
            bounds=(-1.0, 1.0),
        )
    )  # fmt: skip
    assert seen["bounds"] == (-1.0, 1.0)
    np.testing.assert_array_equal(seen["targets"], targets)
    assert seen["keys"].shape == (B,)
    np.testing.assert_array_equal(result.success, np.argmax(judged(result.inputs), 1) == targets)


def test_under_jit_and_vmap(digits):
    x, y, networks = digits
    eager = [
        as_numpy(attacks.transfer(judged, jax.random.key(0), x, y, source=networks[0], attack=pgd))
        for judged in networks
    ]
    jitted = jax.jit(
        jax.vmap(
            lambda judged: attacks.transfer(
                judged, jax.random.key(0), x, y, source=networks[0], attack=pgd
            )
        )
    )(nets.stack(networks))
    for row, expected in enumerate(eager):
        np.testing.assert_array_equal(jitted.success[row], expected.success)
        np.testing.assert_allclose(jitted.distance[row], expected.distance, rtol=1e-4)
    assert eager[0].success.sum() > eager[1].success.sum()


def test_the_info_of_every_attack(digits):
    x, y, (source, judged) = digits
    labels = np.where(np.arange(B) == 0, (y + 1) % 10, y)  # one is wrong to begin with
    found = attacks.transfer(judged, None, x, labels, source=source, attack=carlini_wagner)
    first = np.asarray(found.info["first_success"])
    assert first[0] == 0
    np.testing.assert_array_equal(first[1:], np.where(found.success, 1, -1)[1:])
    assert all(found.info[name].dtype == np.int32 for name in ("first_success", "gradients"))


def test_bad_arguments_are_named(digits):
    x, y, (source, judged) = digits
    run = functools.partial(attacks.transfer, judged, None, x, y, source=source)
    with pytest.raises(ValueError, match="expected a callable as the attack, got str; bind"):
        run(attack="pgd")
    with pytest.raises(ValueError, match="expected bounds as an argument of transfer, got it"):
        run(attack=functools.partial(carlini_wagner, bounds=(0, 1)))
    with pytest.raises(ValueError, match="expected targets as an argument of transfer, got it"):
        run(attack=functools.partial(carlini_wagner, targets=y))
    with pytest.raises(ValueError, match="expected a callable, got int"):
        attacks.transfer(judged, None, x, y, source=3, attack=carlini_wagner)
    with pytest.raises(ValueError, match="expected a PRNG key for random starts, got None"):
        run(attack=pgd)
