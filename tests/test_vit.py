"""Vision transformers: sizes in closed form, the forward pass in NumPy, laws of their tokens."""

import functools
import itertools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import nets, train

KEY = jax.random.key(0)
SHAPE = (6, 9, 2)  # two rows of three patches
EXTRAS = ("distillation_token", "distillation_position", "distillation_logits")
small = functools.partial(nets.ViT, patch_size=3, width=8, depth=3, num_heads=2, num_classes=4)


@functools.cache
def drawn(token=False):
    """A small network whose every weight matters: attention is not even, biases are not 0."""
    model = small(distillation_token=token)
    params, _ = nets.init(model, KEY, SHAPE)
    rng = np.random.default_rng(0)
    return model, jax.tree.map(
        lambda leaf: leaf + rng.normal(0, 0.5, leaf.shape).astype(np.float32), params
    )


def images(number, seed=1, shape=SHAPE):
    return np.random.default_rng(seed).uniform(size=(number, *shape)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def apply(model, params, inputs, **options):
    return model.apply({"params": params}, inputs, **options)


def captured(model, params, inputs, **options):
    """The outputs, and those of every part."""
    outputs, state = model.apply(
        {"params": params}, inputs, mutable="intermediates", capture_intermediates=True, **options
    )
    return outputs, state["intermediates"]


# Architecture

DEIT = {
    "tiny": (nets.deit_tiny, 192, 5_717_416, 5_910_800),
    "small": (nets.deit_small, 384, 22_050_664, 22_436_432),
    "base": (nets.deit_base, 768, 86_567_656, 87_338_192),
}


def count_parameters(model, shape):
    drawn = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, *shape))), KEY)
    assert set(drawn) == {"params"}
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(drawn))


@pytest.mark.floor
@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize("size", DEIT)
def test_deits_have_their_published_number_of_parameters(size, token):
    make, width, *published = DEIT[size]
    model = make(distillation_token=token)
    assert count_parameters(model, (224, 224, 3)) == published[token]
    assert (model.width, model.num_heads * 64, model.depth) == (width, width, 12)
    blocks = 12 * (12 * width**2 + 13 * width)
    tokens = (14 * 14 + 2 * (1 + token)) * width
    heads = (1 + token) * (width + 1) * 1000
    assert published[token] == (16 * 16 * 3 + 1) * width + tokens + blocks + 2 * width + heads


@pytest.mark.parametrize(
    ("make", "shape", "size"),
    [
        (nets.vit_digits, (8, 8, 1), 202_186),
        (nets.vit_mnist, (28, 28, 1), 205_066),
        (nets.vit_cifar, (32, 32, 3), 1_205_898),
    ],
)
def test_small_ones_have_the_size_that_they_say(make, shape, size):
    assert count_parameters(make(), shape) == size
    assert f"{size:,} parameters" in make.__doc__
    half = make(width=0.5, distillation_token=True, drop_path_rate=0.1)
    assert (half.num_heads, half.width) == (make().num_heads // 2, make().width // 2)
    assert (half.distillation_token, half.drop_path_rate) == (True, 0.1)
    assert make(width=0.01).num_heads == 1


def erf(x):
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def dense(x, layer):
    return x @ layer["kernel"] + layer["bias"]


def normalize(x, layer):
    centered = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centered**2).mean(-1, keepdims=True) + 1e-6)
    return centered / deviation * layer["scale"] + layer["bias"]


