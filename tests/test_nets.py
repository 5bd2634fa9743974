import collections
import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from jdistill import attacks, data, nets, train


def count_parameters(model, input_shape):
    shapes, state = jax.eval_shape(
        lambda key: nets.init(model, key, input_shape), jax.random.key(0)
    )
    assert state == {}
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


@pytest.fixture(scope="module")
def tiny():
    """A small net with two convolutions in its block, and its variables."""
    model = nets.ConvNet(features=((3, 4), (5,)), hidden=(7, 6), num_classes=3)
    params, _ = nets.init(model, jax.random.key(0), (16, 16, 2))
    # Biases start at zero; a test of the forward pass wants them to matter.
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params
    )
    return model, params


# Architecture


@pytest.mark.floor
def test_papers_nets_have_the_papers_number_of_parameters():
    assert count_parameters(nets.mnist_net(), (28, 28, 1)) == 312_202
    assert count_parameters(nets.cifar_net(), (32, 32, 3)) == 1_147_978


def test_digits_net_is_small():
    assert count_parameters(nets.digits_net(), (8, 8, 1)) < 50_000


def test_width_scales_every_hidden_size_and_not_the_classes():
    half = nets.mnist_net(width=0.5, num_classes=7)
    assert half.features == ((16, 16), (32, 32))
    assert half.hidden == (100, 100)
    assert half.num_classes == 7
    least = nets.mnist_net(width=1e-6)
    assert least.features == ((1, 1), (1, 1))
    assert least.hidden == (1, 1)
    assert nets.cifar_net(width=1.5).features == ((96, 96), (192, 192))


