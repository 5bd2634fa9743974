"""AutoAttack: its parts, and that batches, stops and the scale of the logits change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, nets
from jdistill.attacks import _autoattack
from jdistill.attacks._core import chunks
from tests import tiny

B, SHAPE, D, H, K = 64, (6, 6, 1), 36, 16, 5
RNG = np.random.default_rng(6)
NET = tiny.Net(
    RNG.normal(0, 0.6, (D, H)).astype(np.float32), RNG.normal(0, 1, (H, K)).astype(np.float32)
)
INPUTS = RNG.uniform(0.02, 0.98, (B, *SHAPE)).astype(np.float32)
KEY = jax.random.key(2)
EPS = 0.035
MODEL = NET.logits_fn()
CLEAN = np.asarray(MODEL(INPUTS))
LABELS = CLEAN.argmax(1)
LABELS[3] = CLEAN[3].argmin()  # wrong to begin with


@pytest.fixture(scope="module", autouse=True)
def short():
    """Few steps and queries: the laws are the same."""
    patch = pytest.MonkeyPatch()
    for name in ("apgd", "apgd_targeted", "fab", "fab_targeted"):
        patch.setattr(_autoattack, name, functools.partial(getattr(_autoattack, name), num_steps=8))
    patch.setattr(_autoattack, "square", functools.partial(_autoattack.square, num_queries=30))
    yield
    patch.undo()


def run(model=MODEL, inputs=INPUTS, labels=LABELS, key=KEY, **kwargs):
    result = attacks.autoattack(model, key, inputs, labels, **{"eps": EPS, **kwargs})
    return jax.tree.map(np.asarray, result)


@pytest.fixture(scope="module")
def whole(short):
    return run()


def same(first, second):
    """Equal flags; of rounding alone may the points differ."""
    for name in ("broken_by", "robust_after"):
        np.testing.assert_array_equal(first.info[name], second.info[name])
    np.testing.assert_array_equal(first.success, second.success)
    np.testing.assert_array_equal(first.queries, second.queries)
    np.testing.assert_allclose(first.inputs, second.inputs, atol=1e-5)


@pytest.mark.slow
def test_the_result_says_who_broke_what(whole):
    names = attacks.autoattack_names()
    assert names == ("apgd-ce", "apgd-t", "fab-t", "square")
    assert 0.2 * B < whole.success.sum() < 0.9 * B
    logits = np.asarray(MODEL(whole.inputs))
    np.testing.assert_array_equal(logits.argmax(1) != LABELS, whole.success)
    assert np.all(np.abs(whole.inputs - INPUTS).max((1, 2, 3)) <= EPS + 1e-6)
    assert (whole.info["broken_by"][3], whole.distance[3], whole.queries[3]) == (-1, 0, 1)
    attacked = whole.success & (whole.distance > 0)
    np.testing.assert_array_equal(whole.info["broken_by"] >= 0, attacked)
    robust = whole.info["robust_after"]
    assert robust.shape == (B, len(names))
    assert np.all(robust[:, 1:] <= robust[:, :-1])
    np.testing.assert_array_equal(robust[:, -1], ~whole.success)
    for place in range(len(names)):
        broken = whole.info["broken_by"] == place
        assert not robust[broken, place:].any()
        assert robust[broken, :place].all()


def test_the_first_part_is_apgd_on_the_cross_entropy(whole):
    keys = jax.vmap(functools.partial(jax.random.fold_in, KEY))(jnp.arange(B))
    keys = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys)
    alone = attacks.apgd(MODEL, keys, INPUTS, LABELS, eps=EPS, num_steps=8)
    np.testing.assert_array_equal(alone.success, ~whole.info["robust_after"][:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 7, 24])  # and `whole`, of one batch
def test_batches_change_nothing(whole, batch_size):
    same(run(batch_size=batch_size), whole)


@pytest.mark.slow
@pytest.mark.parametrize("num_devices", [1, 4])
def test_devices_change_nothing(whole, num_devices):
    same(run(batch_size=30, devices=jax.devices()[:num_devices]), whole)


def test_each_shape_is_compiled_once():
    shapes = []

    def counted(weights, inputs):
        shapes.append(inputs.shape[0])
        return tiny.network(weights, inputs)

    first = run(nets.callable_logits_fn(counted, NET), batch_size=32)
    assert first.success.any()
    # The classes of apgd-t and of fab-t share a program: four attacks, each traced a few times.
    assert set(shapes) <= {B, 32, 24, 16}
    assert max(shapes.count(size) for size in (16, 24, 32)) <= 4 * 4
    shapes.clear()
    changed = NET._replace(second=NET.second[::-1])
    run(nets.callable_logits_fn(counted, changed), batch_size=32, eps=2 * EPS)
    assert not shapes


class Stop(Exception):
    pass


def batches(events):
    """The events after a batch, without those inside one."""
    return [event for event in events if "step" not in event]


@pytest.mark.parametrize("stop_after", [1, 4, 9])
def test_resumed_is_uninterrupted(whole, stop_after):
    kept, seen = [], []

    def until(event):
        seen.extend(batches([event]))
        if len(seen) == stop_after:
            kept.append(jax.tree.map(np.copy, event["state"]))
            raise Stop

    with pytest.raises(Stop):
        run(batch_size=16, callback=until)
    later = []
    resumed = run(batch_size=16, start=kept[0], callback=later.append)
    same(resumed, whole)
    events = []
    run(batch_size=16, callback=events.append)
    events, later = batches(events), batches(later)
    assert len(later) == len(events) - stop_after  # nothing lost, nothing done twice
    assert [event["attack"] for event in later] == [
        event["attack"] for event in events[stop_after:]
    ]


def test_stopped_inside_square_goes_on_inside_square(whole, monkeypatch):
    monkeypatch.setattr(chunks, "_SHORTEST", 0.0)
    monkeypatch.setattr(chunks, "_LONGEST", 0.0)  # one event per chunk
    kept, steps = [], []

    def until(event):
        if event["attack"] == "square" and event.get("step") == 20:
            kept.append(jax.tree.map(np.copy, event["state"]))
            raise Stop

    with pytest.raises(Stop):
        run(callback=until)
    assert len(kept[0].part)

    def first_only(event):
        steps.append((event["attack"], event.get("step")))
        monkeypatch.setattr(chunks, "_LONGEST", 9.0)  # and then in as few as possible
        monkeypatch.setattr(chunks, "_SHORTEST", 9.0)

    same(run(start=kept[0], callback=first_only), whole)
    assert steps[0] == ("square", 20)
    # With fewer than the 16 survivors per batch the part is of other examples: it begins anew.
    steps.clear()
    monkeypatch.setattr(chunks, "_SHORTEST", 0.0)
    same(run(start=kept[0], callback=first_only, batch_size=8), whole)
    assert steps[0] == ("square", 0)


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": INPUTS[::-1].copy()},
        {"labels": np.roll(LABELS, 1)},
        {"eps": 2 * EPS},
        {"key": jax.random.key(3)},
        {"version": "rand"},
        {"norm": "l2"},
        {"targets": (LABELS + 1) % K},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_start_of_another_run_is_refused(change, a_state):
    with pytest.raises(ValueError, match="expected a start of this run, got the state of another"):
        run(start=a_state, **change)


def test_a_start_of_fewer_examples_is_refused(a_state):
    with pytest.raises(ValueError, match=r"expected start.inputs of shape"):
        run(inputs=INPUTS[:5], labels=LABELS[:5], start=a_state)


@pytest.fixture(scope="module")
def a_state(short):
    states = []
    run(callback=lambda event: states.append(jax.tree.map(np.copy, event["state"])))
    return states[1]


@pytest.mark.slow
def test_targets_are_reached():
    targets = np.argsort(CLEAN, axis=1)[:, -2]
    targets[3] = CLEAN[3].argmax()
    events = []
    result = run(targets=targets, callback=events.append)
    assert {"apgd-t", "fab-t"} < {event["attack"] for event in events}  # one class each
    reached = np.asarray(MODEL(result.inputs)).argmax(1) == targets
    np.testing.assert_array_equal(reached, result.success)
    assert 0 < result.success.sum() < B


def test_the_callback_hears_of_every_step():
    events = []
    result = run(callback=events.append, batch_size=16)
    assert {event["stage"] for event in events} == {"autoattack"}
    steps = list(dict.fromkeys(event["attack"] for event in events))
    assert steps[:3] == ["apgd-ce", "apgd-t 1/4", "apgd-t 2/4"]
    assert events[-1]["survivors"] == np.sum(~result.success)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_versions_and_norms(version, norm):
    names = attacks.autoattack_names(version, norm)
    assert ("square" in names) == (version != "rand" and norm != "l1")
    eps = {"linf": EPS, "l2": 0.25, "l1": 0.8}[norm]
    inputs, labels = INPUTS[:8], LABELS[:8]
    result = run(inputs=inputs, labels=labels, eps=eps, norm=norm, version=version)
    assert result.info["robust_after"].shape == (8, len(names))
    distance = np.linalg.norm((result.inputs - inputs).reshape(8, D), tiny.ORDER[norm], axis=1)
    assert np.all(distance <= eps * (1 + 1e-5))
    assert result.success.sum() >= 3  # one is wrong to begin with
    assert np.all(np.isfinite(result.distance))


@pytest.mark.slow
@pytest.mark.parametrize("num_classes", [2, 3])
def test_few_classes_are_said_and_attacked(num_classes):
    model = NET._replace(second=NET.second[:, :num_classes]).logits_fn()
    labels = np.asarray(model(INPUTS)).argmax(1)
    with pytest.warns(UserWarning, match=rf"not defined for {num_classes} classes"):
        result = run(model, labels=labels)
    assert 0 < result.success.sum() < B


def test_any_shape():
    flat = run(inputs=INPUTS[:10].reshape(10, D), labels=LABELS[:10])
    assert flat.inputs.shape == (10, D)
    np.testing.assert_array_equal(
        flat.info["robust_after"][:, :3], run().info["robust_after"][:10, :3]
    )


def test_distillation_hides_from_apgd_ce_and_not_from_apgd_t():
    plain = run()
    with pytest.warns(UserWarning, match=r"apgd-ce left \d+ of 64 .* the cross-entropy saturates"):
        distilled = run(NET.logits_fn(2048.0))
    np.testing.assert_array_equal(plain.success, distilled.success)
    after_ce = distilled.info["robust_after"][:, 0].mean()
    after_t = distilled.info["robust_after"][:, 1].mean()
    assert after_ce - after_t >= 0.15
    assert plain.info["robust_after"][:, 0].mean() <= after_ce - 0.1


def test_nobody_there():
    result = run(inputs=INPUTS[:0], labels=LABELS[:0])
    assert result.inputs.shape == (0, *SHAPE)
    assert result.info["robust_after"].shape == (0, 4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"eps": -1.0}, "expected eps"),
        ({"eps": np.full(B, 0.1)}, "expected eps"),
        ({"norm": "l0"}, "expected norm to be one of 'linf', 'l2', 'l1'"),
        ({"version": "custom"}, "expected version to be one of 'standard', 'plus', 'rand'"),
        ({"batch_size": 0}, "expected batch_size"),
        ({"key": None}, "expected a PRNG key"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        run(**kwargs)


def test_a_driver_refuses_tracers():
    attack = functools.partial(attacks.autoattack, MODEL, KEY, eps=EPS)
    with pytest.raises(ValueError, match="autoattack is a loop on the host"):
        jax.jit(attack)(INPUTS, LABELS)
