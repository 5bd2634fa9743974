"""Convolutional networks beyond the papers' own: normalization as an argument, and their forward
passes in NumPy, sizes as published, and laws that hold for all of them."""

import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from jdistill import nets

KEY = jax.random.key(0)
GROUPS = functools.partial(nets.group_norm, num_groups=2)


def images(number, size=8, channels=2, seed=1):
    rng = np.random.default_rng(seed)
    return rng.uniform(size=(number, size, size, channels)).astype(np.float32)


def assert_close(got, expected, tolerance=1e-4):
    """Equal to a tolerance relative to the largest entry."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


SMALL = {
    "resnet": functools.partial(nets.resnet, 8),
    "plain_net": functools.partial(nets.plain_net, 2),
}


@functools.cache
def drawn(name, **fields):
    """A small network of three classes whose every variable matters, and its variables."""
    model = SMALL[name](num_classes=3, **fields)
    params, state = nets.init(model, KEY, (8, 8, 2))
    rng = np.random.default_rng(7)
    # Scales start at 1 and biases at 0; variances must stay above 0.
    params, state = jax.tree.map(
        lambda leaf: leaf + rng.uniform(0, 0.2, leaf.shape).astype(np.float32), (params, state)
    )
    return model, params, state


def doubles(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


# --- Normalization --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "most", "groups"),
    [(64, 32, 32), (16, 32, 8), (24, 32, 12), (24, 10, 8), (6, 4, 3), (7, 32, 1), (1, 32, 1)],
)
def test_group_norm_equals_numpy_with_groups_that_fit(channels, most, groups):
    x = 3 + images(2, 3, channels)
    scale, bias = images(2, 1, channels, seed=5).reshape(2, channels)
    layer = nets.group_norm(name="norm", train=True, num_groups=most, epsilon=1e-3)
    got, state = layer.apply({"params": {"scale": scale, "bias": bias}}, x, mutable=True)
    expected = np.empty(x.shape)
    size = channels // groups
    for example, group in np.ndindex(2, groups):
        part = x[example, :, :, group * size : (group + 1) * size].astype(np.float64)
        whole = (part - part.mean()) / np.sqrt(part.var() + 1e-3)
        expected[example, :, :, group * size : (group + 1) * size] = whole
    np.testing.assert_allclose(got, expected * scale + bias, rtol=1e-4, atol=1e-4)
    assert "batch_stats" not in state


@pytest.mark.floor
@pytest.mark.parametrize("name", SMALL)
def test_group_norm_makes_a_network_of_single_examples(name):
    model, params, state = drawn(name, norm=GROUPS)
    assert state == {}
    assert {"scale", "bias"} in [set(layer) for layer in params.values()]
    apply, inputs = nets.apply_fn(model), images(3)
    keys = jax.random.split(KEY, 3)
    trained, _ = apply(params, state, inputs, train=True, key=keys)
    evaluated, _ = apply(params, state, inputs, train=False, key=None)
    np.testing.assert_array_equal(trained, evaluated)
    alone, _ = apply(params, state, inputs[:1], train=True, key=keys[:1])
    assert_close(alone, trained[:1])
    by_batch, *_ = drawn(name)
    assert by_batch.norm is nets.batch_norm
    assert jax.tree.structure(params) == jax.tree.structure(drawn(name)[1])


def test_arguments_of_the_normalization_are_used():
    model, params, state = drawn("resnet", norm=functools.partial(nets.batch_norm, momentum=0.5))
    _, after = nets.apply_fn(model)(
        params, state, images(4), train=True, key=jax.random.split(KEY, 4)
    )
    out = model.clone(norm=no_norm).apply({"params": params}, images(4), mutable=["kept"])[1]
    mean = np.mean(np.asarray(out["kept"]["norm"]["inputs"][0]), axis=(0, 1, 2))
    before = state["batch_stats"]["norm"]["mean"]
    assert_close(after["batch_stats"]["norm"]["mean"], 0.5 * before + 0.5 * mean)


class Nothing(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.sow("kept", "inputs", x)
        return x


def no_norm(*, name, train):
    return Nothing(name=name)


@pytest.mark.parametrize("name", SMALL)
def test_networks_are_equal_by_value_and_share_a_trace(name):
    def make(num_groups=4, **fields):
        return SMALL[name](norm=functools.partial(nets.group_norm, num_groups=num_groups), **fields)

    assert make() == make()
    assert hash(make()) == hash(make())
    assert len({make(), make(2), make(num_classes=9), SMALL[name](), SMALL[name]()}) == 4
    assert make().clone() == make()
    traces = []

    @jax.jit
    def call(network, x):
        traces.append(1)
        return network(x)

    for factor in (1.0, 2.0):
        params, state = nets.init(make(), KEY, (8, 8, 2))
        scaled = jax.tree.map(lambda leaf, factor=factor: factor * leaf, params)
        call(nets.logits_fn(make(), {"params": scaled, **state}), images(2))
    assert len(traces) == 1


# --- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nets.resnet(8, norm="batch"),
            "callable, got the text 'batch' as norm; pass nets.",
        ),
        (lambda: nets.plain_net(2, norm=None), "callable, got NoneType as norm"),
        (
            lambda: nets.init(
                nets.resnet(8, norm=functools.partial(nets.group_norm, num_groups=0)),
                *(KEY, (8, 8, 1)),
            ),
            "num_groups to be a whole number >= 1, got 0",
        ),
        (
            lambda: nets.apply_fn(
                nets.resnet(8, norm=functools.partial(nets.group_norm, num_groups=[2]))
            ),
            "model to be a hashable module, got ResNet",
        ),
    ],
)
def test_bad_networks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
