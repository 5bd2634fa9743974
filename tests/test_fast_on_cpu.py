"""Convolutions and max-pools that are fast on CPU, and the networks that are rewritten to them.

The reference is JAX's own convolution and pooling, in values and in gradients.
"""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from jdistill import attacks, metrics, nets, train
from jdistill.typing import Batch

LAYOUT = ("NHWC", "HWIO", "NHWC")

# --- Convolution and pooling ---


def convolve(convolution, inputs, kernel, strides=(1, 1), padding="VALID", **kwargs):
    return convolution(inputs, kernel, strides, padding, dimension_numbers=LAYOUT, **kwargs)


def gradients(convolution, inputs, kernel, weights, **kwargs):
    """Gradients of a weighted sum of the convolution's squares."""

    def total(inputs, kernel):
        return jnp.sum(weights * jnp.square(convolve(convolution, inputs, kernel, **kwargs)))

    return jax.jit(jax.grad(total, argnums=(0, 1)))(inputs, kernel)


def assert_close(got, expected, tolerance=1e-5):
    """Equal to a tolerance relative to the largest entry, leaf by leaf."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


CASES = [
    # batch, size, channels, features, kernel, padding
    (1, (6, 7), 3, 4, (3, 3), "VALID"),
    (3, (9, 8), 12, 5, (3, 3), "SAME"),
    (8, (8, 8), 16, 8, (3, 3), "VALID"),
    (21, (7, 7), 10, 4, (3, 3), "SAME"),
    (16, (6, 6), 9, 3, (2, 4), "SAME"),
    (19, (5, 5), 9, 3, (1, 1), "VALID"),
    (4, (7, 6), 2, 3, (5, 3), ((4, 0), (1, 2))),
    (17, (3, 3), 9, 2, (3, 3), "VALID"),
    (3, (6, 6), 1, 4, (4, 4), "SAME"),
]


@pytest.fixture(params=["", "--xla_some_flag=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"])
def flags(request, monkeypatch):
    """The rules read XLA's flags while they are traced; XLA itself has read them long before."""
    monkeypatch.setenv("XLA_FLAGS", request.param)


@pytest.mark.floor
@pytest.mark.parametrize(("batch", "size", "channels", "features", "kernel", "padding"), CASES)
def test_convolution_and_gradients_equal_xla(
    flags, batch, size, channels, features, kernel, padding
):
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(batch, *size, channels)).astype(np.float32)
    weights = rng.normal(size=(*kernel, channels, features)).astype(np.float32)
    ours = jax.jit(functools.partial(convolve, nets.conv_general_dilated, padding=padding))
    theirs = jax.jit(functools.partial(convolve, jax.lax.conv_general_dilated, padding=padding))
    expected = theirs(inputs, weights)
    assert_close(ours(inputs, weights), expected, 1e-6)
    seed = rng.normal(size=expected.shape).astype(np.float32)
    assert_close(
        gradients(nets.conv_general_dilated, inputs, weights, seed, padding=padding),
        gradients(jax.lax.conv_general_dilated, inputs, weights, seed, padding=padding),
    )