def forward(params, inputs, patch_size=3, num_heads=2):
    """Logits of the heads that there are, example by example and head by head, in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    found = []
    for image in np.asarray(inputs, np.float64) - 0.5:
        height, width, _ = image.shape
        tokens = [params["class_token"] + params["position_embedding"][0]]
        if "distillation_token" in params:
            tokens.append(params["distillation_token"] + params["distillation_position"])
        num_heads_out, position = len(tokens), 1
        for top in range(0, height, patch_size):
            for left in range(0, width, patch_size):
                patch = image[top : top + patch_size, left : left + patch_size].ravel()
                embedded = dense(patch, params["patch_embedding"])
                tokens.append(embedded + params["position_embedding"][position])
                position += 1
        x = np.stack(tokens)
        for number in range(sum(name.startswith("block_") for name in params)):
            block = params[f"block_{number}"]
            y = normalize(x, block["attention_norm"])
            query, key, value = (dense(y, block[name]) for name in ("query", "key", "value"))
            size, mixed = x.shape[1] // num_heads, np.zeros_like(x)
            for head in range(num_heads):
                part = slice(head * size, (head + 1) * size)
                weights = np.exp(query[:, part] @ key[:, part].T / np.sqrt(size))
                mixed[:, part] = weights / weights.sum(1, keepdims=True) @ value[:, part]
            x = x + dense(mixed, block["out"])
            y = dense(normalize(x, block["mlp_norm"]), block["dense_0"])
            x = x + dense(0.5 * y * (1 + erf(y / np.sqrt(2))), block["dense_1"])
        x = normalize(x, params["norm"])
        heads = ("logits", "distillation_logits")[:num_heads_out]
        found.append([dense(x[place], params[name]) for place, name in enumerate(heads)])
    return np.array(found).transpose(1, 0, 2)


def close(got, expected, tolerance=2e-5):
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.floor
def test_the_forward_pass_equals_numpy():
    model, params = drawn()
    inputs = images(3)
    (expected,) = forward(params, inputs)
    close(apply(model, params, inputs), expected)
    assert np.abs(expected - expected[:1]).max() > 0.1  # the images matter


@pytest.mark.floor
def test_both_heads_equal_numpy():
    model, params = drawn(token=True)
    inputs = images(3)
    first, second = forward(params, inputs)
    found = apply(model, params, inputs)
    close(found["class_logits"], first)
    close(found["distillation_logits"], second)
    close(nets.logits_of(found), (first + second) / 2)
    net = nets.logits_fn(model, {"params": params})
    close(net(inputs), (first + second) / 2)


@pytest.mark.floor
@pytest.mark.parametrize("token", [False, True])
def test_gradients_equal_numpys_differences(token):
    model, params = drawn(token)
    inputs = images(2)
    rng = np.random.default_rng(3)
    toward = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), (params, inputs))

    def total(params, inputs):
        return jnp.sum(jnp.sin(nets.logits_of(apply(model, params, inputs))))

    gradients = jax.jit(jax.grad(total, (0, 1)))(params, inputs)
    products = jax.tree.map(lambda one, other: np.vdot(one, other), gradients, toward)

    def moved(size, which):
        """The total with `which` of weights and inputs moved."""
        there = [
            jax.tree.map(lambda leaf, by: np.asarray(leaf, np.float64) + size * by, tree, by)
            if which == number
            else tree
            for number, (tree, by) in enumerate(zip((params, inputs), toward, strict=True))
        ]
        return np.sin(forward(*there).mean(0)).sum()

    for which in (0, 1):
        expected = (moved(1e-5, which) - moved(-1e-5, which)) / 2e-5
        got = sum(jax.tree.leaves(products[which]))
        assert got == pytest.approx(expected, rel=1e-3)
    # Forward mode gives the same.
    _, tangent = jax.jvp(lambda x: total(params, x), (inputs,), (toward[1].astype(np.float32),))
    assert tangent == pytest.approx(products[1], rel=1e-4)


def test_initial_weights():
    model = nets.ViT(patch_size=4, width=128, depth=1, num_heads=4)
    params, state = nets.init(model, KEY, (32, 32, 3))
    assert state == {}
    assert set(params) - {"class_token", "position_embedding"} == {
        *("patch_embedding", "block_0", "norm", "logits")
    }
    for name in ("query", "key", "value", "out", "dense_0", "dense_1"):
        kernel = np.asarray(params["block_0"][name]["kernel"])
        assert kernel.std() == pytest.approx(0.02, rel=0.03)
        assert not params["block_0"][name]["bias"].any()
    assert np.asarray(params["position_embedding"]).std() == pytest.approx(0.02, rel=0.05)
    patches, most = np.asarray(params["patch_embedding"]["kernel"]), 1 / math.sqrt(48)
    assert most * 0.99 < np.abs(patches).max() <= most
    assert patches.std() == pytest.approx(most / math.sqrt(3), rel=0.03)


# Laws


@pytest.mark.floor
def test_a_deit_without_the_parts_of_its_token_has_a_vits_weights():
    plain, _ = nets.init(small(), KEY, SHAPE)
    token, _ = nets.init(small(distillation_token=True), KEY, SHAPE)
    assert set(token) - set(plain) == set(EXTRAS)
    for name in plain:
        jax.tree.map(np.testing.assert_array_equal, plain[name], token[name])
    assert not np.array_equal(token["distillation_token"], token["class_token"])
    assert not np.array_equal(token["distillation_logits"]["kernel"], token["logits"]["kernel"])
    # Switched off it is the ViT, whatever was drawn for it.
    off = small(distillation_token=False)
    assert (off, hash(off)) == (small(), hash(small()))


@pytest.mark.floor
def test_a_token_that_nobody_attends_to_changes_nothing():
    model, params = drawn(token=True)
    plain = {name: value for name, value in params.items() if name not in EXTRAS}
    inputs = images(3)
    expected = apply(small(), plain, inputs)
    close(expected, forward(plain, inputs)[0])
    seen = apply(model, params, inputs)["class_logits"]
    assert np.abs(seen - expected).max() > 0.05

    def without_second(next_function, args, kwargs, context):
        found = next_function(*args, **kwargs)
        return jnp.delete(found, 1, axis=1) if context.module.name in ("key", "value") else found

    with nn.intercept_methods(without_second):
        unseen = model.apply({"params": params}, inputs)["class_logits"]
    close(unseen, expected, 1e-6)


def test_equal_tokens_with_equal_heads_say_the_same():
    model, params = drawn(token=True)
    params = params | {
        "distillation_token": params["class_token"],
        "distillation_position": params["position_embedding"][0],
        "distillation_logits": params["logits"],
    }
    found = apply(model, params, images(2))
    close(found["distillation_logits"], found["class_logits"], 1e-6)
    close(found["logits"], found["class_logits"], 1e-6)


def test_the_order_of_patches_is_in_their_positions_alone():
    model, params = drawn()
    inputs, order = images(2), np.array([3, 0, 5, 1, 4, 2])
    expected = apply(model, params, inputs)
    patches = inputs.reshape(2, 2, 3, 3, 3, 2).transpose(0, 1, 3, 2, 4, 5).reshape(2, 6, 3, 3, 2)
    moved = patches[:, order].reshape(2, 2, 3, 3, 3, 2).transpose(0, 1, 3, 2, 4, 5)
    moved = moved.reshape(inputs.shape)
    assert np.abs(apply(model, params, moved) - expected).max() > 0.05
    positions = params["position_embedding"]
    positions = jnp.concatenate([positions[:1], positions[1:][order]])
    again = apply(model, params | {"position_embedding": positions}, moved)
    close(again, expected, 1e-6)


def test_the_patch_embedding_is_a_strided_convolution():
    model, params = drawn()
    inputs = images(2)
    _, parts = captured(model, params, inputs)
    (got,) = parts["patch_embedding"]["__call__"]
    kernel = params["patch_embedding"]["kernel"].reshape(3, 3, 2, 8)
    layout = ("NHWC", "HWIO", "NHWC")
    expected = jax.lax.conv_general_dilated(
        inputs - 0.5, kernel, (3, 3), "VALID", dimension_numbers=layout
    )
    expected += params["patch_embedding"]["bias"][None, None, None]
    close(got, expected.reshape(got.shape), 1e-6)


@pytest.mark.parametrize("token", [False, True])
def test_whoever_looks_at_the_last_block_sees_all_tokens_and_changes_nothing(token):
    model, params = drawn(token)
    inputs = images(2)
    expected = nets.logits_of(apply(model, params, inputs))
    outputs, parts = captured(model, params, inputs)
    close(nets.logits_of(outputs), expected, 1e-6)
    for number in range(3):
        block = parts[f"block_{number}"]
        for name in ("query", "key", "value", "out", "dense_1"):
            assert block[name]["__call__"][0].shape == (2, 7 + token, 8)


def test_examples_are_alike_alone_in_a_batch_and_in_a_stack():
    model, params = drawn()
    inputs = images(5)
    together = np.asarray(apply(model, params, inputs))
    close(jnp.concatenate([apply(model, params, inputs[i : i + 1]) for i in range(5)]), together)
    other = jax.tree.map(lambda leaf: leaf * 0.9, params)
    stack = nets.stack([nets.logits_fn(model, {"params": each}) for each in (params, other)])
    both = jax.vmap(lambda net: net(inputs))(stack)
    close(both[0], together)
    close(both[1], apply(model, other, inputs))
    assert apply(model, params, inputs[:0]).shape == (0, 4)


def test_equal_networks_are_equal():
    assert nets.apply_fn(nets.deit_tiny()) == nets.apply_fn(nets.deit_tiny())
    assert len({small(), small(), small(shift=0.0), small(drop_path_rate=0.1)}) == 3
    assert {nets.vit_mnist(), nets.vit_mnist(patch_size=4)} == {
        nets.ViT(7, 64, 4, 4),
        nets.ViT(4, 64, 4, 4),
    }


# Stochastic depth


def branch_factors(model, params, inputs, keys):
    """What each block's two branches were multiplied by, `[depth, B, 2]`."""
    _, parts = captured(model, params, inputs, train=True, dropout_keys=keys)
    blocks, found = [parts[f"block_{number}"] for number in range(model.depth)], []
    for before, block in itertools.pairwise(blocks):
        added = block["__call__"][0] - before["__call__"][0]
        branches = [np.asarray(block[name]["__call__"][0]) for name in ("out", "dense_1")]
        columns = np.stack(branches, axis=-1).reshape(len(inputs), -1, 2)
        right = np.asarray(added).reshape(len(inputs), -1)
        solved = [np.linalg.lstsq(a, b, rcond=None) for a, b in zip(columns, right, strict=True)]
        assert max(float(one[1].max()) for one in solved) < 1e-6
        found.append([one[0] for one in solved])
    return np.array(found)


