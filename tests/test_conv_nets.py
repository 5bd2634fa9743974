"""Convolutional networks beyond the papers' own: normalization as an argument, and their forward
passes in NumPy, sizes as published, and laws that hold for all of them."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
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
    "resnet18": functools.partial(nets.resnet18, 0.0625, blocks=(1, 2)),
    "resnet18_imagenet": functools.partial(nets.resnet18_imagenet, 0.0625, blocks=(1, 1)),
    "wide_resnet": functools.partial(nets.wide_resnet, 10, 0.25),
    "mobilenet_v2": functools.partial(
        nets.mobilenet_v2, stages=((1, 6, 1, 1), (2, 8, 2, 2)), stem_channels=4, head_channels=12
    ),
    "mobilenet_v2_cifar": functools.partial(
        nets.mobilenet_v2_cifar, stages=((1, 6, 1, 1), (2, 4, 1, 2)), stem_channels=4
    ),
    # Windows of 3x3 pixels do not cover the 4x4 pixels of the second stage.
    "emo": functools.partial(
        nets.EMO,
        *(((2, 6, 1.5, 3, 0, 2), (2, 8, 2, 5, 4, 1)), 4, 1),
        window=3,
    ),
    "emo_small": functools.partial(
        nets.emo_small, 0.25, stages=((1, 4, 2, 3, 0, 2), (2, 6, 2, 3, 3, 2))
    ),
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


@functools.partial(jax.jit, static_argnames=("model", "train"))
def call(model, params, state, inputs, keys=None, *, train=False):
    return nets.apply_fn(model)(params, state, inputs, train=train, key=keys)


def doubles(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


# --- Architecture ---------------------------------------------------------------------------------

IMAGENET, CIFAR = (224, 224, 3), (32, 32, 3)
SIZES = {
    # torchvision's, and the CIFAR variant that papers on robustness train.
    "resnet18_imagenet": (nets.resnet18_imagenet, IMAGENET, 11_689_512),
    "resnet34_imagenet": (
        functools.partial(nets.resnet18_imagenet, blocks=(3, 4, 6, 3)),
        *(IMAGENET, 21_797_672),
    ),
    "resnet18": (nets.resnet18, CIFAR, 11_173_962),
    # The paper's table 4 and table 1 rounded, and the code of WRN-28-10 and WRN-34-10 exactly.
    "WRN-28-10": (functools.partial(nets.wide_resnet, 28, 10), CIFAR, 36_479_194),
    "WRN-34-10": (functools.partial(nets.wide_resnet, 34, 10), CIFAR, 46_160_474),
    "WRN-16-4": (functools.partial(nets.wide_resnet, 16, 4), CIFAR, 2_748_890),
    "WRN-40-2": (functools.partial(nets.wide_resnet, 40, 2), CIFAR, 2_243_546),
    "WRN-40-1": (functools.partial(nets.wide_resnet, 40, 1), CIFAR, 563_930),
    # torchvision's; the paper's 1.0 and 1.4 have 3.4M and 6.9M in its table 4.
    "mobilenet_v2": (nets.mobilenet_v2, IMAGENET, 3_504_872),
    "mobilenet_v2 0.5": (functools.partial(nets.mobilenet_v2, 0.5), IMAGENET, 1_968_680),
    "mobilenet_v2 0.75": (functools.partial(nets.mobilenet_v2, 0.75), IMAGENET, 2_636_424),
    "mobilenet_v2 1.4": (functools.partial(nets.mobilenet_v2, 1.4), IMAGENET, 6_108_776),
    "mobilenet_v2_cifar": (nets.mobilenet_v2_cifar, CIFAR, 2_296_922),
    # The logs of the paper's code have 1.361M and 6.168M; its tables 1.3M, 2.3M, 5.1M, and 6.1M.
    "emo_1m": (nets.emo_1m, IMAGENET, 1_361_168),
    "emo_2m": (nets.emo_2m, IMAGENET, 2_377_472),
    "emo_5m": (nets.emo_5m, IMAGENET, 5_108_848),
    "emo_6m": (nets.emo_6m, IMAGENET, 6_168_496),
    "emo_small": (nets.emo_small, (28, 28, 1), 90_458),
}


@pytest.mark.parametrize(("make", "shape", "expected"), SIZES.values(), ids=SIZES)
def test_networks_have_the_published_number_of_parameters(make, shape, expected):
    model = make()
    drawn = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, *shape))), KEY)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(drawn["params"])) == expected


# The forward pass once more, in float64.


def convolve(x, layer, stride=1, groups=1):
    """A convolution padded alike on both sides, place by place."""
    kernel = layer["kernel"]
    side, (batch, height, width, channels) = kernel.shape[0], x.shape
    rows, columns = (-(-size // stride) for size in (height, width))
    padded = np.pad(x, ((0, 0), (side // 2,) * 2, (side // 2,) * 2, (0, 0)))
    out = np.zeros((batch, rows, columns, groups, kernel.shape[3] // groups))
    for row, column in np.ndindex(side, side):
        part = padded[:, row::stride, column::stride][:, :rows, :columns]
        parts = part.reshape(batch, rows, columns, groups, channels // groups)
        weights = kernel[row, column].reshape(channels // groups, groups, -1)
        out += np.einsum("bhwgi,igo->bhwgo", parts, weights)
    return out.reshape(batch, rows, columns, -1) + layer.get("bias", 0.0)


class Reference:
    """The layers of a network by their names, in float64, batch normalization in evaluation."""

    def __init__(self, params, state, epsilon=1e-5):
        self.params, self.stats = doubles(params), doubles(state["batch_stats"])
        self.epsilon = epsilon

    def conv(self, x, name, stride=1, groups=1):
        return convolve(x, self.params[name], stride, groups)

    def norm(self, x, name):
        layer, stats = self.params[name], self.stats[name]
        scale = layer["scale"] / np.sqrt(stats["var"] + self.epsilon)
        return (x - stats["mean"]) * scale + layer["bias"]

    def dense(self, x, name):
        return x @ self.params[name]["kernel"] + self.params[name]["bias"]


def relu(x):
    return np.maximum(x, 0)


def projection_resnet(net, x, model):
    def layer(x, name, stride=1):
        return net.norm(net.conv(x, f"conv{name}", stride), f"norm{name}")

    x = relu(layer(x, "", model.stem_stride))
    if model.stem_pool:
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # no value is below 0
        x = np.maximum.reduce(
            [
                padded[:, row::2, column::2][:, : -(-x.shape[1] // 2), : -(-x.shape[2] // 2)]
                for row, column in np.ndindex(3, 3)
            ]
        )
    for group, number in enumerate(model.blocks):
        for block in range(number):
            name, stride = f"_{group}_{block}", 2 if group > 0 and block == 0 else 1
            y = layer(relu(layer(x, f"{name}_0", stride)), f"{name}_1")
            x = relu(y + (layer(x, f"{name}_shortcut", stride) if stride > 1 else x))
    return net.dense(x.mean((1, 2)), "logits")


def pre_activation(net, x, model):
    x = net.conv(x, "conv")
    for group in range(3):
        for block in range((model.depth - 4) // 6):
            name, stride = f"_{group}_{block}", 2 if group > 0 and block == 0 else 1
            first = relu(net.norm(x, f"norm{name}_0"))
            if block == 0:
                x = net.conv(first, f"conv{name}_shortcut", stride)
            second = relu(net.norm(net.conv(first, f"conv{name}_0", stride), f"norm{name}_1"))
            x = x + net.conv(second, f"conv{name}_1")
    return net.dense(relu(net.norm(x, "norm")).mean((1, 2)), "logits")


def mobilenet(net, x, model):
    def layer(x, name, stride=1, groups=1):
        return net.norm(net.conv(x, f"conv{name}", stride, groups), f"norm{name}")

    def activation(x):
        return np.clip(x, 0, 6) if model.activation is jax.nn.relu6 else relu(x)

    x = activation(layer(x, "", model.stem_stride))
    for stage, (expansion, size, number, first) in enumerate(model.stages):
        for block in range(number):
            name, stride = f"_{stage}_{block}", first if block == 0 else 1
            y, wide = x, expansion * x.shape[3]
            if model.projections or expansion > 1:
                y = activation(layer(y, f"{name}_expand"))
            y = layer(activation(layer(y, f"{name}_depthwise", stride, wide)), f"{name}_reduce")
            if stride == 1 and size == x.shape[3]:
                y = y + x
            elif stride == 1 and model.projections:
                y = y + layer(x, f"{name}_shortcut")
            x = y
    return net.dense(activation(layer(x, "_head")).mean((1, 2)), "logits")


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention(x, pairs, head_size, side):
    """The means of each window's pixels, head by head; a window has every n-th pixel."""
    channels, means = x.shape[3], np.zeros(x.shape)
    steps = [size // side for size in x.shape[1:3]]
    for example, row, column in np.ndindex(len(x), *steps):
        where = (example, slice(row, None, steps[0]), slice(column, None, steps[1]))
        pixels, query, key = (
            array[where].reshape(side * side, channels)
            for array in (x, pairs[..., :channels], pairs[..., channels:])
        )
        parts = []
        for start in range(0, channels, head_size):
            head = slice(start, start + head_size)
            weights = np.exp(query[:, head] @ key[:, head].T / math.sqrt(head_size))
            parts.append(weights / weights.sum(1, keepdims=True) @ pixels[:, head])
        means[where] = np.concatenate(parts, axis=1).reshape(side, side, channels)
    return means


def mobile_attention(net, x, model):
    def normalized(x, name, head_size):
        if not head_size:
            return net.norm(x, name)
        layer, mean = net.params[name], x.mean(3, keepdims=True)
        whole = (x - mean) / np.sqrt(x.var(3, keepdims=True) + 1e-6)
        return whole * layer["scale"] + layer["bias"]

    def local(x, name, stride):
        out = net.conv(x, f"conv_{name}_depthwise", stride, x.shape[3])
        return silu(net.norm(out, f"norm_{name}_depthwise"))

    x = net.norm(net.conv(x, "conv_stem", model.stem_stride), "norm_stem")
    x = local(x, "stem", 1)
    weights = net.dense(silu(net.dense(x.mean((1, 2)), "squeeze")), "excite")
    x = net.conv(x / (1 + np.exp(-weights))[:, None, None], "conv_stem_reduce")
    for stage, (number, _, _, _, head_size, stride) in enumerate(model.stages):
        for block in range(number):
            name = f"{stage}_{block}"
            y = normalized(x, f"norm_{name}", head_size)
            if block > 0 and head_size:
                size = y.shape[1]
                side = model.window or size
                y = np.pad(y, ((0, 0), (0, -size % side), (0, -size % side), (0, 0)))
                y = attention(y, net.conv(y, f"conv_{name}_query_key"), head_size, side)
                y = y[:, :size, :size]
            y = net.conv(y, f"conv_{name}_expand")
            y = gelu(y) if head_size else silu(y)
            if block > 0:
                x = x + net.conv(y + local(y, name, 1), f"conv_{name}_reduce")
            else:
                x = net.conv(local(y, name, stride), f"conv_{name}_reduce")
    x = normalized(x, "norm", model.stages[-1].head_size)
    return net.dense(x.mean((1, 2)), "logits")


FORWARD = {
    "resnet18": projection_resnet,
    "resnet18_imagenet": projection_resnet,
    "wide_resnet": pre_activation,
    "mobilenet_v2": mobilenet,
    "mobilenet_v2_cifar": mobilenet,
    "emo": mobile_attention,
    "emo_small": mobile_attention,
}


@pytest.mark.floor
@pytest.mark.parametrize("name", FORWARD)
def test_the_forward_pass_equals_numpy(name):
    model, params, state = drawn(name)
    inputs = images(3)
    reference = Reference(params, state, 1e-6 if "emo" in name else 1e-5)
    expected = FORWARD[name](reference, inputs.astype(np.float64) - 0.5, model)
    got, _ = call(model, params, state, inputs)
    assert got.shape == (3, 3)
    assert_close(got, expected)


# --- Laws -----------------------------------------------------------------------------------------


@pytest.mark.floor
@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_finite_and_those_of_xla(name):
    model, params, state = drawn(name)

    def gradients(model):
        def total(params, x):
            logits = model.apply({"params": params, **state}, x)
            return jnp.sum(jnp.square(logits))

        return jax.jit(jax.grad(total, argnums=(0, 1)))(params, images(2))

    got = gradients(model)
    expected = gradients(model.clone(conv_general_dilated=jax.lax.conv_general_dilated))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.isfinite(one).all()
        assert np.abs(other).max() > 0
        assert_close(one, other, 1e-3)


@pytest.mark.parametrize("name", SMALL)
def test_an_example_is_evaluated_the_same_alone_and_in_a_batch(name):
    model, params, state = drawn(name)
    inputs, keys = images(3), jax.random.split(KEY, 3)
    whole, kept = call(model, params, state, inputs)
    jax.tree.map(np.testing.assert_array_equal, kept, state)
    alone, _ = call(model, params, state, inputs[1:2])
    assert_close(alone, whole[1:2])
    trained, after = call(model, params, state, inputs, keys, train=True)
    assert np.abs(np.asarray(trained - whole)).max() > 1e-3
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert np.abs(np.asarray(new - old)).max() > 1e-5


DROPPING = {
    "wide_resnet": {"dropout_rate": 0.5},
    "mobilenet_v2": {"dropout_rate": 0.5},
    "emo": {"drop_path_rate": 0.5},
}


@pytest.mark.parametrize("name", DROPPING)
def test_what_an_example_drops_depends_on_its_key_alone(name):
    model, params, state = drawn(name, norm=GROUPS)
    model = model.clone(**DROPPING[name])
    keys, inputs = jax.random.split(KEY, 8), np.repeat(images(2), 4, axis=0)
    dropped, _ = call(model, params, state, inputs, keys, train=True)
    some, _ = call(model, params, state, inputs[1:3], keys[1:3], train=True)
    assert_close(some, dropped[1:3])
    assert np.ptp(dropped[:4], axis=0).max() > 1e-3  # one picture, four keys
    evaluated, _ = call(model, params, state, inputs)
    assert_close(evaluated[0], evaluated[1])
    with pytest.raises(ValueError, match=r"dropout_keys when train=True and \w+ > 0, got None"):
        model.apply({"params": params}, inputs, train=True)


def test_emo_skips_blocks_at_rates_that_grow_and_scales_what_stays():
    model, params, state = drawn("emo", norm=GROUPS)
    rate, number = 0.6, 256
    keys, inputs = jax.random.split(KEY, number), np.repeat(images(1), number, axis=0)
    dropped, _ = call(model.clone(drop_path_rate=rate), params, state, inputs, keys, train=True)
    shares = []
    for factors in np.ndindex(2, 2):  # of the second block of each stage, the others skip nothing
        scaled = dict(params)
        for stage, factor in enumerate(factors):
            kept = 1 - rate * (1 / 3 if stage == 0 else 1)
            kernel = params[f"conv_{stage}_1_reduce"]["kernel"]
            scaled[f"conv_{stage}_1_reduce"] = {"kernel": factor / kept * kernel}
        expected, _ = call(model, scaled, state, inputs[:1])
        difference = np.abs(dropped - expected).max(1)
        shares.append((difference < 1e-4 * np.abs(expected).max()).mean())
    assert sum(shares) == 1
    # The share of examples that keep the first of the two blocks, and the second one.
    assert shares[2] + shares[3] == pytest.approx(0.8, abs=0.08)
    assert shares[1] + shares[3] == pytest.approx(0.4, abs=0.1)


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
    inputs, keys = images(3), jax.random.split(KEY, 3)
    trained, _ = call(model, params, state, inputs, keys, train=True)
    evaluated, _ = call(model, params, state, inputs)
    np.testing.assert_allclose(trained, evaluated, rtol=1e-6)
    alone, _ = call(model, params, state, inputs[:1], keys[:1], train=True)
    assert_close(alone, trained[:1])
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
    def evaluated(network, x):
        traces.append(1)
        return network(x)

    for factor in (1.0, 2.0):
        params, state = nets.init(make(), KEY, (8, 8, 2))
        scaled = jax.tree.map(lambda leaf, factor=factor: factor * leaf, params)
        evaluated(nets.logits_fn(make(), {"params": scaled, **state}), images(2))
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
        (lambda: nets.wide_resnet(12, 1), r"depth of 6n \+ 4, such as .* got 12; pass 10 or 16"),
        (lambda: nets.wide_resnet(10, 0), "width > 0, got 0"),
        (lambda: nets.wide_resnet(10, 1, dropout_rate=1.0), r"dropout_rate in \[0, 1\), got 1.0"),
        (lambda: nets.resnet18(stem_size=4), "odd stem_size, got 4; pass 3 or 5"),
        (lambda: nets.resnet18(blocks=(2, 0)), "each size of blocks to be a whole number >= 1"),
        (lambda: nets.resnet18(-1), "width > 0, got -1; pass 1.0 for the paper's"),
        (
            lambda: nets.mobilenet_v2(stages=((1, 8, 1),)),
            r"each of stages to be \(expansion, channels, blocks, stride\), got \(1, 8, 1\)",
        ),
        (lambda: nets.mobilenet_v2(stages=((0, 8, 1, 1),)), "each size of stages to be a whole"),
        (
            lambda: nets.emo_1m(stages=((1, 8, 2, 3, 4),)),
            r"one row or more of \(blocks, channels, expansion, kernel, head_size, stride\)",
        ),
        (lambda: nets.emo_1m(stages=()), "one row or more of"),
        (lambda: nets.emo_1m(stages=((1, 8, 2, 4, 0, 1),)), "an odd kernel, .* got .*1, 8, 2.0, 4"),
        (lambda: nets.emo_1m(stages=((1, 8, 2, 3, 3, 1),)), "channels that head_size divides"),
        (lambda: nets.emo_1m(stages=((1, 8, 0.5, 3, 0, 1),)), "an expansion >= 1"),
        (lambda: nets.emo_1m(stages=((1, 8, "2", 3, 0, 1),)), "the expansion of stages"),
        (lambda: nets.emo_small(0), "width > 0, got 0"),
        (lambda: nets.emo_small(window=-1), "window to be a whole number >= 0, got -1"),
        (lambda: nets.emo_small(drop_path_rate=1), r"drop_path_rate in \[0, 1\), got 1"),
        (lambda: nets.init(nets.emo_small(0.1), KEY, (8, 8)), "inputs of rank 4"),
        (lambda: nets.mobilenet_v2(0.0), "width > 0, got 0"),
        (lambda: nets.mobilenet_v2(activation="relu"), "got the text 'relu' as activation"),
        (lambda: nets.init(nets.mobilenet_v2(0.1), KEY, (8, 8)), "inputs of rank 4"),
        (lambda: nets.init(nets.resnet18(0.1), KEY, (8, 8)), "inputs of rank 4"),
        (lambda: nets.init(nets.wide_resnet(10, 1), KEY, (8, 8)), "inputs of rank 4"),
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