GENERAL = {
    "a wide kernel": ((12, 13, 9), (7, 6, 9, 2), {}),
    "depthwise, a wide kernel": ((12, 11, 3), (9, 8, 1, 3), {"feature_group_count": 3}),
    "groups of one input": ((6, 6, 2), (3, 3, 1, 20), {"feature_group_count": 2}),
    "strides": ((9, 8, 12), (3, 3, 12, 5), {"strides": (2, 2), "padding": "SAME"}),
    "strides that leave some out": ((9, 8, 3), (2, 3, 3, 5), {"strides": (3, 2)}),
    "a 1x1 kernel with strides": ((8, 7, 9), (1, 1, 9, 4), {"strides": (2, 3)}),
    "dilated kernel": ((9, 9, 10), (3, 2, 10, 4), {"rhs_dilation": (2, 3)}),
    "dilated inputs": (
        *((5, 4, 9), (3, 3, 9, 4)),
        {"lhs_dilation": (2, 3), "padding": ((1, 2), (2, 1)), "strides": (1, 2)},
    ),
    "padding beyond the kernel": ((5, 6, 9), (3, 3, 9, 4), {"padding": ((5, 4), (3, 0))}),
    "negative padding": ((8, 8, 9), (3, 3, 9, 4), {"padding": ((-1, 0), (1, -2))}),
    "negative padding, few channels": ((8, 8, 2), (3, 3, 2, 4), {"padding": ((-1, 0), (1, -2))}),
    "all at once": (
        *((9, 9, 6), (3, 2, 3, 4)),
        {
            **{"strides": (2, 1), "rhs_dilation": (2, 2), "lhs_dilation": (1, 2)},
            **{"padding": ((2, 1), (0, 3)), "feature_group_count": 2},
        },
    ),
    "groups": ((7, 7, 12), (3, 3, 4, 9), {"feature_group_count": 3, "padding": "SAME"}),
    "groups and strides": (
        (7, 7, 24),
        (3, 3, 12, 4),
        {"feature_group_count": 2, "strides": (2, 2)},
    ),
    "depthwise": ((7, 6, 5), (3, 3, 1, 5), {"feature_group_count": 5, "padding": "SAME"}),
    "depthwise, more outputs": ((7, 6, 3), (3, 2, 1, 6), {"feature_group_count": 3}),
    "depthwise with strides": (
        *((8, 7, 4), (3, 3, 1, 4)),
        {"feature_group_count": 4, "strides": (2, 3), "padding": "SAME", "rhs_dilation": (1, 2)},
    ),
    "depthwise, two rows at a time": (
        *((12, 20, 200), (3, 3, 1, 200)),
        {"feature_group_count": 200, "padding": "SAME"},
    ),
    "depthwise, a row at a time, with strides": (
        *((11, 24, 90), (3, 2, 1, 180)),
        {"feature_group_count": 90, "strides": (2, 1), "rhs_dilation": (2, 1)},
    ),
    "a 1x1 kernel": ((5, 6, 40), (1, 1, 40, 9), {"padding": "SAME"}),
    "a 1x1 kernel with padding": ((5, 6, 9), (1, 1, 9, 4), {"padding": ((1, 0), (0, 2))}),
    "a 1x1 kernel in groups": ((5, 6, 8), (1, 1, 4, 6), {"feature_group_count": 2}),
    "a 1x1 kernel, dilated inputs": (
        *((5, 6, 9), (1, 1, 9, 4)),
        {"lhs_dilation": (2, 1), "padding": ((0, 0), (0, 0))},
    ),
    "one in, many out": ((6, 6, 1), (3, 3, 1, 4), {"strides": (2, 2)}),
    "type of the outputs": ((6, 6, 9), (3, 3, 9, 4), {"preferred_element_type": jnp.float32}),
}


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def assert_equal_to_xlas(measure):
    assert_close(measure(nets.conv_general_dilated), measure(jax.lax.conv_general_dilated))


@pytest.mark.floor
@pytest.mark.parametrize(("size", "kernel", "kwargs"), GENERAL.values(), ids=GENERAL)
def test_convolutions_of_any_kind_equal_xlas(flags, size, kernel, kwargs):
    operands = draw((17, *size), kernel)
    assert_equal_to_xlas(lambda convolution: convolve(convolution, *operands, **kwargs))
    seed = jnp.ones(())
    assert_equal_to_xlas(lambda convolution: gradients(convolution, *operands, seed, **kwargs))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "kernel", "kwargs"), GENERAL.values(), ids=GENERAL)
def test_second_derivatives_of_any_kind_equal_xlas(flags, size, kernel, kwargs):
    operands = draw((17, *size), kernel)

    def penalty(convolution, inputs, kernel):
        first = gradients(convolution, inputs, kernel, jnp.ones(()), **kwargs)
        return sum(jnp.sum(jnp.square(leaf)) for leaf in first)

    assert_equal_to_xlas(
        lambda convolution: jax.jit(
            jax.grad(functools.partial(penalty, convolution), argnums=(0, 1))
        )(*operands)
    )


LAYOUTS = {
    "NCHW": ((2, 9, 7, 6), (4, 9, 3, 2), ("NCHW", "OIHW", "NCHW")),
    "default": ((2, 9, 7, 6), (4, 9, 3, 2), None),
    "mixed": ((7, 2, 9, 6), (3, 9, 4, 2), ("HNCW", "HIOW", "WCNH")),
    "one axis": ((3, 8, 9), (3, 9, 4), ("NWC", "WIO", "NWC")),
    "one axis, channels first": ((3, 9, 8), (4, 9, 3), ("NCW", "OIW", "NCW")),
}