def test_branches_are_skipped_at_rates_that_grow_and_keep_their_mean():
    _, params = drawn()
    model, number = small(drop_path_rate=0.6), 2000
    inputs = np.repeat(images(1), number, axis=0)
    factors = branch_factors(model, params, inputs, jax.random.split(KEY, number))
    for rate, found in zip((0.3, 0.6), factors, strict=True):
        kept = 1 / (1 - rate)
        skipped = np.isclose(found, 0, atol=1e-3)
        assert (skipped | np.isclose(found, kept, rtol=1e-3)).all()
        # Four standard deviations of a share.
        within = 4 * math.sqrt(rate * (1 - rate) / number)
        np.testing.assert_allclose(skipped.mean(axis=0), rate, atol=within)
        np.testing.assert_allclose(found.mean(axis=0), 1.0, atol=kept * within)
        # The two branches of a block are skipped independently, and so are the blocks.
        assert abs(np.corrcoef(skipped.T)[0, 1]) < 4 / math.sqrt(number)
    assert abs(np.corrcoef(factors[0, :, 0], factors[1, :, 0])[0, 1]) < 4 / math.sqrt(number)


def test_what_an_example_skips_depends_on_its_key_alone():
    _, params = drawn()
    model, inputs, keys = small(drop_path_rate=0.5), images(8), jax.random.split(KEY, 8)
    run = functools.partial(apply, model, params, train=True)
    whole = np.asarray(run(inputs, dropout_keys=keys))
    parts = [run(inputs[i : i + 3], dropout_keys=keys[i : i + 3]) for i in (0, 3, 6)]
    close(jnp.concatenate(parts), whole)
    order = np.random.default_rng(0).permutation(8)
    close(run(inputs[order], dropout_keys=keys[order]), whole[order])
    other = run(inputs, dropout_keys=jax.random.split(jax.random.key(5), 8))
    assert np.abs(other - whole).max() > 0.05


