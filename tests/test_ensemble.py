"""The ensemble against each attack run alone, and the laws of a driver."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, losses, nets

B, D, H, K = 13, 5, 7, 4
RNG = np.random.default_rng(2)
FIRST = RNG.normal(0, 1.5, (D, H)).astype(np.float32)
SECOND = RNG.normal(0, 1, (H, K)).astype(np.float32)
INPUTS = RNG.uniform(0.05, 0.95, (B, D)).astype(np.float32)
KEY = jax.random.key(4)
KEYS = jax.vmap(functools.partial(jax.random.fold_in, KEY))(jnp.arange(B))


def network(weights, inputs):
    first, second = weights
    return jnp.tanh(inputs @ first) @ second


MODEL = nets.callable_logits_fn(network, (jnp.asarray(FIRST), jnp.asarray(SECOND)))
CLEAN = np.tanh(INPUTS @ FIRST) @ SECOND
LABELS = CLEAN.argmax(1)
LABELS[3] = CLEAN[3].argmin()  # misclassified to begin with
TARGETS = np.argsort(CLEAN, axis=1)[:, -2]
TARGETS[3] = CLEAN[3].argmax()  # reached to begin with

BUDGET = {
    "fgsm": functools.partial(attacks.fgsm, eps=0.12),
    "pgd": functools.partial(attacks.pgd, eps=0.2, num_steps=5, loss=losses.margin),
    "wider": functools.partial(attacks.pgd, eps=0.3, num_steps=5, num_restarts=2),
}
MINIMUM = {
    "ddn": functools.partial(attacks.ddn, num_steps=15),
    "carlini_wagner_l2": functools.partial(
        attacks.carlini_wagner_l2, num_searches=3, num_steps=20, learning_rate=0.05
    ),
}


def numpy_of(result):
    return jax.tree.map(np.asarray, result)


def alone(attack, index, **kwargs):
    """One of the attacks on all examples, with the ensemble's keys for it."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, index))(KEYS)
    return numpy_of(attack(MODEL, keys, INPUTS, LABELS, **kwargs))


def run(table, **kwargs):
    return numpy_of(attacks.ensemble(MODEL, KEY, INPUTS, LABELS, attacks=table, **kwargs))