@pytest.mark.parametrize(("size", "kernel", "layout"), LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_equal_xlas(size, kernel, layout):
    operands = draw(size, kernel)
    strides = (2,) * (len(size) - 2)

    def total(convolution, inputs, weights):
        out = convolution(inputs, weights, strides, "SAME", dimension_numbers=layout)
        return jnp.sum(jnp.sin(out) * jnp.arange(out.size).reshape(out.shape)), out.shape

    got, expected = (
        jax.jit(jax.value_and_grad(functools.partial(total, each), argnums=(0, 1), has_aux=True))(
            *operands
        )
        for each in (nets.conv_general_dilated, jax.lax.conv_general_dilated)
    )
    assert_close(got, expected)


def test_what_the_rules_do_not_know_is_xlas_own():
    whole = jnp.ones((1, 4, 5, 6, 2)), jnp.ones((2, 2, 2, 2, 3))  # three axes
    half = jnp.ones((1, 5, 5, 2), jnp.bfloat16), jnp.ones((3, 3, 2, 2), jnp.bfloat16)
    batches = jnp.ones((4, 5, 5, 2)), jnp.ones((3, 3, 2, 4))
    layouts = ("NDHWC", "DHWIO", "NDHWC"), LAYOUT, LAYOUT
    for operands, layout, count in zip((whole, half, batches), layouts, (1, 1, 2), strict=True):

        def convolution(*operands, layout=layout, count=count):
            strides = (1,) * (operands[0].ndim - 2)
            return nets.conv_general_dilated(
                *(*operands, strides, "VALID"), None, None, layout, batch_group_count=count
            )

        out, _ = jax.jvp(convolution, operands, operands)  # XLA's own has a forward-mode derivative
        assert out.dtype == operands[0].dtype
    with pytest.raises((TypeError, ValueError), match="feature"):
        convolve(nets.conv_general_dilated, jnp.ones((1, 5, 5, 3)), jnp.ones((3, 3, 2, 2)))


@pytest.fixture(scope="module", params=[9, 2], ids="channels {}".format)
def operands(request):
    rng = np.random.default_rng(0)
    return (
        jnp.asarray(rng.normal(size=(17, 7, 7, request.param)), jnp.float32),
        jnp.asarray(rng.normal(size=(3, 3, request.param, 4)), jnp.float32),
        jnp.asarray(rng.normal(size=(17, 5, 5, 4)), jnp.float32),
    )


@pytest.mark.floor
def test_second_derivatives_equal_xla(flags, operands):
    def penalty(convolution, inputs, kernel, seed):
        first = gradients(convolution, inputs, kernel, seed)
        return sum(jnp.sum(jnp.square(leaf)) for leaf in first)

    got, expected = (
        jax.grad(functools.partial(penalty, convolution), argnums=(0, 1))(*operands)
        for convolution in (nets.conv_general_dilated, jax.lax.conv_general_dilated)
    )
    assert_close(got, expected)


@pytest.mark.parametrize("size", [1, 2])
def test_second_derivatives_of_pictures_smaller_than_the_kernel(flags, size):
    inputs = jax.random.normal(jax.random.key(0), (4, size, size, 9))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 9, 2))

    def penalty(convolution, inputs, kernel):
        first = gradients(convolution, inputs, kernel, jnp.ones(()), padding="SAME")
        return sum(jnp.sum(jnp.square(leaf)) for leaf in first)

    got, expected = (
        jax.grad(functools.partial(penalty, convolution), argnums=(0, 1))(inputs, kernel)
        for convolution in (nets.conv_general_dilated, jax.lax.conv_general_dilated)
    )
    assert_close(got, expected)


def test_forward_mode_is_refused(operands):
    inputs, kernel, _ = operands
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda x: convolve(nets.conv_general_dilated, x, kernel), (inputs,), (inputs,))


@pytest.mark.floor
@pytest.mark.parametrize("in_axes", [(0, 0, None), (None, 0, None), (0, None, 0)], ids=str)
def test_vmapped_gradients_equal_the_loop(flags, operands, in_axes):
    scales = jnp.asarray([1.0, -2.0, 0.5])
    stacked = [
        operand if axis is None else jnp.stack([operand * scale for scale in scales])
        for operand, axis in zip(operands, in_axes, strict=True)
    ]
    grads = functools.partial(gradients, nets.conv_general_dilated)
    mapped = jax.jit(jax.vmap(grads, in_axes))(*stacked)
    values = jax.vmap(functools.partial(convolve, nets.conv_general_dilated), in_axes[:2])(
        *stacked[:2]
    )
    for run in range(3):
        single = [
            operand if axis is None else operand[run]
            for operand, axis in zip(stacked, in_axes, strict=True)
        ]
        assert_close([leaf[run] for leaf in mapped], grads(*single))
        assert_close(values[run], convolve(nets.conv_general_dilated, *single[:2]))


