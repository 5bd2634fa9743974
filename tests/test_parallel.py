"""One step on one device and on eight, under jit, shard_map, and pmap: the same numbers."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdistill import data, nets, parallel, train
from jdistill.typing import Batch
from tests import tiny

WAYS = [(mode, number) for mode in ("jit", "shard_map", "pmap") for number in (1, 8)]
ways = pytest.mark.parametrize(("mode", "num_devices"), WAYS, ids=[f"{m}-{n}" for m, n in WAYS])

RNG = np.random.default_rng(0)
# 101 examples in batches of 20: the last holds one example, and 20 rows do not divide by 8.
N, BATCH = 101, 20
INPUTS = RNG.uniform(0, 1, (N, 8, 8, 1)).astype(np.float32)
LABELS = RNG.integers(0, 10, N).astype(np.int32)
MODEL = nets.digits_net(width=0.125)
STEP = train.make_train_step(nets.apply_fn(MODEL), train.sgd(0.1))
PARAMS, _ = jax.jit(nets.init, static_argnums=(0, 2))(MODEL, jax.random.key(0), (8, 8, 1))


ALL_WAYS = [(mode, number) for mode in ("jit", "shard_map", "pmap") for number in (1, 2, 4, 8)]


def compiled(step, mode, num_devices):
    return parallel.compile_step(step, mode, jax.devices()[:num_devices])


class Trained(NamedTuple):
    losses: list[float]
    params: list[np.ndarray]
    gradient: list[np.ndarray]  # the first step's change, which is the rate times it


@functools.cache
def trained(mode, num_devices, dtype="float32"):
    """The network with dropout in 24 steps, of which every sixth has one example."""
    run = compiled(STEP, mode, num_devices)
    start = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), PARAMS)
    state = train.create_state(STEP, start, jax.random.key(1))
    losses, first = [], None
    while len(losses) < 20:
        for batch in data.batches(INPUTS.astype(dtype), LABELS, batch_size=BATCH):
            state, sums = run(state, batch, train.hard_loss(2.0))
            losses.append(float(sums["loss"] / sums["count"]))
            assert float(sums["count"]) == batch.mask.sum()
            first = first or jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, start)
    leaves = (jax.tree.leaves(tree) for tree in (state.params, first))
    return Trained(losses, *([np.asarray(leaf) for leaf in each] for each in leaves))


def assert_near(found, expected, share):
    """Equal to a share of each array's largest entry."""
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=0, atol=share * np.abs(other).max())


@pytest.mark.parametrize(("mode", "num_devices"), ALL_WAYS[1:])
def test_devices_and_modes_agree_with_dropout_and_a_ragged_batch(mode, num_devices):
    expected, found = trained("jit", 1), trained(mode, num_devices)
    assert len(set(found.losses)) == 24  # it does train
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-5)
    assert_near(found.gradient, expected.gradient, 1e-5)
    assert_near(found.params, expected.params, 1e-4)


@pytest.mark.parametrize("mode", ["jit", "shard_map", "pmap"])
def test_what_is_left_is_rounding(mode):
    with tiny.double_precision():
        expected, found = trained("jit", 1, "float64"), trained(mode, 8, "float64")
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-10)
    assert_near(found.params, expected.params, 1e-10)


def test_dropout_acts_in_training_and_depends_on_each_examples_key_alone():
    apply = jax.jit(nets.apply_fn(MODEL), static_argnames="train")
    keys = jax.random.split(jax.random.key(2), 3)
    rows = np.repeat(INPUTS[:1], 3, axis=0)
    dropped, _ = apply(PARAMS, {}, rows, train=True, key=keys)
    plain, _ = apply(PARAMS, {}, rows, train=False, key=None)
    assert np.abs(dropped - plain).max() > 1e-2
    assert np.abs(dropped[0] - dropped[1]).max() > 1e-3
    reversed_, _ = apply(PARAMS, {}, rows, train=True, key=keys[::-1])
    np.testing.assert_allclose(reversed_[::-1], dropped, rtol=1e-5, atol=1e-6)


def noisy(params, model_state, inputs, *, train, key):
    """Row i of `eye(B)` gives w_i times its own noise, so the gradient shows each row's draw."""
    noise = jax.vmap(jax.random.uniform)(key)
    return ((inputs @ params) * noise)[:, None], model_state


def first_logit(logits, batch):
    return logits[:, 0]