def test_nothing_is_skipped_in_evaluation():
    model, params = drawn()
    inputs, keys = images(4), jax.random.split(KEY, 4)
    expected = apply(model, params, inputs)
    often = small(drop_path_rate=0.9)
    np.testing.assert_array_equal(apply(often, params, inputs), expected)
    np.testing.assert_array_equal(apply(often, params, inputs, dropout_keys=keys), expected)
    # Without a rate training is evaluation, and the first block is never skipped.
    np.testing.assert_array_equal(apply(model, params, inputs, train=True), expected)
    shallow = small(depth=1, drop_path_rate=0.9)
    trained = apply(shallow, params, inputs, train=True, dropout_keys=keys)
    np.testing.assert_array_equal(trained, apply(shallow, params, inputs))


@pytest.mark.parametrize("token", [False, True])
def test_a_short_fit_lowers_the_loss(token):
    model = small(num_classes=3, distillation_token=token, drop_path_rate=0.1)
    labels = np.arange(24, dtype=np.int32) % 3
    inputs = (images(24) + labels[:, None, None, None]) / 3
    params, _ = nets.init(model, KEY, SHAPE)
    step = train.make_train_step(nets.apply_fn(model), train.sgd(0.1))
    events = []
    train.fit(
        step,
        train.create_state(step, params, KEY),
        (inputs, labels),
        train.hard_loss(),
        num_epochs=10,
        batch_size=12,
        devices=jax.devices()[:1],
        callback=events.append,
    )
    losses = [event["loss"] for event in events if event["event"] == "epoch"]
    assert losses[-1] < 0.7 * losses[0]


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: small(num_heads=3), "num_heads to divide width = 8, got 3"),
        (lambda: small(patch_size=0), "patch_size to be a whole number >= 1, got 0"),
        (lambda: small(width=8.0), "width to be a whole number"),
        (lambda: small(mlp_ratio=0), "mlp_ratio to be a whole number"),
        (lambda: small(distillation_token=1), "distillation_token"),
        (lambda: small(drop_path_rate=1.0), r"drop_path_rate in \[0, 1\), got 1.0"),
        (lambda: small(shift=math.inf), "finite shift"),
        (lambda: nets.deit_base(depth=0), "depth to be a whole number"),
        (lambda: nets.vit_mnist(width=0.0), "width > 0"),
        (lambda: nets.init(small(), KEY, (6, 9)), "inputs of rank 4"),
        (lambda: nets.init(small(), KEY, (8, 9, 1)), "patches of 3x3 pixels cover, got 8x9"),
        (lambda: nets.init(small(), KEY, (2, 2, 1)), "patches of 3x3 pixels cover, got 2x2"),
        (
            lambda: apply(*drawn(), images(2, shape=(9, 9, 2))),
            "inputs of 6 patches, for which the weights have positions, got 9",
        ),
        (
            lambda: apply(small(drop_path_rate=0.5), drawn()[1], images(2), train=True),
            "dropout_keys when train=True and drop_path_rate > 0, got None",
        ),
    ],
)
def test_bad_networks_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