def reference_forward(params, inputs, features, hidden):
    """The forward pass in NumPy float64, from the paper's description alone."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = np.asarray(inputs, np.float64) - 0.5
    for block, sizes in enumerate(features):
        for position in range(len(sizes)):
            layer = params[f"conv_{block}_{position}"]
            windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))
            x = np.einsum("bhwcij,ijco->bhwo", windows, layer["kernel"]) + layer["bias"]
            x = np.maximum(x, 0)
        height, width = x.shape[1] // 2, x.shape[2] // 2
        pooled = np.full((len(x), height, width, x.shape[3]), -np.inf)
        for row in range(height):
            for column in range(width):
                window = x[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
                pooled[:, row, column] = window.max(axis=(1, 2))
        x = pooled
    x = x.reshape(len(x), -1)
    for number in range(len(hidden)):
        layer = params[f"dense_{number}"]
        x = np.maximum(x @ layer["kernel"] + layer["bias"], 0)
    return x @ params["logits"]["kernel"] + params["logits"]["bias"]


@pytest.mark.floor
def test_forward_pass_equals_numpy(tiny):
    model, params = tiny
    inputs = np.random.default_rng(0).uniform(size=(5, 16, 16, 2)).astype(np.float32)
    expected = reference_forward(params, inputs, model.features, model.hidden)
    got = model.apply({"params": params}, inputs)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_kernels_start_glorot_uniform_and_biases_at_zero():
    params, _ = nets.init(nets.mnist_net(), jax.random.key(0), (28, 28, 1))
    for name, fans in {"conv_1_0": 9 * (32 + 64), "dense_0": 1024 + 200}.items():
        limit = math.sqrt(6 / fans)
        kernel = np.asarray(params[name]["kernel"])
        assert np.abs(kernel).max() <= limit
        assert np.abs(kernel).max() > 0.99 * limit
        assert kernel.std() == pytest.approx(limit / math.sqrt(3), rel=0.02)
        assert not params[name]["bias"].any()


def test_lists_are_taken_as_tuples_and_equal_nets_are_equal():
    model = nets.ConvNet(features=[[4], [5]], hidden=[6])
    assert model == nets.ConvNet(features=((4,), (5,)), hidden=(6,))
    assert hash(model) == hash(nets.ConvNet(features=((4,), (5,)), hidden=(6,)))
    assert model != nets.ConvNet(features=((4,), (6,)), hidden=(6,))


def test_a_net_without_hidden_layers_needs_no_keys():
    model = nets.ConvNet(features=((4,),), hidden=(), num_classes=3)
    params, _ = nets.init(model, jax.random.key(0), (8, 8, 1))
    assert model.apply({"params": params}, jnp.zeros((2, 8, 8, 1)), train=True).shape == (2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nets.mnist_net(width=0.0), "width > 0, got 0.0"),
        (lambda: nets.mnist_net(width=float("nan")), "width > 0, got nan"),
        (lambda: nets.mnist_net(dropout_rate=1.0), r"dropout_rate in \[0, 1\), got 1.0"),
        (lambda: nets.mnist_net(num_classes=0), "num_classes to be a whole number"),
        (lambda: nets.ConvNet(features=((32, 0),)), "features to be a whole number"),
        (lambda: nets.ConvNet(hidden=(2.5,)), "hidden to be a whole number"),
        (lambda: nets.init(nets.mnist_net(), jax.random.key(0), (28, 28)), "inputs of rank 4"),
        (lambda: nets.init(nets.mnist_net(), jax.random.key(0), (8, 8, 1)), "at block 1, got 2x2"),
    ],
)
def test_bad_networks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Dropout


@functools.cache
def dropout_probe():
    """Inputs of one, a first hidden layer that copies them, and an identity on top."""
    model = nets.ConvNet(features=(), hidden=(400,), num_classes=400, shift=0.0)
    params, _ = nets.init(model, jax.random.key(0), (20, 20, 1))
    eye = {"kernel": jnp.eye(400), "bias": jnp.zeros(400)}
    return model, {"params": {**params, "dense_0": eye, "logits": eye}}


@pytest.mark.floor
def test_dropout_keeps_half_and_doubles_it():
    model, variables = dropout_probe()
    keys = jax.random.split(jax.random.key(0), 100)
    ones = jnp.ones((100, 20, 20, 1))
    out = np.asarray(model.apply(variables, ones, train=True, dropout_keys=keys))
    assert set(np.unique(out)) == {0.0, 2.0}
    # 40,000 fair coins: five standard deviations are 0.0125.
    assert abs((out > 0).mean() - 0.5) < 0.0125
    assert len(np.unique(out, axis=0)) == 100
    np.testing.assert_array_equal(model.apply(variables, ones), np.ones((100, 400)))


def test_dropout_rate_is_the_share_dropped():
    model, variables = dropout_probe()
    keys = jax.random.split(jax.random.key(0), 100)
    out = model.clone(dropout_rate=0.2).apply(
        variables, jnp.ones((100, 20, 20, 1)), train=True, dropout_keys=keys
    )
    assert abs(float((out == 0).mean()) - 0.2) < 0.01
    np.testing.assert_allclose(out[out > 0], 1.25)


def test_dropout_of_an_example_does_not_depend_on_its_batch(tiny):
    model, params = tiny
    apply = jax.jit(functools.partial(nets.apply_fn(model), train=True))
    inputs = jax.random.uniform(jax.random.key(2), (6, 16, 16, 2))
    keys = jax.random.split(jax.random.key(3), 6)
    whole, _ = apply(params, {}, inputs, key=keys)
    halves = [
        apply(params, {}, inputs[part], key=keys[part])[0] for part in np.split(np.arange(6), 2)
    ]
    np.testing.assert_allclose(jnp.concatenate(halves), whole, rtol=1e-5, atol=1e-6)
    order = np.array([3, 1, 5, 0, 2, 4])
    np.testing.assert_allclose(
        apply(params, {}, inputs[order], key=keys[order])[0], whole[order], rtol=1e-5, atol=1e-6
    )
    other, _ = apply(params, {}, inputs, key=keys[order])
    assert not np.allclose(other, whole)


def test_training_without_keys_is_refused_unless_nothing_is_dropped(tiny):
    model, params = tiny
    inputs = jnp.zeros((2, 16, 16, 2))
    with pytest.raises(ValueError, match=r"dropout_keys .* got None; pass one PRNG key"):
        nets.apply_fn(model)(params, {}, inputs, train=True, key=None)
    logits, _ = nets.apply_fn(model.clone(dropout_rate=0.0))(
        params, {}, inputs, train=True, key=None
    )
    assert logits.shape == (2, 3)


# Adapters


def counted(fun):
    """`jit(fun)` and the list that grows by one at each trace."""
    traces = []

    @jax.jit
    def compiled(*args):
        traces.append(None)
        return fun(*args)

    return compiled, traces


def call(net, inputs):
    return net(inputs)


def small_net(seed):
    model = nets.ConvNet(features=((4,),), hidden=(5,), num_classes=3)
    params, _ = nets.init(model, jax.random.key(seed), (8, 8, 1))
    return nets.logits_fn(model, {"params": params})


class NnxNet(nnx.Module):
    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, inputs):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(inputs)))))


def linear(weights, inputs):
    return inputs.reshape((len(inputs), -1)) @ weights


MAKERS = {
    "linen": (small_net, (8, 8, 1)),
    "nnx": (lambda seed: nets.nnx_logits_fn(NnxNet(seed)), (4,)),
    "callable": (
        lambda seed: nets.callable_logits_fn(
            linear, jax.random.normal(jax.random.key(seed), (4, 3))
        ),
        (4,),
    ),
    "binary": (
        lambda seed: nets.binary(
            nets.callable_logits_fn(linear, jax.random.normal(jax.random.key(seed), (4, 1)))
        ),
        (4,),
    ),
    "temperature": (
        lambda seed: nets.with_temperature(
            nets.callable_logits_fn(linear, jax.random.normal(jax.random.key(seed), (4, 3))),
            1.0 + seed,
        ),
        (4,),
    ),
}


@pytest.mark.floor
@pytest.mark.parametrize("name", MAKERS)
def test_new_weights_compile_nothing_and_stacks_map(name):
    make, shape = MAKERS[name]
    inputs = jax.random.uniform(jax.random.key(9), (6, *shape))
    compiled, traces = counted(call)
    networks = [make(seed) for seed in range(3)]
    singles = [compiled(net, inputs) for net in networks]
    assert len(traces) == 1
    assert not np.allclose(singles[0], singles[1])
    stacked = nets.stack(networks)
    mapped = jax.vmap(call, in_axes=(0, None))(stacked, inputs)
    np.testing.assert_allclose(mapped, jnp.stack(singles), rtol=1e-5, atol=1e-6)
    for number, net in enumerate(nets.unstack(stacked)):
        np.testing.assert_array_equal(compiled(net, inputs), singles[number])
        np.testing.assert_array_equal(
            compiled(nets.index(stacked, number), inputs), singles[number]
        )
    assert len(traces) == 1


@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_a_single_logit_as_two_classes(shape):
    inputs = jnp.linspace(-2, 2, 5)[:, None]
    logits = nets.binary(lambda x: x.reshape(shape))(inputs)
    np.testing.assert_allclose(jax.nn.softmax(logits)[:, 1], jax.nn.sigmoid(inputs[:, 0]), 1e-6)
    assert jnp.argmax(logits, axis=1).tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(ValueError, match=r"expected one logit per example, .* got \(5, 2\)"):
        nets.binary(lambda x: jnp.tile(x, 2))(inputs)


def test_apply_fns_of_equal_modules_share_a_trace():
    @functools.partial(jax.jit, static_argnums=0)
    def step(apply, params, inputs):
        traces.append(None)
        return apply(params, {}, inputs, train=False, key=None)[0]

    traces = []
    params, _ = nets.init(nets.digits_net(), jax.random.key(0), (8, 8, 1))
    for _ in range(2):
        step(nets.apply_fn(nets.digits_net()), params, jnp.zeros((2, 8, 8, 1)))
    assert len(traces) == 1
    assert nets.apply_fn(nets.digits_net()) != nets.apply_fn(nets.digits_net(num_classes=9))


class Normed(nn.Module):
    """A user's module: batch statistics, `nn.Dropout` and the usual `train` switch."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5)(nn.Dense(6)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(3)(x)