@pytest.mark.floor
@ways
def test_noise_is_keyed_by_the_position_in_the_whole_batch(mode, num_devices):
    step = train.make_train_step(noisy, optax.sgd(1.0))
    key, size = jax.random.key(3), 16
    state = train.create_state(step, jnp.zeros(size), key)._replace(step=jnp.int32(5))
    batch = Batch(np.eye(size, dtype=np.float32), np.zeros(size, int), None, np.ones(size))
    state, _ = compiled(step, mode, num_devices)(state, batch, jax.tree_util.Partial(first_logit))
    step_key = jax.random.fold_in(key, 5)
    noise = [jax.random.uniform(jax.random.fold_in(step_key, i)) for i in range(size)]
    drawn = -np.asarray(state.params) * size
    assert len(set(np.round(drawn, 5))) == size  # with a key a device, rows of devices would repeat
    np.testing.assert_allclose(drawn, noise, rtol=1e-5)


TRACES = []


def linear(params, model_state, inputs, *, train, key):
    if train:
        TRACES.append(inputs.shape)
    return inputs @ params["w"] + params["b"][None], model_state


ROWS = RNG.normal(size=(13, 4)).astype(np.float32)
CLASSES = RNG.integers(0, 3, 13).astype(np.int32)
WEIGHTS = {
    "w": RNG.normal(size=(4, 3)).astype(np.float32),
    "b": np.zeros(3, np.float32),
}


def numpy_gradient(rows, classes, temperature):
    """Of the mean cross-entropy at a temperature, by hand."""
    logits = (rows @ WEIGHTS["w"].astype(np.float64)) / temperature
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    error = (probs - np.eye(3)[classes]) / temperature / len(rows)
    loss = -np.log(probs[np.arange(len(rows)), classes]).mean()
    return loss, {"w": rows.T @ error, "b": error.sum(0)}


@pytest.mark.floor
@ways
@pytest.mark.parametrize("num_rows", [13, 3, 1])
def test_gradient_is_of_the_mean_over_unmasked_rows_of_all_devices(mode, num_devices, num_rows):
    step = train.make_train_step(linear, optax.sgd(0.5))
    state = train.create_state(step, WEIGHTS, jax.random.key(0))
    mask = np.ones(num_rows, np.float32)
    if num_rows == 13:
        mask[[0, 4, 12]] = 0  # unequal counts on the devices: a mean of means would be off
    batch = Batch(ROWS[:num_rows], CLASSES[:num_rows], None, mask)
    state, sums = compiled(step, mode, num_devices)(state, batch, train.hard_loss(3.0))
    real = mask > 0
    loss, gradient = numpy_gradient(ROWS[:num_rows][real], CLASSES[:num_rows][real], 3.0)
    assert float(sums["count"]) == real.sum()
    np.testing.assert_allclose(sums["loss"] / sums["count"], loss, rtol=1e-5)
    hits = (ROWS[:num_rows] @ WEIGHTS["w"]).argmax(1) == CLASSES[:num_rows]
    assert float(sums["correct"]) == hits[real].sum()
    for name, leaf in gradient.items():
        np.testing.assert_allclose(
            state.params[name], WEIGHTS[name] - 0.5 * leaf, rtol=1e-5, atol=1e-6
        )


@pytest.mark.floor
@pytest.mark.parametrize(("mode", "num_devices"), [("jit", 8), ("shard_map", 8), ("pmap", 8)])
def test_what_padded_rows_hold_changes_nothing(mode, num_devices):
    step = train.make_train_step(linear, train.sgd(0.5))
    state = train.create_state(step, WEIGHTS, jax.random.key(0))
    targets = RNG.dirichlet(np.ones(3), 10).astype(np.float32)
    loss_fn = jax.tree_util.Partial(lambda logits, batch: -jnp.sum(batch.targets * logits, axis=1))
    results = []
    for garbage in (0.0, 1e6, np.nan, np.inf):
        padding = [np.full((6, *part.shape[1:]), garbage, np.float32) for part in (ROWS, targets)]
        batch = Batch(
            np.concatenate([ROWS[:10], padding[0]]),
            np.concatenate([CLASSES[:10], np.full(6, 99 if garbage else 0, np.int32)]),
            np.concatenate([targets, padding[1]]),
            np.repeat(np.array([1, 0], np.float32), [10, 6]),
        )
        after, sums = compiled(step, mode, num_devices)(state, batch, loss_fn)
        hard, hard_sums = compiled(step, mode, num_devices)(state, batch, train.hard_loss())
        results.append(jax.tree.leaves((after.params, sums, hard.params, hard_sums)))
    for other in results[1:]:
        for leaf, reference in zip(other, results[0], strict=True):
            assert np.isfinite(leaf).all()
            np.testing.assert_array_equal(leaf, reference)


