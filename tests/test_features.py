"""Networks that return outputs of their layers, and frozen ones with all that they return."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jdistill import distill, losses, nets, study, train

KEY = jax.random.key(0)
SHAPE = (8, 8, 1)


class Inner(nn.Module):
    """A part with a part."""

    @nn.compact
    def __call__(self, x):
        self.sow("intermediates", "mean", x.mean())  # somebody's own
        return nn.relu(nn.Dense(5, name="dense")(x))


class Normalized(nn.Module):
    """A network with batch statistics, dropout, nested parts, and a part called twice."""

    @nn.compact
    def __call__(self, inputs, *, train=False):
        x = nn.Conv(3, (3, 3), name="conv")(inputs)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = Inner(name="inner")(x.mean((1, 2)))
        twice = nn.Dense(5, name="twice")
        x = nn.Dropout(0.5, deterministic=not train, name="drop")(twice(twice(x)))
        return nn.Dense(4, name="logits")(x)


class Headed(nn.Module):
    """A network with a mapping of its own as outputs."""

    extra: str = "other"

    @nn.compact
    def __call__(self, inputs):
        x = nn.Dense(6, name="first")(inputs.reshape(len(inputs), -1))
        return {"logits": nn.Dense(4, name="last")(x), self.extra: x.sum(1)}


def images(number, seed=1):
    return np.random.default_rng(seed).uniform(size=(number, *SHAPE)).astype(np.float32)


def drawn(pair):
    params, state = pair[0](KEY, SHAPE)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: leaf + rng.uniform(0, 0.3, leaf.shape).astype(np.float32), (params, state)
    )


def close(got, expected, tolerance=1e-5):
    expected = np.asarray(expected)
    assert np.abs(expected).max() > 1e-2
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# Outputs


@pytest.mark.floor
@pytest.mark.parametrize("mode", ["train", "evaluation"])
def test_layers_are_those_of_numpy(mode):
    layers = {"map": "norm", "nested": "inner/dense", "part": "inner", "end": "logits"}
    pair = nets.with_features(Normalized(), layers)
    params, state = drawn(pair)
    inputs, training = images(6), mode == "train"
    keys = jax.random.split(KEY, 6) if training else None
    outputs, after = pair[1](params, state, inputs, train=training, key=keys)
    found = outputs["features"]
    assert set(outputs) == {"logits", "features"}
    assert set(found) == set(layers)
    close(found["end"], outputs["logits"], 0)

    weights, held = jax.tree.map(np.asarray, (params, state["batch_stats"]["norm"]))
    padded = np.pad(inputs, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    convolved = np.einsum("bhwcij,ijco->bhwo", windows, weights["conv"]["kernel"])
    convolved += weights["conv"]["bias"]
    mean, var = held["mean"], held["var"]
    if training:
        mean, var = convolved.mean((0, 1, 2)), convolved.var((0, 1, 2))
    expected = (convolved - mean) / np.sqrt(var + 1e-5) * weights["norm"]["scale"]
    expected += weights["norm"]["bias"]
    close(found["map"], expected, 1e-4)
    inner = weights["inner"]["dense"]
    expected = np.asarray(found["map"]).mean((1, 2)) @ inner["kernel"] + inner["bias"]
    close(found["nested"], expected)
    close(found["part"], np.maximum(expected, 0))

    # All but the features is as without them.
    plain, same = nets.apply_fn(Normalized())(params, state, inputs, train=training, key=keys)
    close(outputs["logits"], plain, 0)
    jax.tree.map(np.testing.assert_array_equal, after, same)
    assert training or after is state


@pytest.mark.floor
def test_the_networks_own_mapping_stays():
    pair = nets.with_features(Headed(), {"hidden": "first"})
    params, state = drawn(pair)
    outputs, _ = pair[1](params, state, images(3), train=True, key=jax.random.split(KEY, 3))
    assert set(outputs) == {"logits", "other", "features"}
    close(outputs["other"], np.asarray(outputs["features"]["hidden"]).sum(1))
    assert nets.logits_of(outputs) is outputs["logits"]


@pytest.mark.floor
def test_the_two_heads_of_a_deit_stay_and_so_does_what_is_skipped():
    model = nets.vit_digits(width=0.5, distillation_token=True, drop_path_rate=0.5)
    pair = nets.with_features(model, {"last": "block_3"})
    params, state = drawn(pair)
    keys = jax.random.split(KEY, 4)
    for training in (True, False):
        options = {"train": training, "key": keys if training else None}
        outputs, _ = pair[1](params, state, images(4), **options)
        plain, _ = nets.apply_fn(model)(params, state, images(4), **options)
        assert set(outputs) == {*plain, "features"}
        for name, value in plain.items():
            close(outputs[name], value, 1e-4)
        assert outputs["features"]["last"].shape == (4, 18, 32)


@pytest.mark.floor
def test_queries_keys_and_values_of_every_block_make_its_attention():
    model, heads = nets.vit_digits(width=0.5), 2
    names = ("query", "key", "value", "out")
    layers = {f"{name} {i}": f"block_{i}/{name}" for i in range(4) for name in names}
    pair = nets.with_features(model, layers)
    params, state = drawn(pair)
    outputs, _ = pair[1](params, state, images(2), train=False, key=None)
    close(outputs["logits"], nets.logits_fn(model, {"params": params})(images(2)), 1e-4)
    for number in range(4):
        query, key, value, got = (
            np.asarray(outputs["features"][f"{name} {number}"], np.float64) for name in names
        )
        assert query.shape == (2, 17, 32)
        query, key, value = (each.reshape(2, 17, heads, 16) for each in (query, key, value))
        scores = np.einsum("bqhd,bkhd->bhqk", query, key) / 4
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("bhqk,bkhd->bqhd", weights, value).reshape(2, 17, 32)
        layer = params[f"block_{number}"]["out"]
        close(got, mixed @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"]))


# Projections


@pytest.mark.floor
def test_projections_are_linear_on_the_last_axis_and_trained_with_the_network():
    layers = {"map": "conv_0_0", "vector": "dense_0", "plain": "conv_0_1"}
    model = nets.digits_net(width=0.25, dropout_rate=0.0)
    pair = nets.with_features(model, layers, projections={"map": 7, "vector": 3})
    params, state = pair[0](KEY, SHAPE)
    plain, _ = nets.init(model, KEY, SHAPE)
    assert set(params) == {"network", "projections"}
    jax.tree.map(np.testing.assert_array_equal, params["network"], plain)
    sizes = jax.tree.map(np.shape, params["projections"])
    assert sizes == {
        "map": {"kernel": (8, 7), "bias": (7,)},
        "vector": {"kernel": (16, 3), "bias": (3,)},
    }
    kernels = [params["projections"][name]["kernel"] for name in ("map", "vector")]
    assert min(float(jnp.std(kernel)) for kernel in kernels) > 0.1
    assert not np.array_equal(kernels[0][:8, :3], kernels[1][:8])

    params, state = drawn(pair)
    inputs = images(4)
    outputs, _ = pair[1](params, state, inputs, train=False, key=None)
    raw_pair = nets.with_features(model, layers)
    raw, _ = raw_pair[1](params["network"], state, inputs, train=False, key=None)
    close(outputs["logits"], raw["logits"], 0)
    close(outputs["features"]["plain"], raw["features"]["plain"], 0)
    for name in ("map", "vector"):
        layer = params["projections"][name]
        expected = np.asarray(raw["features"][name], np.float64) @ np.asarray(layer["kernel"])
        close(outputs["features"][name], expected + np.asarray(layer["bias"]))

    def total(params):
        outputs, _ = pair[1](params, state, inputs, train=False, key=None)
        return jnp.sum(jnp.square(outputs["features"]["map"]))

    gradient = jax.grad(total)(params)
    assert np.abs(gradient["projections"]["map"]["kernel"]).max() > 1e-2
    assert np.abs(gradient["network"]["conv_0_0"]["kernel"]).max() > 1e-2
    assert not np.any(gradient["projections"]["vector"]["kernel"])
    assert not np.any(gradient["network"]["conv_0_1"]["kernel"])


def test_a_student_learns_a_teachers_features_through_its_projection():
    teacher_model = nets.digits_net(width=0.5)
    teacher_pair = nets.with_features(teacher_model, {"hint": "conv_0_1"})
    weights, _ = drawn(teacher_pair)
    teacher = nets.outputs_fn(teacher_pair, {"params": weights})
    pair = nets.with_features(
        nets.digits_net(width=0.1), {"hint": "conv_0_1"}, projections={"hint": 16}
    )
    stage = study.Stage(model=pair, optimizer=train.sgd(0.02))
    params, state = stage.init(KEY, SHAPE)
    before, after = train.create_state(stage.step(), params, KEY, model_state=state), []
    loss = distill.feature_loss(1.0, teacher, layers={"hint": "hint"}, base=None)
    train.fit(
        stage.step(),
        before,
        (images(24), np.arange(24, dtype=np.int32) % 10),
        loss,
        num_epochs=8,
        batch_size=12,
        devices=jax.devices()[:1],
        callback=after.append,
    )
    epochs = [event for event in after if event["event"] == "epoch"]
    assert epochs[-1]["loss"] < 0.5 * epochs[0]["loss"]
    moved = epochs[-1]["state"].params
    for part in ("network", "projections"):
        old, new = (jax.tree.leaves(tree[part])[0] for tree in (params, moved))
        assert np.abs(np.asarray(old) - np.asarray(new)).max() > 1e-3
    # The loss of the last state, from its own features.
    outputs, _ = pair[1](moved, state, images(24), train=False, key=None)
    wanted = teacher(images(24))["features"]["hint"]
    apart = losses.hint(outputs["features"]["hint"], wanted)
    assert float(apart.mean()) < 0.5 * epochs[0]["loss"]


# Values


def test_equal_arguments_give_equal_pairs_and_one_trace():
    layers = {"a": "conv_0_0", "b": "conv_0_1"}
    make = functools.partial(nets.with_features, nets.digits_net())
    turned = dict(reversed(layers.items()))
    assert make(layers, projections={"a": 3}) == make(turned, projections={"a": 3})
    assert len({make(layers), make(turned), make(layers, projections={})}) == 1
    different = [make({"a": "conv_0_0"}), make(layers), make(layers, projections={"a": 3})]
    different.append(nets.with_features(nets.digits_net(0.5), layers))
    assert len(set(different)) == 4

    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def run(apply, params, inputs):
        traces.append(apply)
        return apply(params, {}, inputs, train=False, key=None)[0]

    params, _ = make(layers)[0](KEY, SHAPE)
    for each in (layers, turned):
        run(make(each)[1], params, images(2))
    assert len(traces) == 1


def test_fast_on_cpu_takes_such_networks():
    pair = nets.with_features(Normalized(), {"map": "conv"})
    params, state = drawn(pair)

    def total(apply, inputs):
        outputs, _ = apply(params, state, inputs, train=True, key=jax.random.split(KEY, 3))
        return jnp.sum(jnp.square(outputs["features"]["map"])) + jnp.sum(outputs["logits"])

    fast, plain = nets.fast_on_cpu(pair[1]), nets.fast_on_cpu(pair[1], enabled=False)
    gradients = [jax.grad(functools.partial(total, each))(images(3)) for each in (fast, plain)]
    close(*gradients)
    # It has reverse mode only, so the convolution is the library's.
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(functools.partial(total, fast), (images(3),), (images(3),))


def test_stacked_weights_run_side_by_side():
    pair = nets.with_features(Normalized(), {"map": "inner"})
    weights = [drawn(pair), jax.tree.map(lambda leaf: leaf * 0.9, drawn(pair))]
    one = functools.partial(pair[1], train=False, key=None)
    both, _ = jax.vmap(one, in_axes=(0, 0, None))(*nets.stack(weights), images(3))
    for number, (params, state) in enumerate(weights):
        alone, _ = one(params, state, images(3))
        close(both["features"]["map"][number], alone["features"]["map"])


# All outputs, frozen


@pytest.mark.floor
def test_outputs_of_a_module_and_of_a_pair():
    model = nets.vit_digits(width=0.25, distillation_token=True)
    params, _ = nets.init(model, KEY, SHAPE)
    outputs = nets.outputs_fn(model, {"params": params})(images(3))
    assert set(outputs) == {"logits", "class_logits", "distillation_logits"}
    close(outputs["logits"], nets.logits_fn(model, {"params": params})(images(3)))

    pair = nets.with_features(Normalized(), {"map": "conv"})
    params, state = drawn(pair)
    found = nets.outputs_fn(pair, {"params": params, **state})(images(3))
    expected, _ = pair[1](params, state, images(3), train=False, key=None)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    plain = nets.outputs_fn(Normalized(), {"params": params, **state})(images(3))
    close(plain, found["logits"], 0)


def test_outputs_of_an_nnx_pair():
    pair = nets.nnx_model(lambda rngs: nnx.Linear(3, 4, rngs=rngs))
    params, state = pair[0](KEY, (3,))
    inputs = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    found = nets.outputs_fn(pair, {"params": params, **state})(inputs)
    close(found, inputs @ np.asarray(params["kernel"]) + np.asarray(params["bias"]))


def test_a_frozen_network_is_a_pytree_of_its_weights():
    pair = nets.with_features(nets.digits_net(width=0.1), {"map": "conv_0_1"})
    params, _ = pair[0](KEY, SHAPE)
    traces = []

    @jax.jit
    def run(network, inputs):
        traces.append(network)
        return network(inputs)

    found = []
    for factor in (1.0, 0.5):
        weights = jax.tree.map(lambda leaf, by=factor: leaf * by, params)
        network = nets.outputs_fn(pair, {"params": weights})
        assert len(jax.tree.leaves(network)) == len(jax.tree.leaves(params))
        found.append(run(network, images(2))["features"]["map"])
    assert len(traces) == 1
    assert np.abs(found[0] - found[1]).max() > 1e-3


# Bad input


def call(model, layers, **options):
    pair = nets.with_features(model, layers, **options)
    params, state = nets.init(model, KEY, SHAPE)
    return pair[1](params, state, images(2), train=False, key=None)


DIGITS = nets.digits_net(width=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: call(DIGITS, {"a": "conv_9"}),
            r"layers of ConvNet, got 'conv_9'; pass one of conv_0_0, conv_0_1, dense_0, dense_1, "
            "logits$",
        ),
        (
            lambda: nets.with_features(Normalized(), {"a": "inner/none"})[0](KEY, SHAPE),
            "got 'inner/none'; pass one of conv, drop, inner, inner/dense, logits, norm, twice",
        ),
        (
            lambda: call(nets.vit_digits(), {"a": "block_9"}),
            "pass one of block_0, block_0/attention_norm, block_0/.*, and 9 more",
        ),
        (
            lambda: call(Normalized(), {"a": "twice"}),
            "layers that are called once, got 'twice', which Normalized calls 2 times",
        ),
        (
            lambda: call(Headed(extra="features"), {"a": "first"}),
            "without the key 'features', got logits, features",
        ),
        (
            lambda: call(Headed(extra="logit"), {"a": "first"}, projections={"b": 2}),
            "projections of a, got 'b'; add it to layers",
        ),
        (lambda: nets.with_features(DIGITS, {}), "layers of the model, got none"),
        (lambda: nets.with_features(DIGITS, ["a"]), "layers to be a mapping, got list"),
        (lambda: nets.with_features(DIGITS, {"a": 3}), r"layers\['a'\] to be text, got int"),
        (
            lambda: nets.with_features(DIGITS, {"a": "logits"}, projections={"a": 0}),
            r"projections\['a'\] to be a whole number >= 1, got 0",
        ),
        (lambda: nets.with_features(len, {"a": "b"}), "model to be a Flax Linen module"),
        (lambda: nets.outputs_fn(len, {"params": {}}), "model to be a Flax Linen module"),
        (lambda: nets.outputs_fn((len,), {"params": {}}), r"or \(init, apply_fn\), got 1 entries"),
        (lambda: nets.outputs_fn(DIGITS, {"weights": {}}), "the key 'params', got"),
    ],
)
def test_bad_requests_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