@pytest.mark.floor
@pytest.mark.parametrize("targets", [None, TARGETS], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("batch_size", [250, 4])
def test_the_first_attack_to_break_an_example_has_it(targets, batch_size):
    result = run(BUDGET, targets=targets, batch_size=batch_size)
    rows = [alone(a, i, targets=targets) for i, a in enumerate(BUDGET.values())]
    if targets is None:
        assert len({int(r.success.sum()) for r in rows}) == 3  # each later one breaks more
    for b in range(B):
        tried = 0
        while tried < 2 and not rows[tried].success[b]:
            tried += 1
        row = rows[tried]
        needed = row.success[b] and row.distance[b] > 0
        assert result.info["broken_by"][b] == (tried if needed else -1)
        assert result.success[b] == row.success[b]
        assert result.queries[b] == sum(r.queries[b] for r in rows[: tried + 1])
        np.testing.assert_allclose(result.inputs[b], row.inputs[b], atol=1e-6)
        np.testing.assert_allclose(result.distance[b], row.distance[b], atol=1e-6)
    if targets is None:
        assert (result.info["broken_by"][3], result.queries[3]) == (-1, 1)
        assert set(result.info["broken_by"]) == {-1, 0, 1, 2}


@pytest.mark.parametrize("order", [1, -1])
def test_the_smallest_distance_wins(order):
    table = dict(list(MINIMUM.items())[::order])
    result = run(table, minimum_norm=True, batch_size=5)
    rows = [alone(a, i) for i, a in enumerate(table.values())]
    distances = np.stack([r.distance for r in rows])
    best = distances.argmin(0)
    assert len(set(best)) == 2  # each of them wins somewhere
    np.testing.assert_allclose(result.distance, distances.min(0), rtol=1e-4)
    np.testing.assert_array_equal(result.success, np.isfinite(distances.min(0)))
    right = np.arange(B) != 3
    np.testing.assert_array_equal(result.info["broken_by"][right], best[right])
    queries = np.where(right, sum(r.queries for r in rows), 1)
    np.testing.assert_array_equal(result.queries, queries)
    for b in np.flatnonzero(right):
        np.testing.assert_allclose(result.inputs[b], rows[best[b]].inputs[b], atol=1e-4)
    assert (result.distance[3], result.info["broken_by"][3]) == (0, -1)


def test_what_no_minimum_norm_attack_breaks_is_the_clean_input():
    table = [functools.partial(attacks.ddn, num_steps=3)]
    fixed = nets.callable_logits_fn(lambda x: jnp.stack([x[:, 0] + 2, x[:, 1]], axis=1))
    labels = np.zeros(B, int)
    result = attacks.ensemble(fixed, None, INPUTS, labels, attacks=table, minimum_norm=True)
    np.testing.assert_array_equal(result.inputs, INPUTS)
    assert np.all(np.isinf(result.distance))
    assert not np.any(result.success)
    np.testing.assert_array_equal(result.info["broken_by"], np.full(B, -1))


@pytest.mark.parametrize("batch_size", [1, 2, 5, 8, 13])
@pytest.mark.parametrize("key", [KEY, KEYS], ids=["one key", "a key each"])
def test_batches_change_nothing(batch_size, key):
    whole = run(BUDGET)
    split = attacks.ensemble(
        MODEL, key, INPUTS, LABELS, attacks=list(BUDGET.values()), batch_size=batch_size
    )
    np.testing.assert_array_equal(split.success, whole.success)
    np.testing.assert_array_equal(split.queries, whole.queries)
    np.testing.assert_array_equal(split.info["broken_by"], whole.info["broken_by"])
    np.testing.assert_allclose(split.inputs, whole.inputs, atol=1e-6)
    other = attacks.ensemble(MODEL, jax.random.key(9), INPUTS, LABELS, attacks=BUDGET)
    assert not np.array_equal(other.inputs, whole.inputs)


def test_survivors_come_in_powers_of_two():
    sizes = []

    def recorded(attack, logits_fn, key, inputs, labels, **kwargs):
        sizes.append(len(inputs))
        return attack(logits_fn, key, inputs, labels, **kwargs)

    table = [functools.partial(recorded, attack) for attack in BUDGET.values()]
    result = run(table, batch_size=12)
    assert set(sizes) == {12}  # 13 examples, and no batch below 16 but for batch_size
    np.testing.assert_array_equal(result.success, run(BUDGET).success)


def test_the_callback_hears_of_every_batch():
    events = []
    result = run(BUDGET, batch_size=5, callback=events.append)
    events = [e for e in events if "step" not in e]  # those after a batch
    assert {e["event"] for e in events} == {"attack"}
    assert {e["stage"] for e in events} == {"ensemble"}
    assert [e["done"] for e in events[:3]] == [5, 10, 13]
    assert list(dict.fromkeys(e["attack"] for e in events)) == list(BUDGET)
    survivors = [e["survivors"] for e in events]
    assert survivors == sorted(survivors, reverse=True)
    assert survivors[-1] == np.sum(~result.success)
    for name in BUDGET:
        last = [e for e in events if e["attack"] == name][-1]
        assert last["done"] == last["total"]


def test_nobody_left_and_nobody_there():
    easy = [functools.partial(attacks.fgsm, eps=0.9, loss=losses.margin)] * 2
    twos = part_of_two_classes()
    result = attacks.ensemble(*twos, attacks=easy)
    assert np.all(result.success)
    np.testing.assert_array_equal(result.queries, np.full(B, 2))  # the second one had no work
    empty = attacks.ensemble(MODEL, None, INPUTS[:0], LABELS[:0], attacks=easy)
    assert empty.inputs.shape == (0, D)
    assert empty.info["broken_by"].shape == (0,)


def part_of_two_classes():
    weights = jnp.ones((D, 2)) * jnp.array([[1.0, -1.0]])
    logits_fn = nets.callable_logits_fn(lambda x: x @ weights - jnp.array([[D * 1.0, 0.0]]))
    return logits_fn, None, INPUTS, np.asarray(logits_fn(INPUTS)).argmax(1)


def test_the_box_is_every_attacks_box():
    wide = 2 * INPUTS - 1
    kwargs = {"bounds": (-1.0, 1.0), "attacks": [functools.partial(attacks.fgsm, eps=2.0)]}
    result = attacks.ensemble(MODEL, None, wide, LABELS, **kwargs)
    assert np.min(result.inputs) == -1.0
    with pytest.raises(ValueError, match=r"expected inputs in \[0, 1\]"):
        attacks.ensemble(MODEL, None, wide, LABELS, attacks=kwargs["attacks"])


def test_a_driver_refuses_tracers():
    call = functools.partial(attacks.ensemble, attacks=BUDGET)
    with pytest.raises(ValueError, match="expected concrete arrays, got a tracer; ensemble is"):
        jax.jit(call)(MODEL, KEY, INPUTS, LABELS)
    with pytest.raises(ValueError, match="call it outside jit and vmap"):
        jax.vmap(lambda f: call(f, KEY, INPUTS, LABELS))(nets.stack([MODEL, MODEL]))
    with pytest.raises(ValueError, match="got a tracer"):
        jax.jit(lambda: call(MODEL, KEY, INPUTS, LABELS))()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"attacks": []}, r"expected one attack or more, got \[\]"),
        ({"attacks": attacks.pgd}, "expected one attack or more, got <function"),
        ({"attacks": ["pgd"]}, r"expected a callable as attacks\[0\], got str"),
        (
            {"attacks": {"a": functools.partial(attacks.fgsm, eps=np.full(B, 0.1))}},
            r"settings that hold for all examples, got eps of shape \(13,\) in attacks\['a'\]",
        ),
        (
            {"attacks": [functools.partial(attacks.fgsm, eps=0.1, bounds=(0, 2))]},
            r"expected bounds as an argument of ensemble, got it bound in attacks\[0\]",
        ),
        (
            {"attacks": [functools.partial(attacks.fgsm, eps=0.1, targets=TARGETS)]},
            "expected targets as an argument of ensemble",
        ),
        (
            {
                "attacks": [
                    jax.tree_util.Partial(functools.partial(attacks.fgsm, eps=0.1, bounds=(0, 2)))
                ]
            },
            r"expected bounds as an argument of ensemble, got it bound in attacks\[0\]",
        ),
        (
            {"attacks": [functools.partial(attacks.fgsm, eps=(0.1,) * B)]},
            r"got eps of shape \(13,\) in attacks\[0\]; ensemble regroups",
        ),
        (
            {"attacks": [attacks.ddn, attacks.deepfool, attacks.fmn], "minimum_norm": True},
            r"expected attacks of one norm with minimum_norm=True, got \{0: 'l2', 1: .*2: 'linf'",
        ),
        ({"batch_size": 0}, "expected batch_size to be a whole number >= 1, got 0"),
        ({"bounds": (0.5, 0.9)}, r"expected inputs in \[0.5, 0.9\]"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(kwargs.pop("attacks", BUDGET), **kwargs)


def test_an_ensemble_may_hold_an_ensemble():
    inner = functools.partial(attacks.ensemble, attacks=[BUDGET["fgsm"], BUDGET["pgd"]])
    nested, flat = run([inner]), run([BUDGET["fgsm"], BUDGET["pgd"]])
    assert np.mean(nested.success == flat.success) > 0.9  # other keys
    np.testing.assert_array_equal(
        nested.info["broken_by"] >= 0, nested.success & (CLEAN.argmax(1) == LABELS)
    )


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"expected labels in 0\.\.3"):
        attacks.ensemble(MODEL, KEY, INPUTS, LABELS + K, attacks=BUDGET)
    with pytest.raises(ValueError, match="expected a PRNG key for random starts, got None"):
        attacks.ensemble(MODEL, None, INPUTS, LABELS, attacks=BUDGET)
