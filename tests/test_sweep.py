"""A stack of runs against the same runs one at a time, and what happens to one that diverges."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import data, distill, nets, sweep, train
from jdistill.sweep import _fit, _memory, _program

ONE = jax.devices()[:1]
N, D, H, K, BATCH, EPOCHS = 37, 5, 8, 3, 8, 2
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(N, D)).astype(np.float32)
LABELS = RNG.integers(0, K, N).astype(np.int32)
SEEDS = np.array([3, 3, 8, 8, 9])
TEMPERATURES = np.float32([1, 20, 1, 5, 100])
RATES = np.float32([0.1, 0.4, 0.2, 0.3, 0.8])
DECAYS = np.float32([0.01, 0, 0.1, 0.01, 0.3])  # of the learning rate: each run's own schedule
R = len(SEEDS)
KEYS = jax.vmap(jax.random.key)(SEEDS)
TRACES = []


def dropping(params, model_state, inputs, *, train, key):
    """A hidden layer with dropout, so that a wrong key shows."""
    TRACES.append(inputs.shape)
    hidden = jnp.tanh(inputs @ params["first"])
    if train:
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (H,)))(key)
        hidden = jnp.where(keep, 2 * hidden, 0.0)
    return hidden @ params["second"], model_state


STEP = train.make_train_step(dropping, train.sgd(0.3))


def weights(seed):
    rng = np.random.default_rng(seed)
    return {
        "first": rng.normal(size=(D, H)).astype(np.float32),
        "second": rng.normal(size=(H, K)).astype(np.float32),
    }


ALL_WEIGHTS = nets.stack([weights(seed) for seed in SEEDS])


def generation(rates=RATES, step=STEP, num_epochs=EPOCHS):
    return distill.Generation(
        step=step,
        params=ALL_WEIGHTS,
        num_epochs=num_epochs,
        hyperparams={"learning_rate": rates, "decay": DECAYS},
    )


def swept(num_generations=3, *, runs=slice(None), rates=RATES, **kwargs):
    options = {"batch_size": BATCH, "devices": ONE} | kwargs
    one = generation(rates)
    one = distill.Generation(
        step=one.step,
        params=jax.tree.map(lambda leaf: leaf[runs], one.params),
        num_epochs=one.num_epochs,
        hyperparams={"learning_rate": rates[runs], "decay": DECAYS[runs]},
    )
    return sweep.chain(
        [one] * num_generations,
        (INPUTS, LABELS),
        KEYS[runs],
        temperature=TEMPERATURES[runs],
        **options,
    )


def alone(run, num_generations=3, **kwargs):
    """The chain of one run."""
    one = distill.Generation(
        step=STEP,
        params=nets.index(ALL_WEIGHTS, run),
        num_epochs=EPOCHS,
        hyperparams={"learning_rate": float(RATES[run]), "decay": float(DECAYS[run])},
    )
    return distill.chain(
        [one] * num_generations,
        (INPUTS, LABELS),
        KEYS[run],
        temperature=float(TEMPERATURES[run]),
        batch_size=BATCH,
        devices=ONE,
        **kwargs,
    )


def assert_close(state, reference, rtol=2e-5):
    np.testing.assert_array_equal(
        jax.random.key_data(state.key), jax.random.key_data(reference.key)
    )
    leaves = zip(
        jax.tree.leaves(state._replace(key=None)),
        jax.tree.leaves(reference._replace(key=None)),
        strict=True,
    )
    for leaf, other in leaves:
        np.testing.assert_allclose(leaf, other, rtol=rtol, atol=rtol * np.abs(other).max())


@pytest.fixture(scope="module")
def whole():
    return swept()


@pytest.fixture(scope="module")
def singles():
    return [alone(run) for run in range(R)]


@pytest.mark.floor
@pytest.mark.parametrize("vmapped", [False, True])
def test_every_run_is_the_chain_of_its_own(vmapped, singles):
    result = swept(vmapped=vmapped)
    assert not result.diverged.any()
    assert result.diverged.shape == (3, R)
    for run, states in enumerate(singles):
        for stack, state in zip(result.states, states, strict=True):
            assert_close(nets.index(stack, run), state)


@pytest.mark.floor
@pytest.mark.parametrize("count", [2, 4])
def test_devices_share_the_runs(count, whole):
    spread = swept(devices=jax.devices()[:count])
    for stack, reference in zip(spread.states, whole.states, strict=True):
        assert_close(stack, reference)


@pytest.mark.parametrize("steps_per_call", [1, 2, 1000])
def test_the_length_of_the_compiled_loop_changes_nothing(steps_per_call, whole):
    other = swept(steps_per_call=steps_per_call)
    for stack, reference in zip(other.states, whole.states, strict=True):
        assert_close(stack, reference, rtol=1e-6)


@functools.cache
def needed(size):
    """The bytes that a program of so many runs takes, as the library counts them."""
    limits, chunks = [], _memory.chunks

    def spy(num_runs, num_devices, bytes_needed, limit):
        limits.append(bytes_needed(size))
        return chunks(num_runs, num_devices, bytes_needed, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_memory, "chunks", spy)
        swept(1)
    return limits[0]


@pytest.mark.slow
def test_runs_that_do_not_fit_go_in_equal_chunks(whole):
    chunks = []

    def callback(event):
        if event["event"] == "epoch":
            chunks.append((event["runs"].start, event["runs"].stop))

    result = swept(memory_limit=needed(2), vmapped=False, callback=callback)
    assert sorted(set(chunks)) == [(0, 2), (2, 4), (4, 5)]
    for stack, reference in zip(result.states, whole.states, strict=True):
        assert_close(stack, reference)


def test_a_run_that_fits_nowhere_is_an_error():
    with pytest.raises(MemoryError, match="expected a run to fit into 10 bytes"):
        swept(memory_limit=10)


@pytest.mark.parametrize(
    ("num_runs", "num_devices", "limit", "expected"),
    [
        (9, 1, None, [(0, 9, 0)]),
        (9, 1, 90, [(0, 9, 0)]),
        (9, 1, 89, [(0, 5, 0), (5, 9, 1)]),
        (9, 1, 30, [(0, 3, 0), (3, 6, 0), (6, 9, 0)]),
        (9, 1, 10, [(run, run + 1, 0) for run in range(9)]),
        (5, 4, None, [(0, 5, 3)]),
        (5, 4, 79, [(0, 4, 0), (4, 5, 3)]),
    ],
)
def test_chunks_are_equal_with_their_padding(num_runs, num_devices, limit, expected):
    found = _memory.chunks(num_runs, num_devices, lambda size: 10 * size, limit)
    assert [(runs.start, runs.stop, padding) for runs, padding in found] == expected
    assert len({runs.stop - runs.start + padding for runs, padding in found}) == 1


@pytest.mark.parametrize("vmapped", [False, True])
@pytest.mark.parametrize("bad", [0, 3])
def test_a_run_that_diverges_is_frozen_and_the_others_go_on(vmapped, bad, whole):
    rates = RATES.copy()
    rates[bad] = 1e38
    reported = []

    def callback(event):
        if event["event"] == "generation":
            reported.append(event["diverged"])

    result = swept(rates=rates, vmapped=vmapped, callback=callback)
    np.testing.assert_array_equal(result.diverged, np.arange(R)[None] == bad + np.zeros((3, 1)))
    np.testing.assert_array_equal(np.stack(reported), result.diverged)
    for stack, reference in zip(result.states, whole.states, strict=True):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(stack.params))
        for run in set(range(R)) - {bad}:
            assert_close(nets.index(stack, run), nets.index(reference, run))
    steps = [int(stack.step[bad]) for stack in result.states]
    assert steps[0] < EPOCHS * data.num_batches(N, BATCH)
    assert steps[1:] == [0, 0]  # a chain without a teacher is not trained on


@pytest.mark.parametrize("stop_at", [1, 3, 8])
def test_a_stopped_sweep_goes_on_where_it_was(stop_at, whole):
    class Stopped(Exception):
        pass

    done, latest, count = [], [], 0

    def callback(event):
        nonlocal count
        if event["event"] == "generation":
            done.append(event["state"])
            latest.clear()
        if event["event"] == "epoch":
            latest[:] = [event["state"]]
            count += 1
            if count == stop_at:
                raise Stopped

    limit = {"memory_limit": needed(3)}  # two chunks, of which one may be ahead
    with pytest.raises(Stopped):
        swept(callback=callback, **limit)
    resumed = swept(start=[*done, *latest], **limit)
    for stack, reference in zip(resumed.states, whole.states, strict=True):
        assert_close(stack, reference)


def test_a_run_that_is_ahead_waits_for_the_others(whole):
    part = sweep.chain(
        [generation(num_epochs=1)],
        (INPUTS, LABELS),
        KEYS,
        temperature=TEMPERATURES,
        batch_size=BATCH,
        devices=ONE,
    ).states[0]
    mixed = jax.tree.map(
        lambda early, late: jnp.where(
            (np.arange(R) == 2).reshape((R,) + (1,) * (early.ndim - 1)), late, early
        ),
        part._replace(key=None),
        whole.states[0]._replace(key=None),
    )._replace(key=part.key)
    assert mixed.step.tolist() == [5, 5, 10, 5, 5]
    assert_close(swept(1, start=[mixed]).states[0], whole.states[0])


def test_finished_generations_are_not_trained_again(whole):
    events = []
    again = swept(start=whole.states, callback=events.append)
    assert {event["event"] for event in events} == {"generation"}
    for stack, reference in zip(again.states, whole.states, strict=True):
        assert_close(stack, reference, rtol=0)


def test_the_epochs_metrics_are_those_of_a_single_run(whole):
    events, single = [], []
    swept(1, callback=events.append)
    alone(3, 1, callback=single.append)
    expected = [(e["loss"], e["accuracy"]) for e in single if e["event"] == "epoch"]
    found = [(e["loss"][3], e["accuracy"][3]) for e in events if e["event"] == "epoch"]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert [e["epoch"] for e in events if e["event"] == "epoch"] == [1, 2]


def test_fit_on_hard_labels_is_train_fit():
    numbers = {"learning_rate": RATES, "decay": DECAYS}
    state = sweep.create_state(STEP, ALL_WEIGHTS, KEYS, hyperparams=numbers)
    stack, diverged = sweep.fit(
        STEP,
        state,
        (INPUTS, LABELS),
        train.hard_loss(TEMPERATURES),
        num_epochs=2,
        batch_size=BATCH,
        devices=ONE,
    )
    assert not diverged.any()
    for run in (0, 4):
        rates = {name: values[run] for name, values in numbers.items()}
        single = train.fit(
            STEP,
            train.create_state(STEP, nets.index(ALL_WEIGHTS, run), KEYS[run], hyperparams=rates),
            (INPUTS, LABELS),
            train.hard_loss(TEMPERATURES[run]),
            num_epochs=2,
            batch_size=BATCH,
            devices=ONE,
        )
        assert_close(nets.index(stack, run), single)


def test_soft_labels_may_be_every_runs_own():
    labels = RNG.dirichlet(np.ones(K), (R, N)).astype(np.float32)

    def fitted(targets):
        state = sweep.create_state(STEP, ALL_WEIGHTS, KEYS)
        loss = distill.soft_loss(TEMPERATURES, hard_weight=np.zeros(R))
        options = {"num_epochs": 1, "batch_size": BATCH, "devices": ONE}
        return sweep.fit(STEP, state, (INPUTS, LABELS, targets), loss, **options)[0]

    own, shared = fitted(labels), fitted(labels[2])
    assert_close(nets.index(own, 2), nets.index(shared, 2))
    assert np.abs(own.params["first"][0] - shared.params["first"][0]).max() > 1e-4


@pytest.mark.floor
@pytest.mark.slow
def test_convolutional_networks_and_images():
    digits = data.load("digits")
    examples = digits.train.inputs[:100], digits.train.labels[:100]
    model = nets.digits_net(width=0.25)
    step = train.make_train_step(nets.apply_fn(model), train.sgd(0.05))
    params, _ = nets.init(model, jax.random.key(0), (8, 8, 1))
    one = distill.Generation(step=step, params=params, num_epochs=1)
    many = distill.Generation(step=step, params=nets.stack([params] * 2), num_epochs=1)
    keys = jax.random.split(jax.random.key(1), 2)
    options = {"batch_size": 16, "devices": ONE}
    for vmapped in (False, True):
        result = sweep.chain(
            [many] * 2, examples, keys, temperature=np.float32([1, 20]), vmapped=vmapped, **options
        )
        for run, temperature in enumerate((1.0, 20.0)):
            states = distill.chain(
                [one] * 2, examples, keys[run], temperature=temperature, **options
            )
            assert_close(nets.index(result.states[-1], run), states[-1], rtol=1e-4)


def test_images_are_stored_as_bytes_where_that_is_exact():
    images = (np.arange(256, dtype=np.float32) / np.float32(255)).reshape(4, 8, 8, 1)
    stored = _program.store(images, np.arange(4))
    assert stored.inputs.dtype == np.uint8
    read = jax.jit(_program._read)(stored, np.arange(4))
    np.testing.assert_array_equal(read, images)  # to the last bit
    for other in (images + 1e-7, images - 1, images * np.nan, images * 300):
        assert _program.store(other.astype(np.float32), np.arange(4)).inputs.dtype == np.float32


def test_augmentation_is_keyed_by_example_and_step():
    seen = []

    def shift(keys, inputs):
        noise = jax.vmap(lambda key: jax.random.normal(key, (D,)))(keys)
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), noise)
        return inputs + noise

    options = {"num_epochs": 1, "batch_size": 8, "devices": ONE}
    step = train.make_train_step(dropping, train.sgd(0.3), augment=shift)
    state = sweep.create_state(STEP, jax.tree.map(lambda leaf: leaf[:2], ALL_WEIGHTS), KEYS[1:3])
    loss = train.hard_loss(np.ones(2, np.float32))
    first, _ = sweep.fit(step, state, (INPUTS, LABELS), loss, **options)
    jax.effects_barrier()
    noise = np.stack(seen)  # [runs x steps, B, D]
    assert len(noise) == 2 * data.num_batches(N, 8)
    assert len(np.unique(noise.reshape(-1, D), axis=0)) == noise.shape[0] * noise.shape[1]
    again, _ = sweep.fit(step, state, (INPUTS, LABELS), loss, **options)
    assert_close(first, again, rtol=0)


def jitter(keys, inputs):
    return inputs + 0.3 * jax.vmap(lambda key: jax.random.normal(key, (D,)))(keys)


def mixed_loss(temperature):
    return distill.soft_loss(temperature, hard_weight=0.3, temperature_squared=True)


def gentle_teacher(_):
    return distill.soft_loss(1.0)


def one_by_one(run, generations, **options):
    alone = [
        distill.Generation(
            step=each.step,
            params=nets.index(each.params, run),
            num_epochs=each.num_epochs,
            hyperparams={name: value[run] for name, value in each.hyperparams.items()},
        )
        for each in generations
    ]
    examples, temperature = (INPUTS, LABELS), float(TEMPERATURES[run])
    return distill.chain(
        alone, examples, KEYS[run], temperature=temperature, batch_size=BATCH, **options
    )


@pytest.mark.parametrize("mode", ["jit", "pmap"])
@pytest.mark.parametrize(
    "options",
    [
        {"teacher_loss": gentle_teacher, "student_loss": mixed_loss},
        {"online": True},
        {"teacher": nets.callable_logits_fn(lambda w, x: x @ w, np.ones((D, K), np.float32))},
    ],
)
def test_a_sweep_takes_the_losses_of_a_chain(options, mode):
    """With augmentation, whose draws depend neither on the sweep nor on the devices."""
    step = train.make_train_step(dropping, train.sgd(0.3), augment=jitter)
    generations = [generation(step=step)] * 2
    result = sweep.chain(
        generations,
        (INPUTS, LABELS),
        KEYS,
        temperature=TEMPERATURES,
        batch_size=BATCH,
        devices=ONE,
        **options,
    )
    for run in (0, 4):
        states = one_by_one(run, generations, mode=mode, **options)
        for stack, state in zip(result.states, states, strict=True):
            assert_close(nets.index(stack, run), state, rtol=2e-3)


def test_a_loss_that_is_no_pytree_is_named():
    with pytest.raises(ValueError, match=r"student_loss.*Partial"):
        changed(
            generations=[generation()] * 2,
            temperature=TEMPERATURES,
            student_loss=lambda T: lambda outputs, batch: outputs[:, 0] * T,
        )


@pytest.mark.slow
def test_a_network_that_cannot_be_hashed_will_do(whole):
    class Network:
        __hash__ = None

        def __call__(self, *args, **kwargs):
            return dropping(*args, **kwargs)

    other = generation(step=train.make_train_step(Network(), train.sgd(0.3)))
    result = changed(generations=[other] * 2, temperature=TEMPERATURES)
    assert_close(result.states[-1], whole.states[1])


def test_other_numbers_compile_nothing():
    def train(rates, inputs, keys, temperature):
        TRACES.clear()
        options = {"temperature": temperature, "batch_size": BATCH, "devices": ONE}
        sweep.chain([generation(rates)] * 3, (inputs, LABELS), keys, **options)
        # `eval_shape` looks at one example.
        return [shape for shape in TRACES if shape[0] > 1]

    train(RATES, INPUTS, KEYS, TEMPERATURES)
    keys = jax.random.split(jax.random.key(77), R)
    assert train(2 * RATES, INPUTS[::-1].copy(), keys, 3 * TEMPERATURES) == []


def changed(**changes):
    options = {"keys": KEYS, "temperature": TEMPERATURES, "generations": [generation()]}
    options |= {"examples": (INPUTS, LABELS), "batch_size": BATCH, "devices": ONE} | changes
    return sweep.chain(
        options.pop("generations"), options.pop("examples"), options.pop("keys"), **options
    )


def test_all_runs_diverging_ends_the_sweep_at_once():
    calls = []
    hopeless = [generation(np.full(R, 3e38, np.float32))] * 3
    result = changed(generations=hopeless, temperature=1.0, callback=calls.append, steps_per_call=1)
    assert result.diverged.all()
    assert sum(event["event"] == "epoch" for event in calls) == 1
    assert max(event["step"] for event in calls if event["event"] == "step") <= 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generations": []}, "at least one generation"),
        ({"temperature": TEMPERATURES[:2]}, r"temperature to be a scalar or of shape \[R\] = \(5,"),
        ({"temperature": -TEMPERATURES}, "temperature > 0"),
        ({"student_loss": 2.0}, "student_loss"),
        ({"keys": KEYS[0]}, r"expected keys of shape \[R\]"),
        ({"keys": KEYS[:2], "temperature": 1.0}, "expected params of R = 2 runs"),
        ({"generations": [generation(RATES[:3])]}, "learning_rate to be a scalar or of shape"),
        ({"generations": [generation(-RATES)]}, "learning_rate > 0"),
        ({"examples": (INPUTS, LABELS[:3])}, "labels"),
        ({"examples": (INPUTS * np.nan, LABELS)}, "nan"),
        ({"start": [None] * 2}, "at most 1 states in start"),
        ({"batch_size": 0}, "batch_size"),
        ({"steps_per_call": 0}, "steps_per_call"),
    ],
)
def test_bad_input_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        changed(**changes)


@pytest.mark.floor
@pytest.mark.parametrize(("num_devices", "oldest"), [(1, (0, 0)), (2, (0, 10))])
def test_accelerators_run_all_at_once_where_jax_can(num_devices, oldest):
    """On several devices JAX 0.7 has no `vmap` of a convolution's gradient."""
    devices = [types.SimpleNamespace(platform="tpu") for _ in range(num_devices)]
    options = _fit.Options()
    object.__setattr__(options, "devices", devices)
    assert options.kind(STEP).vmapped == (jax.__version_info__ >= oldest)