@pytest.mark.floor
def test_a_users_module_with_batch_statistics_and_dropout():
    model = Normed()
    params, state = nets.init(model, jax.random.key(0), (4,))
    assert set(state) == {"batch_stats"}
    apply = nets.apply_fn(model)
    inputs = jax.random.normal(jax.random.key(1), (8, 4)) + 3.0
    keys = jax.random.split(jax.random.key(2), 8)
    logits, new_state = jax.jit(functools.partial(apply, train=True))(
        params, state, inputs, key=keys
    )
    expected = 0.5 * (inputs @ params["Dense_0"]["kernel"]).mean(0)
    np.testing.assert_allclose(new_state["batch_stats"]["BatchNorm_0"]["mean"], expected, rtol=1e-5)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    again, kept = apply(params, state, inputs, train=False, key=None)
    assert kept is state
    assert not np.allclose(logits, again)
    net = nets.logits_fn(model, {"params": params, **state})
    np.testing.assert_allclose(net(inputs), again, rtol=1e-5, atol=1e-6)


def test_a_module_without_a_switch_is_called_alike_in_both_modes():
    model = nn.Dense(3)
    params, state = nets.init(model, jax.random.key(0), (4,))
    apply = nets.apply_fn(model)
    inputs, keys = jnp.ones((2, 4)), jax.random.split(jax.random.key(1), 2)
    trained, _ = apply(params, state, inputs, train=True, key=keys)
    np.testing.assert_array_equal(trained, apply(params, state, inputs, train=False, key=None)[0])