KINDS = {
    "3x3": ((3, 3, 9, 4), {}),
    "1x1": ((1, 1, 9, 4), {"padding": "SAME"}),
    "1x1 with strides": ((1, 1, 9, 4), {"strides": (2, 2)}),
    "depthwise": ((3, 3, 1, 9), {"feature_group_count": 9, "padding": "SAME"}),
}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "3x3"])
def test_gradients_of_stacked_kernels_equal_the_loop(kind):
    shape, kwargs = KINDS[kind]
    # Sixteen pictures are three steps of a depthwise kernel's sum.
    inputs, kernels = draw((16, 12, 12, 9), (3, *shape))
    grads = functools.partial(gradients, nets.conv_general_dilated, **kwargs)
    mapped = jax.jit(jax.vmap(grads, (None, 0, None)))(inputs, kernels, jnp.ones(()))
    for run in range(3):
        expected = gradients(
            jax.lax.conv_general_dilated, inputs, kernels[run], jnp.ones(()), **kwargs
        )
        assert_close([leaf[run] for leaf in mapped], expected)


@pytest.mark.floor
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "3x3"])
def test_pointwise_and_depthwise_convolutions_are_none_to_xla(kind):
    shape, kwargs = KINDS[kind]
    operands = draw((16, 12, 12, 9), shape)
    for convolution in (nets.conv_general_dilated, jax.lax.conv_general_dilated):
        grads = functools.partial(gradients, convolution, **kwargs)
        text = jax.jit(grads).lower(*operands, jnp.ones(())).as_text()
        assert ("stablehlo.convolution" in text) is not (convolution is nets.conv_general_dilated)


def test_gradients_inside_loops_equal_those_outside(operands):
    inputs, kernel, seed = operands

    def step(carry):
        first, second = gradients(nets.conv_general_dilated, *carry, seed)
        return carry[0] - 1e-4 * first, carry[1] - 1e-4 * second

    expected = (inputs, kernel)
    for _ in range(3):
        expected = step(expected)
    scanned, _ = jax.lax.scan(
        lambda carry, _: (step(carry), None), (inputs, kernel), None, length=3
    )
    assert_close(scanned, expected)
    looped = jax.lax.while_loop(
        lambda carry: carry[0] < 3,
        lambda carry: (carry[0] + 1, step(carry[1])),
        (0, (inputs, kernel)),
    )
    assert_close(looped[1], expected)


@pytest.mark.floor
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_a_batch_split_over_devices_equal_those_of_the_whole(kind):
    shape, kwargs = KINDS[kind]
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices: JAX_NUM_CPU_DEVICES=2")
    mesh = jax.sharding.Mesh(jax.devices()[:2], ("data",))
    split, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    inputs = jax.random.normal(jax.random.key(0), (34, 5, 5, 9))
    kernel = jax.random.normal(jax.random.key(1), shape)
    grads = functools.partial(gradients, nets.conv_general_dilated, **kwargs)
    weights = jnp.ones((34, 1, 1, 1))
    expected = grads(inputs, kernel, weights)
    mapped = jax.shard_map(
        grads, mesh=mesh, in_specs=(split, whole, split), out_specs=(split, whole)
    )
    assert_close(jax.jit(mapped)(inputs, kernel, weights), expected)


@pytest.mark.floor
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_other_platforms_get_xlas_own_operations(operands, platform):
    def lowered(net):
        def total(inputs, kernel):
            return jnp.sum(jnp.square(net(inputs, kernel)))

        traced = jax.jit(jax.grad(total, argnums=(0, 1))).trace(*operands[:2])
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        names = ("convolution", "dot_general", "slice", "while", "pad ", "select_and_scatter")
        return {name: text.count(f"stablehlo.{name}") for name in names}

    def ours(inputs, kernel):
        return nets.max_pool(convolve(nets.conv_general_dilated, inputs, kernel))

    def theirs(inputs, kernel):
        convolved = convolve(jax.lax.conv_general_dilated, inputs, kernel)
        return nn.max_pool(convolved, (2, 2), (2, 2))

    assert lowered(ours) == lowered(theirs)
    assert lowered(ours)["convolution"] == 3


@pytest.mark.floor
@pytest.mark.parametrize("shape", [(2, 6, 8, 3), (1, 7, 5, 2), (4, 4, 1), (2, 3, 4, 4, 2)])
def test_max_pool_and_its_gradient_equal_flax_also_in_ties(shape):
    rng = np.random.default_rng(0)
    # Four values over four places: most windows have a tie.
    inputs = jnp.asarray(rng.integers(0, 4, size=shape), jnp.float32)
    expected = nn.max_pool(inputs, (2, 2), (2, 2))
    np.testing.assert_array_equal(nets.max_pool(inputs), expected)
    seed = jnp.asarray(rng.normal(size=expected.shape), jnp.float32)
    got = jax.jit(jax.grad(lambda x: jnp.sum(seed * nets.max_pool(x))))(inputs)
    flat = inputs.reshape((-1, *shape[-3:]))
    reference = jax.grad(
        lambda x: jnp.sum(seed * nn.max_pool(x, (2, 2), (2, 2)).reshape(seed.shape))
    )(flat)
    np.testing.assert_array_equal(got, reference.reshape(shape))


