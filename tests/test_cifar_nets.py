"""The networks for CIFAR: sizes in closed form, the forward pass in NumPy, batch statistics."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import nets, train

KEY = jax.random.key(0)
MAKERS = {"resnet": nets.resnet, "plain": nets.plain_net}


def count_parameters(model, input_shape):
    """The sizes of parameters and of batch statistics."""
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, *input_shape))), KEY)
    return [
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes[name]))
        for name in ("params", "batch_stats")
    ]


@functools.cache
def drawn(name, depth, size=8):
    """A small network of three classes whose every variable matters."""
    model = MAKERS[name](depth, num_classes=3)
    params, state = nets.init(model, KEY, (size, size, 2))
    rng = np.random.default_rng(depth)
    # Scales start at 1 and biases at 0; variances must stay above 0.
    params, state = jax.tree.map(
        lambda leaf: leaf + rng.uniform(0, 0.2, leaf.shape).astype(np.float32), (params, state)
    )
    return model, params, state


def images(number, size=8, seed=1):
    rng = np.random.default_rng(seed)
    return rng.uniform(size=(number, size, size, 2)).astype(np.float32)


# Architecture


@pytest.mark.floor
@pytest.mark.parametrize("depth", [8, 14, 20, 26, 110])
def test_a_resnet_has_the_papers_number_of_parameters(depth):
    blocks, sizes = (depth - 2) // 6, (16, 32, 64)
    convolutions, channels, before = 9 * 3 * 16, 16, 16
    for size in sizes:
        convolutions += 9 * (before * size + (2 * blocks - 1) * size * size)
        channels += 2 * blocks * size
        before = size
    expected = convolutions + 2 * channels + (64 + 1) * 10
    # The mean over pixels makes it the same for any picture.
    assert count_parameters(nets.resnet(depth), (4, 4, 3)) == [expected, 2 * channels]
    printed = {20: 269_722, 110: 1_727_962}
    assert printed.get(depth, expected) == expected


PLAIN = {
    2: ("16 | 16 |", ()),
    4: ("16 16 | 32 32 |", ()),
    6: ("16 16 | 32 32 | 64 64 |", ()),
    8: ("16 16 | 32 32 | 64 64 | 128 128 |", (64,)),
    10: ("32 32 | 64 64 | 128 128 | 256 256 256 256 |", (128,)),
}


@pytest.mark.floor
@pytest.mark.parametrize("depth", PLAIN)
def test_a_plain_net_has_the_released_codes_number_of_parameters(depth):
    layers, hidden = PLAIN[depth]
    expected, statistics, before, side = 0, 0, 3, 32
    for layer in layers.split():
        if layer == "|":
            side //= 2
            continue
        size = int(layer)
        expected += (9 * before + 1) * size + 2 * size
        statistics, before = statistics + 2 * size, size
    before *= side * side
    for size in (*hidden, 10):
        expected, before = expected + (before + 1) * size, size
    assert sum(layer != "|" for layer in layers.split()) == depth
    assert count_parameters(nets.plain_net(depth), (32, 32, 3)) == [expected, statistics]


def convolve(x, layer, stride=1):
    """A 3x3 convolution with one pixel of zeros around."""
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    out = np.einsum("bhwcij,ijco->bhwo", windows[:, ::stride, ::stride], layer["kernel"])
    return out + layer.get("bias", 0.0)


def normalize(x, layer, statistics):
    scale = layer["scale"] / np.sqrt(statistics["var"] + 1e-5)
    return (x - statistics["mean"]) * scale + layer["bias"]


def resnet_forward(params, stats, x, blocks):
    def layer(x, name, stride=1):
        out = convolve(x, params[f"conv{name}"], stride)
        return normalize(out, params[f"norm{name}"], stats[f"norm{name}"])

    x = np.maximum(layer(x, ""), 0)
    for group in range(3):
        for block in range(blocks):
            name, halves = f"_{group}_{block}", group > 0 and block == 0
            y = np.maximum(layer(x, f"{name}_0", 2 if halves else 1), 0)
            y = layer(y, f"{name}_1")
            if halves:
                kept = x[:, ::2, ::2]
                x = np.concatenate([kept, np.zeros_like(kept)], axis=3)
            x = np.maximum(x + y, 0)
    return x.mean((1, 2)) @ params["logits"]["kernel"] + params["logits"]["bias"]


def plain_forward(params, stats, x, depth):
    layers, hidden = PLAIN[depth]
    for number, block in enumerate(layers.split("|")[:-1]):
        for position in range(len(block.split())):
            name = f"_{number}_{position}"
            out = convolve(x, params[f"conv{name}"])
            x = np.maximum(normalize(out, params[f"norm{name}"], stats[f"norm{name}"]), 0)
        rows = np.maximum(x[:, 0::2], x[:, 1::2])
        x = np.maximum(rows[:, :, 0::2], rows[:, :, 1::2])
    x = x.reshape(len(x), -1)
    for number in range(len(hidden)):
        layer = params[f"dense_{number}"]
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    return x @ params["logits"]["kernel"] + params["logits"]["bias"]


@pytest.mark.floor
@pytest.mark.parametrize(
    ("name", "depth", "size"), [("resnet", 14, 8), ("plain", 4, 8), ("plain", 8, 16)]
)
def test_the_forward_pass_equals_numpy(name, depth, size):
    model, params, state = drawn(name, depth, size)
    inputs = images(3, size)
    doubles = functools.partial(jax.tree.map, lambda leaf: np.asarray(leaf, np.float64))
    params64, stats64 = doubles(params), doubles(state["batch_stats"])
    shifted = inputs.astype(np.float64) - 0.5
    if name == "resnet":
        expected = resnet_forward(params64, stats64, shifted, (depth - 2) // 6)
    else:
        expected = plain_forward(params64, stats64, shifted, depth)
    got = model.apply({"params": params, **state}, inputs)
    assert got.shape == (3, 3)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.floor
@pytest.mark.parametrize(("name", "depth"), [("resnet", 8), ("plain", 6)])
def test_gradients_of_the_inputs_are_those_of_xla(name, depth):
    model, params, state = drawn(name, depth)
    inputs = images(2)

    def gradient(model):
        def total(x):
            return jnp.sum(jnp.square(model.apply({"params": params, **state}, x)))

        return jax.jit(jax.grad(total))(inputs)

    expected = gradient(model.clone(conv_general_dilated=jax.lax.conv_general_dilated))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(
        gradient(model), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
    )


@pytest.mark.parametrize("depth", [8, 20])
def test_kernels_of_convolutions_start_he_normal(depth):
    params, _ = nets.init(nets.resnet(depth), KEY, (8, 8, 3))
    kernel = np.asarray(params["conv_2_0_1"]["kernel"])
    assert kernel.std() == pytest.approx(math.sqrt(2 / (9 * 64)), rel=0.03)
    assert set(params["conv"]) == {"kernel"}


@pytest.mark.parametrize(("name", "depth"), [("resnet", 8), ("plain", 2)])
def test_equal_networks_are_equal(name, depth):
    make = MAKERS[name]
    assert make(depth) == make(depth)
    assert hash(make(depth)) == hash(make(depth))
    assert len({make(depth), make(depth, num_classes=9), make(depth, shift=0.0)}) == 3
    assert nets.apply_fn(make(depth)) == nets.apply_fn(make(depth))


# Batch statistics


@pytest.mark.floor
@pytest.mark.parametrize(("name", "depth"), [("resnet", 8), ("plain", 2)])
def test_training_updates_the_statistics_and_evaluation_does_not(name, depth):
    model, params, state = drawn(name, depth)
    apply, inputs = nets.apply_fn(model), images(6)
    first = "norm" if name == "resnet" else "norm_0_0"
    layer = params[first.replace("norm", "conv")]
    logits, after = apply(params, state, inputs, train=True, key=jax.random.split(KEY, 6))
    out = convolve(inputs - 0.5, jax.tree.map(np.asarray, layer))
    for statistic, value in (("mean", out.mean((0, 1, 2))), ("var", out.var((0, 1, 2)))):
        before = state["batch_stats"][first][statistic]
        np.testing.assert_allclose(
            after["batch_stats"][first][statistic], 0.9 * before + 0.1 * value, rtol=1e-4, atol=1e-5
        )
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert np.abs(np.asarray(new - old)).max() > 1e-4

    evaluated, kept = apply(params, state, inputs, train=False, key=None)
    assert kept is state
    assert not np.allclose(logits, evaluated, atol=1e-3)
    # An example's logits do not depend on its batch.
    others = np.concatenate([inputs[:1], images(5, seed=2)])
    again, _ = apply(params, state, others, train=False, key=None)
    np.testing.assert_allclose(again[0], evaluated[0], rtol=1e-5, atol=1e-5)
    assert not np.allclose(again[1:], evaluated[1:], atol=1e-3)


@pytest.mark.parametrize(("name", "depth"), [("resnet", 8), ("plain", 2)])
def test_a_short_fit_lowers_the_loss(name, depth):
    model = MAKERS[name](depth, num_classes=3)
    labels = np.arange(24, dtype=np.int32) % 3
    inputs = (images(24) + labels[:, None, None, None]) / 3
    params, state = nets.init(model, KEY, (8, 8, 2))
    step = train.make_train_step(nets.apply_fn(model), train.sgd(0.05))
    start = train.create_state(step, params, KEY, model_state=state)
    events = []
    train.fit(
        step,
        start,
        (inputs, labels),
        train.hard_loss(),
        num_epochs=4,
        batch_size=12,
        devices=jax.devices()[:1],
        callback=events.append,
    )
    losses = [event["loss"] for event in events if event["event"] == "epoch"]
    assert losses[-1] < 0.7 * losses[0]
    after = events[-1]["state"].model_state
    assert not np.allclose(jax.tree.leaves(after)[0], jax.tree.leaves(state)[0])


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nets.resnet(9), r"depth of 6n \+ 2, such as .* got 9; pass 8 or 14"),
        (lambda: nets.resnet(2), "depth to be a whole number >= 8, got 2"),
        (lambda: nets.resnet(20.0), "depth to be a whole number >= 8, got 20.0"),
        (lambda: nets.plain_net(3), "depth to be one of 2, 4, 6, 8, 10, got 3"),
        (lambda: nets.plain_net("4"), "depth to be one of 2, 4, 6, 8, 10, got '4'"),
        (lambda: nets.resnet(8, num_classes=0), "num_classes to be a whole number"),
        (lambda: nets.plain_net(2, shift=math.nan), "finite shift, got nan"),
        (lambda: nets.resnet(8, conv_general_dilated=3), "a callable, got int as conv_general_"),
        (lambda: nets.init(nets.resnet(8), KEY, (8, 8)), "inputs of rank 4"),
        (lambda: nets.init(nets.plain_net(2), KEY, (8, 8)), "inputs of rank 4"),
        (
            lambda: nets.init(nets.plain_net(8), KEY, (8, 16, 1)),
            "inputs of at least 16 pixels a side at depth 8, got 8x16",
        ),
    ],
)
def test_bad_networks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