class Deterministic(nn.Module):
    def __call__(self, x, deterministic: bool = True):
        return x


class TwoInputs(nn.Module):
    def __call__(self, x, labels):
        return x + labels


class ListField(nn.Module):
    table: np.ndarray

    def __call__(self, x):
        return x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nets.apply_fn(Deterministic()), "take `train`, got `deterministic`; wrap it"),
        (lambda: nets.apply_fn(TwoInputs()), "further argument `labels`; wrap it"),
        (lambda: nets.apply_fn(ListField(np.ones(2))), "hashable module, got ListField"),
        (lambda: nets.apply_fn(linear), "Flax Linen module, got function; use nnx_logits_fn"),
        (lambda: nets.logits_fn(nn.Dense(3), {"kernel": 1}), r"key 'params', got \['kernel'\]"),
        (lambda: nets.logits_fn(nn.Dense(3), None), "key 'params', got NoneType"),
        (lambda: nets.nnx_logits_fn(nn.Dense(3)), "NNX module, got Dense; use logits_fn"),
        (lambda: nets.callable_logits_fn(3), "expected a callable, got int"),
        (lambda: nets.with_temperature(linear, 0.0), "temperature > 0, got 0.0"),
        (lambda: nets.with_temperature(linear, float("nan")), "temperature > 0, got nan"),
        (lambda: nets.stack([]), "at least one pytree to stack, got none"),
        (lambda: nets.stack([{"a": 1}, {"b": 1}]), "one structure, got .* at index 1"),
        (lambda: nets.stack([np.ones(2), np.ones(3)]), "equal shapes, got .* at index 1"),
        (lambda: nets.unstack([np.ones(2), np.ones(3)]), "one common leading axis, got shapes"),
        (lambda: nets.unstack({}), "one common leading axis, got shapes"),
    ],
)
def test_bad_adapter_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_nnx_adapter_evaluates_and_leaves_the_module_alone():
    module = NnxNet(0)
    inputs = jax.random.normal(jax.random.key(1), (6, 4))
    net = nets.nnx_logits_fn(module)
    np.testing.assert_array_equal(net(inputs), net(inputs))
    assert not module.dropout.deterministic
    assert not module.norm.use_running_average
    before = net(inputs)
    module.last.bias[...] = module.last.bias[...] + 1.0
    np.testing.assert_array_equal(net(inputs), before)
    compiled, traces = counted(call)
    compiled(net, inputs)
    changed = compiled(nets.nnx_logits_fn(module), inputs)
    np.testing.assert_allclose(changed, before + 1.0, rtol=1e-5, atol=1e-5)
    assert len(traces) == 1