@pytest.mark.floor
@ways
def test_step_is_traced_once_for_states_temperatures_and_rates(mode, num_devices):
    step = train.make_train_step(linear, train.sgd(0.5, decay=1e-5))
    batch = Batch(ROWS, CLASSES, None, np.ones(13, np.float32))
    TRACES.clear()
    weights = []
    for number, (temperature, rate) in enumerate([(1.0, 0.1), (20.0, 0.1), (20.0, 0.7)]):
        state = train.create_state(
            step, WEIGHTS, jax.random.key(number), hyperparams={"learning_rate": rate}
        )
        # An equal step, compiled anew by whoever calls: the same compilation.
        again = train.make_train_step(linear, step.optimizer)
        run = compiled(again, mode, num_devices)
        for _ in range(3):
            state, _ = run(state, batch, train.hard_loss(temperature))
        weights.append(np.asarray(state.params["w"]))
    assert len(TRACES) == 1
    assert np.abs(weights[0] - weights[1]).max() > 1e-3
    assert np.abs(weights[1] - weights[2]).max() > 1e-3


def test_equal_steps_share_a_compiled_step_and_others_do_not():
    optimizer = train.sgd(0.25)
    step = train.make_train_step(nets.apply_fn(nets.digits_net()), optimizer)
    equal = train.make_train_step(nets.apply_fn(nets.digits_net()), optimizer)
    assert parallel.compile_step(step) is parallel.compile_step(equal)
    assert parallel.compile_step(step) is not parallel.compile_step(step, "pmap")
    assert parallel.compile_step(step) is not compiled(step, "jit", 1)
    wider = train.make_train_step(nets.apply_fn(nets.digits_net(width=2)), optimizer)
    assert parallel.compile_step(step) is not parallel.compile_step(wider)


def test_a_step_that_cannot_be_hashed_still_compiles():
    class Counter(dict):
        def __call__(self, state, batch, loss_fn):
            return state + jnp.sum(batch.mask), {}

    batch = Batch(ROWS, CLASSES, None, np.ones(13, np.float32))
    state, _ = parallel.compile_step(Counter())(jnp.zeros(()), batch, None)
    assert float(state) == 13


@pytest.mark.parametrize("mode", ["jit", "shard_map", "pmap"])
def test_a_state_moves_between_modes_and_numbers_of_devices(mode):
    step = train.make_train_step(linear, train.sgd(0.5))
    batch = Batch(ROWS, CLASSES, None, np.ones(13, np.float32))
    state = train.create_state(step, WEIGHTS, jax.random.key(0))
    reference = state
    for _ in range(3):
        reference, _ = compiled(step, "jit", 1)(reference, batch, train.hard_loss())
    other = {"jit": "pmap", "pmap": "shard_map", "shard_map": "jit"}[mode]
    for way in ((mode, 8), (mode, 1), (other, 8)):
        state, _ = compiled(step, *way)(state, batch, train.hard_loss())
    np.testing.assert_allclose(state.params["w"], reference.params["w"], rtol=1e-5, atol=1e-6)
    assert int(state.step) == 3


@pytest.mark.floor
def test_pad_batch():
    batch = Batch(ROWS, CLASSES, None, np.ones(13, np.float32))
    padded = parallel.pad_batch(batch, 8)
    assert padded.inputs.shape == (16, 4)
    assert padded.targets is None
    np.testing.assert_array_equal(padded.inputs[:13], ROWS)
    np.testing.assert_array_equal(padded.inputs[13:], np.repeat(ROWS[:1], 3, axis=0))
    np.testing.assert_array_equal(padded.labels[13:], np.repeat(CLASSES[:1], 3))
    np.testing.assert_array_equal(padded.mask, [1.0] * 13 + [0.0] * 3)
    assert padded.mask.dtype == np.float32
    assert parallel.pad_batch(batch, 13) is batch
    with pytest.raises(ValueError, match="multiple"):
        parallel.pad_batch(batch, 0)


def test_example_indices_under_a_mapped_axis():
    rows = jax.pmap(
        lambda x: parallel.example_indices(x.shape[0], "data"),
        axis_name="data",
        devices=jax.devices()[:4],
    )(np.zeros((4, 3)))
    np.testing.assert_array_equal(rows, np.arange(12).reshape(4, 3))
    with pytest.raises(ValueError, match="expected axis_name of a mapped axis, got 'data'"):
        parallel.example_indices(3, "data")


@pytest.mark.floor
def test_unknown_mode_is_named():
    with pytest.raises(ValueError, match=r"'jit', 'shard_map', 'pmap', got 'shard'"):
        parallel.compile_step(STEP, "shard")


def test_mesh_holds_all_devices_by_default():
    assert parallel.make_mesh().shape == {"data": 8}