def test_max_pool_has_a_forward_mode_derivative():
    inputs, tangent = jax.random.normal(jax.random.key(0), (2, 2, 4, 4, 3))
    out, derivative = jax.jvp(nets.max_pool, (inputs,), (tangent,))
    step = 1e-3
    np.testing.assert_allclose(
        derivative, (nets.max_pool(inputs + step * tangent) - out) / step, rtol=1e-2, atol=1e-3
    )
    with pytest.raises(ValueError, match=r"expected inputs of shape \[..., H, W, C\]"):
        nets.max_pool(jnp.ones((2, 2)))


WINDOWS = {
    "many members": ((8, 9), (1, 1), "SAME"),
    "overlapping": ((3, 3), (2, 2), "VALID"),
    "as in a ResNet": ((3, 3), (2, 2), "SAME"),
    "every place": ((2, 3), (1, 1), "SAME"),
    "gaps": ((2, 2), (3, 3), "VALID"),
    "parts of another size": ((3, 2), (3, 2), "VALID"),
    "padding": ((2, 3), (2, 1), ((1, 0), (2, 1))),
    "larger than the picture": ((9, 2), (1, 2), "VALID"),
}


@pytest.mark.floor
@pytest.mark.parametrize(("window", "strides", "padding"), WINDOWS.values(), ids=WINDOWS)
def test_max_pools_of_any_kind_equal_flax_also_in_ties(flags, window, strides, padding):
    inputs = jnp.asarray(np.random.default_rng(0).integers(-4, 4, size=(3, 8, 7, 2)), jnp.float32)
    out = nn.max_pool(inputs, window, strides, padding)
    np.testing.assert_array_equal(nets.max_pool(inputs, window, strides, padding), out)
    (seed,) = draw(out.shape)
    got, expected = (
        jax.jit(jax.grad(lambda x, pool=pool: jnp.sum(seed * pool(x, window, strides, padding))))(
            inputs
        )
        for pool in (nets.max_pool, nn.max_pool)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_a_window_that_is_none_is_refused():
    inputs = jnp.ones((1, 4, 4, 1))
    for bad in ({"window_shape": (2,)}, {"strides": (1, 1, 1)}, {"window_shape": (0, 2)}):
        with pytest.raises(ValueError, match=r"expected .*(window_shape|strides)"):
            nets.max_pool(inputs, **bad)
    for bad in ("FULL", ((2, 0), (0, 0)), ((0, 0),), 1, ((0.5, 0), (0, 0))):
        with pytest.raises(ValueError, match="expected padding"):
            nets.max_pool(inputs, padding=bad)


@pytest.mark.floor
def test_the_whole_net_has_the_gradients_of_xla():
    model = nets.ConvNet(features=((3, 4), (5,)), hidden=(7, 6), num_classes=3)
    params, _ = nets.init(model, jax.random.key(0), (16, 16, 2))
    inputs = jax.random.uniform(jax.random.key(2), (17, 16, 16, 2))
    keys = jax.random.split(jax.random.key(3), 17)

    def total(convolution, params, inputs):
        net = model.clone(conv_general_dilated=convolution)
        logits = net.apply({"params": params}, inputs, train=True, dropout_keys=keys)
        return -jnp.sum(jax.nn.log_softmax(logits)[:, 0])

    got, expected = (
        jax.jit(jax.grad(functools.partial(total, convolution), argnums=(0, 1)))(params, inputs)
        for convolution in (nets.conv_general_dilated, jax.lax.conv_general_dilated)
    )
    assert_close(got, expected)


# --- Networks of a user's own ---


class Own(nn.Module):
    """A plain Flax network: strides, groups, depthwise, overlapping pools, another pool."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="first")(x - 0.5))
        y = nn.relu(nn.Conv(16, (3, 3), strides=(2, 2), name="strided")(x))
        y = nn.Conv(16, (3, 3), feature_group_count=16, name="depthwise")(y)
        x = y + nn.Conv(16, (1, 1), strides=(2, 2), name="shortcut")(x)
        x = nn.relu(nn.Conv(16, (3, 3), feature_group_count=2, name="groups")(x))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        x = nn.avg_pool(x, (2, 2), (2, 2))
        return nn.Dense(5, name="logits")(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def own():
    """Its variables, inputs, and labels."""
    inputs = jax.random.uniform(jax.random.key(1), (12, 16, 16, 3))
    variables = Own().init(jax.random.key(0), inputs[:1])
    return variables, inputs, jnp.argmax(Own().apply(variables, inputs), axis=1)


def primitives(fun, *args):
    """The operations of a trace, without those in derivative rules and in choices by platform."""
    names, todo = [], [jax.make_jaxpr(fun)(*args).jaxpr]
    for jaxpr in todo:
        for equation in jaxpr.eqns:
            names.append(equation.primitive.name)
            params = equation.params
            if "custom" not in names[-1] and params.get("branches_platforms") is None:
                inner = [
                    getattr(each, "jaxpr", each) for each in jax.tree.leaves([*params.values()])
                ]
                todo += [each for each in inner if hasattr(each, "eqns")]
    return names


def scores(net, inputs):
    logits = net(inputs)
    return jnp.sum(jnp.sin(logits) * jnp.arange(logits.size).reshape(logits.shape))


@pytest.mark.floor
def test_a_plain_network_has_the_rules_and_the_values_of_xla(own):
    variables, inputs, _ = own
    net = nets.logits_fn(Own(), variables)
    plain = nets.fast_on_cpu(net, enabled=False)
    assert {"conv_general_dilated", "reduce_window_max"} <= {*primitives(plain, inputs)}
    assert not {"conv_general_dilated", "reduce_window_max"} & {*primitives(net, inputs)}
    got, expected = (
        jax.jit(jax.value_and_grad(scores, argnums=(0, 1)))(each, inputs) for each in (net, plain)
    )
    assert_close(got, expected)
    np.testing.assert_array_equal(net(inputs), Own().apply(variables, inputs))  # outside of jit


@jax.custom_jvp
def own_rule(x):
    return x**2


own_rule.defjvp(lambda primals, tangents: (own_rule(primals[0]), 7.0 * tangents[0]))
KERNELS = draw((3, 3, 9, 9), (3, 3, 9, 9))


def conv(x, kernel):
    return convolve(jax.lax.conv_general_dilated, x, kernel, padding="SAME")


INSIDE = {
    "jit": jax.jit(lambda x: jax.jit(conv)(x, KERNELS[0])),
    "scan": lambda x: jax.lax.scan(
        lambda c, k: (conv(c, k), jnp.sum(c)), x, jnp.stack(KERNELS), reverse=True
    ),
    "while": lambda x: jax.lax.fori_loop(0, jnp.asarray(3), lambda _, c: conv(c, KERNELS[1]), x),
    "cond": lambda x: jax.lax.cond(x.sum() > 0, lambda x: conv(x, KERNELS[0]), lambda x: 2 * x, x),
    "remat": jax.checkpoint(lambda x: jnp.sin(conv(jnp.sin(conv(x, KERNELS[0])), KERNELS[1]))),
    "vmap": lambda x: jax.vmap(lambda one: conv(one[None], KERNELS[0])[0])(x),
    "vmap over kernels": lambda x: jax.vmap(lambda k: conv(x, k))(jnp.stack(KERNELS)),
    "pytrees": lambda x: {"conv": (conv(x, KERNELS[0]), x, 3), "none": None},
    "a rule of its own": lambda x: own_rule(conv(x, KERNELS[0])),
    "one operand twice": lambda x: conv(x, KERNELS[0]) * conv(x, KERNELS[0]) + x * x,
    "gradient": lambda x: jax.grad(lambda x: jnp.sum(conv(x, KERNELS[0]) ** 3))(x),
    "nothing to replace": lambda x: jnp.cumsum(jnp.sin(x), axis=1),
}


@pytest.mark.floor
@pytest.mark.parametrize("name", INSIDE)
def test_what_is_around_a_convolution_stays(name):
    fun, (inputs,) = INSIDE[name], draw((4, 6, 6, 9))
    fast, plain = (nets.fast_on_cpu(fun, enabled=enabled) for enabled in (True, False))
    if name != "scan" or jax.__version_info__ < (0, 11):  # of later ones scans stay as they are
        assert "conv_general_dilated" not in primitives(fast, inputs)
    assert ("conv_general_dilated" in primitives(plain, inputs)) == (name[:7] != "nothing")
    assert_close(jax.jit(fast)(inputs), jax.jit(plain)(inputs))
    if name != "while":  # which has no gradient

        def total(fun, x):
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(fun(x)))

        got, expected = (jax.grad(functools.partial(total, each))(inputs) for each in (fast, plain))
        assert_close(got, expected)


def test_a_function_is_traced_once_and_with_its_options():
    calls = []

    def fun(variables, x, *, train, key, scale=1.0):
        calls.append(train)
        noise = 0.0 if key is None else jax.random.normal(key, x.shape)
        return scale * conv(x, variables["kernel"]) + noise, {**variables, "train": train}

    fast, (inputs,) = nets.fast_on_cpu(fun), draw((2, 6, 6, 9))
    variables = {"kernel": KERNELS[0], "nothing": None}
    outside = jnp.float32(2.0)

    @jax.jit
    def call(variables, x, key):
        traced = outside * x.mean()  # a tracer that the function sees as an option
        return fast(variables, x, train=True, key=key, scale=traced)

    for seed in (0, 1):
        key = jax.random.key(seed)
        out, state = call(variables, inputs, key)
        expected, _ = fun(variables, inputs, train=True, key=key, scale=2 * inputs.mean())
        assert_close(out, expected)
        assert state["train"] == 1
        assert state["nothing"] is None
    assert calls == [True] * 3


def test_equal_networks_share_a_trace_and_the_switch_is_kept(own):
    variables, inputs, _ = own
    traces = []

    @jax.jit
    def call(net, x):
        traces.append(1)
        return net(x)

    for factor in (1.0, 2.0):
        scaled = jax.tree.map(lambda leaf, factor=factor: factor * leaf, variables)
        net = nets.logits_fn(Own(), scaled)
        call(net, inputs)
        call(nets.fast_on_cpu(net), inputs)
    assert len(traces) == 1
    plain = nets.fast_on_cpu(net, enabled=False)
    for again in (
        nets.fast_on_cpu(plain),
        nets.callable_logits_fn(plain),
        nets.with_temperature(plain, 2.0),
        nets.fast_on_cpu(nets.with_temperature(net, 2.0), enabled=False),
        nets.callable_logits_fn(nets.fast_on_cpu(lambda x: Own().apply(scaled, x), enabled=False)),
    ):
        assert "conv_general_dilated" in primitives(again, inputs)


def test_what_a_disabled_network_calls_is_disabled(own):
    variables, inputs, _ = own
    net = nets.logits_fn(Own(), variables)
    for outer in (lambda x: 2 * net(x), Partial(lambda inner, x: 2 * inner(x), net)):
        off = nets.fast_on_cpu(outer, enabled=False)
        assert "conv_general_dilated" in primitives(off, inputs)
        assert "conv_general_dilated" not in primitives(nets.fast_on_cpu(outer), inputs)


def pooled(window, padding="VALID"):
    return lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, padding)


ODD_POOLS = {
    "negative padding": (pooled((1, 2, 2, 1), ((0, 0), (-1, 0), (0, 1), (0, 0))), (2, 6, 6, 2)),
    "no examples": (pooled((1, 2, 1)), (0, 6, 2)),
    "one axis": (pooled((1, 2, 1)), (3, 6, 2)),
    "channels first": (pooled((1, 1, 2, 3)), (3, 2, 6, 7)),
    "over examples": (pooled((2, 1, 2, 1)), (4, 3, 6, 2)),
    "over channels": (pooled((1, 1, 2, 2)), (2, 3, 6, 4)),
    "three axes": (pooled((1, 2, 2, 2, 1)), (2, 4, 4, 4, 2)),
    "many members": (pooled((1, 9, 9, 1)), (2, 9, 9, 2)),
}


@pytest.mark.parametrize("name", ODD_POOLS)
def test_pools_of_any_axes_equal_xlas(name):
    fun, shape = ODD_POOLS[name]
    (inputs,) = draw(shape)
    np.testing.assert_array_equal(jax.jit(nets.fast_on_cpu(fun))(inputs), jax.jit(fun)(inputs))
    if "negative" in name:  # of which XLA has no gradient
        return
    got, expected = (
        jax.jit(jax.value_and_grad(lambda x, each=each: jnp.sum(jnp.sin(each(x)))))(inputs)
        for each in (nets.fast_on_cpu(fun), fun)
    )
    np.testing.assert_allclose(got[0], expected[0], rtol=1e-5)
    np.testing.assert_allclose(got[1], expected[1], rtol=1e-6, atol=1e-7)


def test_what_is_no_tracer_stays_as_it_is():
    (inputs,) = draw((2, 6, 6, 9))

    def fun(mask, number, x):
        assert isinstance(mask, np.ndarray)
        y = conv(x, KERNELS[0])[..., mask] * (2.0 if number > 0 else 1.0)
        return y.sum(), {"function": jnp.sin, "three": 3, "mask": mask}

    fast, mask = nets.fast_on_cpu(fun), np.arange(9) < 4
    number = np.int32(1)
    got = jax.grad(lambda x: fast(mask, number, x)[0])(inputs)
    assert_close(got, jax.grad(lambda x: fun(mask, number, x)[0])(inputs))
    kept = []
    jax.jit(lambda x: kept.append(fast(mask, number, x)[1]) or x)(inputs)
    assert kept[0]["function"] is jnp.sin
    assert kept[0]["three"] == 3
    assert kept[0]["mask"] is mask


def test_a_module_that_would_lose_its_updates_is_refused():
    with pytest.raises(ValueError, match=r"the NNX module Linear, whose updates would be lost"):
        nets.fast_on_cpu(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))


@pytest.mark.floor
def test_inputs_whose_type_says_how_they_are_split():
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices: JAX_NUM_CPU_DEVICES=2")
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=explicit, devices=jax.devices()[:2])
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    inputs, kernel = draw((4, 6, 6, 2), (3, 3, 2, 2))

    def fun(x, kernel):
        return jnp.sum(jnp.sin(pooled((1, 2, 2, 1))(conv(x, kernel))), axis=(1, 2))

    fast = nets.fast_on_cpu(fun)
    got = jax.jit(fast)(jax.device_put(inputs, split), jax.device_put(kernel, whole))
    assert_close(got, fun(inputs, kernel))


def test_other_backends_have_the_function_as_it_is(own, monkeypatch):
    variables, inputs, _ = own
    net = nets.logits_fn(Own(), variables)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    plain = nets.fast_on_cpu(net, enabled=False)
    assert str(jax.make_jaxpr(net)(inputs)) == str(jax.make_jaxpr(plain)(inputs))


def test_forward_mode_is_there_without_the_rules(own):
    variables, inputs, _ = own
    net = nets.logits_fn(Own(), variables)
    with pytest.raises(TypeError, match="forward-mode") as caught:
        jax.jvp(net, (inputs,), (inputs,))
    assert "pass nets.fast_on_cpu(network, enabled=False)" in caught.value.__notes__[0]
    _, tangent = jax.jvp(nets.fast_on_cpu(net, enabled=False), (inputs,), (inputs,))
    assert tangent.shape == (12, 5)


@dataclasses.dataclass(frozen=True)
class Apply:
    """A user's own `ApplyFn`."""

    def __call__(self, params, model_state, inputs, *, train, key):
        return Own().apply({"params": params}, inputs), model_state


def test_attacks_measures_and_training_use_the_rules_by_themselves(own):
    variables, inputs, labels = own
    forms = {
        "Linen": nets.logits_fn(Own(), variables),
        "plain": lambda x: Own().apply(variables, x),
        "Partial": Partial(Own().apply, variables),
    }
    off = nets.fast_on_cpu(forms["Linen"], enabled=False)
    pgd = functools.partial(attacks.pgd, eps=0.05, num_steps=3, random_start=False)
    expected = pgd(off, None, inputs, labels)
    for net in forms.values():
        result = pgd(net, None, inputs, labels)
        np.testing.assert_array_equal(result.success, expected.success)
        assert_close(result.inputs, expected.inputs, 1e-3)
        assert_close(
            metrics.sensitivity_logits(net, inputs), metrics.sensitivity_logits(off, inputs)
        )
    batch = Batch(inputs, labels, None, jnp.ones(12))
    off = nets.fast_on_cpu(Apply(), enabled=False)
    optimizer = train.sgd(0.1)
    updated = []
    for apply in (Apply(), nets.apply_fn(Own()), Partial(Apply()), off):
        step, is_fast = train.make_train_step(apply, optimizer), apply is not off
        assert step == train.make_train_step(apply, optimizer)
        state = train.create_state(step, variables["params"], jax.random.key(0))
        names = primitives(step, state, batch, train.hard_loss())
        assert ("conv_general_dilated" in names) is not is_fast
        updated.append(jax.jit(step)(state, batch, train.hard_loss())[0].params)
        evaluated, _ = train.make_eval_step(apply)(state, batch, train.hard_loss())
        assert evaluated.step == 0
    for params in updated[:-1]:
        assert_close(params, updated[-1])


@pytest.mark.floor
def test_jacobians_of_a_stack_are_those_of_its_networks():
    """They sum over arrays of rank 7, over which jaxlib 0.10 may crash or hang (jax#39257)."""
    model = nets.digits_net(width=0.125)
    networks = []
    for seed in range(2):
        params, state = nets.init(model, jax.random.key(seed), (8, 8, 1))
        networks.append(nets.logits_fn(model, {"params": params, **state}))
    inputs = jax.random.uniform(jax.random.key(2), (3, 8, 8, 1))

    def jacobians(network, inputs):
        return jax.vmap(jax.jacrev(lambda one: network(one[None])[0]))(inputs)

    stacked = jax.jit(jax.vmap(jacobians, (0, None)))
    program = stacked.lower(nets.stack(networks), inputs).as_text("hlo")
    assert re.search(r"transpose\.\d+ = f32\[(\d+,){6}\d+\]", program)  # the case is there
    found = stacked(nets.stack(networks), inputs)
    for one, network in zip(found, networks, strict=True):
        assert_close(one, jax.jit(jacobians)(network, inputs))
