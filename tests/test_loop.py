"""The loop of the attacks narrows to the examples that go on, and nothing else changes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, nets, parallel
from jdistill.attacks._core import engine as _loop
from jdistill.attacks._core import problem as _base

BATCH = 70


def test_rows_are_halved_twice_and_quartered_then():
    assert _loop.row_counts(1000, 100) == [500, 250, 63, 0]
    assert _loop.row_counts(500, 100) == [250, 125, 32, 0]
    assert _loop.row_counts(70, 50) == [35, 0]
    assert _loop.row_counts(62, 1000) == [0]
    assert _loop.row_counts(512, 49) == [0]


def test_each_example_takes_its_own_number_of_steps_in_few_rows():
    """Counted in the loop: the rows of all steps, and which examples each of them had."""
    rng = np.random.default_rng(0)
    needed = rng.integers(0, 100, size=BATCH)
    rows = []

    def step(needed, scale, double, carry):
        taken, done = carry
        jax.debug.callback(lambda done: rows.append(len(done)), done, ordered=True)
        taken = taken + ~done * scale
        return taken, double(taken) >= 2 * needed

    @jax.jit
    def run(needed):
        start = (jnp.zeros(BATCH, jnp.int32), needed <= 0)
        fixed = (needed, jnp.int32(1), nets.callable_logits_fn(lambda x: 2 * x))
        return _loop.until_done(
            step, fixed, start, at_most=100, spread=_base.Spread(False), done=lambda carry: carry[1]
        )

    taken, done = run(jnp.asarray(needed))
    np.testing.assert_array_equal(taken, needed)
    assert np.all(done)
    assert set(rows) == {BATCH, 35}
    assert len(rows) == needed.max()
    assert rows.count(BATCH) == np.sort(needed)[-36]  # until 35 are left


@pytest.fixture
def problem():
    """A network with borders at very different distances, in float64: rounding must not decide."""
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        yield _problem()


def _problem():
    rng = np.random.default_rng(0)
    first, second = 3 * rng.normal(size=(6, 16)), rng.normal(size=(16, 4))
    logits_fn = nets.callable_logits_fn(
        lambda first, second, x: jnp.tanh((x - 0.5) @ first) @ second,
        jnp.asarray(first, jnp.float64),
        jnp.asarray(second, jnp.float64),
    )
    inputs = jax.random.uniform(jax.random.key(0), (BATCH, 6), jnp.float64)
    return logits_fn, jax.random.key(2), inputs, jnp.argmax(logits_fn(inputs), axis=-1)


ATTACKS = {
    "pgd": functools.partial(attacks.pgd, eps=0.1, num_steps=60, num_restarts=2, trace=True),
    "apgd": functools.partial(attacks.apgd, eps=0.1, num_steps=60, trace=True),
    "apgd_targeted": functools.partial(attacks.apgd_targeted, eps=0.1, num_steps=20, trace=True),
    "apgd l1": functools.partial(attacks.apgd, eps=0.3, norm="l1", num_steps=60),
    "square": functools.partial(attacks.square, eps=0.1, num_queries=60, trace=True),
    "carlini_wagner_l2": functools.partial(
        attacks.carlini_wagner_l2, num_searches=3, num_steps=30, trace=True
    ),
    "carlini_wagner_linf": functools.partial(attacks.carlini_wagner_linf, num_steps=50),
    "carlini_wagner_l0": functools.partial(attacks.carlini_wagner_l0, num_steps=50),
    "ead": functools.partial(attacks.ead, num_searches=3, num_steps=30, trace=True),
    "deepfool": functools.partial(attacks.deepfool, num_steps=60, overshoot=0.001),
    "jsma": functools.partial(attacks.jsma, theta=0.02, max_features=120),
    "spsa": functools.partial(attacks.spsa, eps=0.1, num_steps=60, num_samples=8, trace=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_the_result_is_that_of_all_rows_to_the_end(name, problem, monkeypatch):
    attack = ATTACKS[name]
    narrowed = attack(*problem)
    loops = str(jax.make_jaxpr(attack)(*problem)).count(" while[")
    monkeypatch.setattr(_loop, "_LEAST_ROWS", 10**6)
    jax.clear_caches()  # the attack's own program is narrowed still
    whole = attack(*problem)
    assert str(jax.make_jaxpr(attack)(*problem)).count(" while[") < loops
    jax.clear_caches()
    np.testing.assert_array_equal(narrowed.success, whole.success)
    np.testing.assert_array_equal(narrowed.queries, whole.queries)
    assert len(set(np.asarray(whole.queries).tolist())) > 3  # or nothing could be narrowed
    for got, expected in zip(jax.tree.leaves(narrowed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_examples_on_several_devices_stay_there(problem):
    logits_fn, key, *rest = problem
    attack = functools.partial(attacks.pgd, eps=0.1, num_steps=60, num_restarts=2)
    expected = attack(*problem)
    devices = jax.devices()[:2]
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(BATCH))
    found = attack(parallel.replicate(logits_fn, devices), *parallel.split((keys, *rest), devices))
    assert found.inputs.sharding.shard_shape(found.inputs.shape)[0] == BATCH // 2
    np.testing.assert_array_equal(found.success, expected.success)
    inputs, labels = parallel.split(tuple(rest), devices)
    spread = functools.partial(_base.prepare, logits_fn, None, targets=None, bounds=(0.0, 1.0))
    assert spread(inputs, labels).spread.over_devices
    assert not spread(*rest).spread.over_devices