@jax.tree_util.register_pytree_node_class
class Affine:
    def __init__(self, weights):
        self.weights = weights

    def __call__(self, *args):
        return args[-1] @ self.weights + sum(args[:-1])

    def tree_flatten(self):
        return (self.weights,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_callables_that_are_pytrees_keep_their_leaves():
    affine = Affine(jnp.ones((4, 3)))
    inputs = jnp.ones((2, 4))
    for fun in (affine, Partial(linear, jnp.ones((4, 3)))):
        net = nets.callable_logits_fn(fun)
        assert nets.callable_logits_fn(net) is net
        assert jax.tree.leaves(net)[0] is jax.tree.leaves(fun)[0]
        np.testing.assert_array_equal(net(inputs), fun(inputs))
    shifted = nets.callable_logits_fn(affine, 2.0)
    np.testing.assert_array_equal(shifted(jnp.ones((1, 4))), jnp.full((1, 3), 6.0))
    assert len(jax.tree.leaves(shifted)) == 2


def test_temperature_divides_and_is_a_leaf():
    compiled, traces = counted(call)
    inputs = jnp.ones((2, 4))
    plain = linear(jnp.eye(4), inputs)
    for temperature in (1, 20.0, np.float64(100)):
        net = nets.with_temperature(Partial(linear, jnp.eye(4)), temperature)
        np.testing.assert_allclose(compiled(net, inputs), plain / temperature, rtol=1e-6)
    assert len(traces) == 1
    grad = jax.grad(lambda t: nets.with_temperature(linear_sum, t)(inputs).sum())(2.0)
    assert grad == pytest.approx(-8 / 4)


def linear_sum(inputs):
    return inputs.sum(axis=1, keepdims=True)


class Switched(nnx.Module):
    """A module that passes its mode on, as many do: then `eval()` alone changes nothing."""

    def __init__(self, switch, kind):
        rngs = nnx.Rngs(0)
        self.linear, self.switch = nnx.Linear(4, 3, rngs=rngs), switch
        self.dropout = nnx.Dropout(0.5, rngs=rngs) if kind == "dropout" else None
        self.norm = nnx.BatchNorm(3, rngs=rngs) if kind == "norm" else None

    def apply(self, x, training):
        x = self.linear(x)
        if self.dropout is not None:
            return self.dropout(x, deterministic=not training)
        return self.norm(x, use_running_average=not training)


class Train(Switched):
    def __call__(self, x, train=True):
        return self.apply(x, train)


class Required(Switched):
    def __call__(self, x, *, is_training):
        return self.apply(x, is_training)


class SwitchedOff(Switched):
    def __call__(self, x, deterministic=False):
        return self.apply(x, not deterministic)


class Average(Switched):
    def __call__(self, x, use_running_average=False):
        return self.apply(x, not use_running_average)


class Further(Switched):
    def __call__(self, x, scale):
        return self.apply(x * scale, False)


@pytest.mark.parametrize("kind", ["dropout", "norm"])
@pytest.mark.parametrize("module", [Train, Required, SwitchedOff, Average])
def test_an_nnx_module_that_takes_its_mode_is_evaluated(module, kind):
    made = module("mode", kind)
    inputs = np.random.default_rng(0).uniform(size=(20, 4)).astype(np.float32)
    net = nets.nnx_logits_fn(made)
    np.testing.assert_allclose(net(inputs), made.apply(inputs, False), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(jax.jit(lambda f, x: f(x))(net, inputs), net(inputs))


def test_an_nnx_module_that_needs_more_is_refused():
    with pytest.raises(ValueError, match="to need its inputs only, got the further argument `sca"):
        nets.nnx_logits_fn(Further("mode", "norm"))


@pytest.mark.parametrize("bad", [2, 9, -3, 0.5, "1", None, [0], True])
def test_an_index_beyond_the_stack_is_refused(bad):
    stack = nets.stack([{"w": jnp.zeros(3)}, {"w": jnp.ones(3)}])
    with pytest.raises(ValueError, match="expected the index of one of 2 runs"):
        nets.index(stack, bad)
    assert nets.index(stack, -1)["w"][0] == nets.index(stack, np.int32(1))["w"][0] == 1
    assert jax.jit(nets.index)(stack, 1)["w"][0] == 1


class Holder:
    """A network as an object, whose weights change when it is trained."""

    def __init__(self, weights):
        self.weights = weights

    def __call__(self, inputs):
        return inputs @ self.weights

    forward = __call__


class Outer:
    def __init__(self, inner):
        self.layers, self.name = {"inner": [inner]}, "outer"
        self.inner = inner

    def __call__(self, inputs):
        return self.inner(inputs)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """Settings alone, which compare by value."""

    factor: float

    def __call__(self, inputs):
        return self.factor * inputs


@pytest.mark.parametrize(
    "weights", [jnp.eye(3), np.eye(3), [np.eye(3)]], ids=["jax", "numpy", "list"]
)
@pytest.mark.parametrize(
    "form",
    [lambda made: made, lambda made: made.__call__, Outer],
    ids=["object", "method", "inner"],
)
def test_objects_that_hold_arrays_are_refused_since_their_changes_would_not_be_seen(form, weights):
    fun, inputs = form(Holder(weights)), jnp.eye(3) / 2
    for use in (
        lambda: nets.callable_logits_fn(fun),
        lambda: attacks.fgsm(fun, None, inputs, np.arange(3), eps=0.1),
        lambda: attacks.fgsm(lambda x: x, None, inputs, np.arange(3), eps=0.1, loss=fun),
    ):
        with pytest.raises(ValueError, match=r"holds arrays \((inner\.)?weights\), whose changes"):
            use()


def test_objects_without_arrays_and_functions_over_arrays_are_taken():
    weights = np.eye(3, dtype=np.float32)
    for fun in (Scaled(2.0), lambda x: x @ weights, functools.partial(lambda w, x: x @ w, weights)):
        assert nets.callable_logits_fn(fun)(jnp.ones((2, 3))).shape == (2, 3)


def test_logits_are_taken_out_of_outputs():
    logits = jnp.zeros((2, 3))
    Outputs = collections.namedtuple("Outputs", "features logits")
    assert nets.logits_of(logits) is logits
    assert nets.logits_of({"logits": logits, "features": 1}) is logits
    assert nets.logits_of(Outputs(1, logits)) is logits
    with pytest.raises(ValueError, match="key 'logits', got scores"):
        nets.logits_of({"scores": logits})


class NnxNetwork(nnx.Module):
    """Batch normalization, dropout, and features beside the logits."""

    def __init__(self, rngs):
        self.first = nnx.Linear(64, 16, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.5, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.second = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, inputs):
        hidden = nnx.relu(self.norm(self.first(inputs.reshape(inputs.shape[0], -1))))
        return {"logits": self.second(self.dropout(hidden)), "features": hidden}


@pytest.mark.floor
def test_an_nnx_model_trains_and_is_the_module():
    digits = data.load("digits")
    init, apply_fn = nets.nnx_model(NnxNetwork)
    assert nets.nnx_model(NnxNetwork)[1] == apply_fn
    params, model_state = init(jax.random.key(0), (8, 8, 1))
    step = train.make_train_step(apply_fn, train.sgd(0.05))
    state = train.create_state(step, params, jax.random.key(1), model_state=model_state)
    examples = digits.train.inputs[:600], digits.train.labels[:600]
    state = train.fit(step, state, examples, train.hard_loss(), num_epochs=4, batch_size=50)
    network = train.logits_fn(step, state)
    logits = train.predict(network, digits.test.inputs)
    assert (logits.argmax(1) == digits.test.labels).mean() > 0.8
    # The same weights in a module of NNX's own, in evaluation mode.
    module = NnxNetwork(nnx.Rngs(0))
    graphdef, weights, random, rest = nnx.split(module, nnx.Param, nnx.RngState, ...)
    nnx.replace_by_pure_dict(weights, state.params)
    nnx.replace_by_pure_dict(rest, state.model_state)
    module = nnx.merge(graphdef, weights, random, rest)
    module.eval()
    expected = module(digits.test.inputs)["logits"]
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
    adapted = nets.nnx_logits_fn(module)(digits.test.inputs)
    np.testing.assert_allclose(adapted, expected, rtol=1e-4, atol=1e-4)


def test_dropout_of_an_nnx_model_is_drawn_from_the_key():
    init, apply_fn = nets.nnx_model(NnxNetwork)
    params, model_state = init(jax.random.key(0), (8, 8, 1))
    inputs = jax.random.uniform(jax.random.key(3), (2, 8, 8, 1))

    def logits(seed):
        keys = jax.random.split(jax.random.key(seed), 2)
        return apply_fn(params, model_state, inputs, train=True, key=keys)[0]["logits"]

    np.testing.assert_array_equal(logits(1), logits(1))
    assert np.abs(logits(1) - logits(2)).max() > 0


def test_a_missing_model_state_is_named():
    class Normalized(nn.Module):
        @nn.compact
        def __call__(self, x, *, train=False):
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(3)(x))

    model = Normalized()
    params, _ = nets.init(model, jax.random.key(0), (4,))
    with pytest.raises(ValueError, match=r"all variables .*model state"):
        nets.apply_fn(model)(params, {}, jnp.ones((2, 4)), train=False, key=None)
