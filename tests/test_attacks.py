"""One battery over all attacks: the contract of `jdistill.attacks`, law by law.

A new attack is one more line in `CASES`. References for single attacks are in their own files.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill import attacks, losses, metrics, nets
from tests import tiny


class Case(NamedTuple):
    attack: Callable  # with its settings bound, all but eps
    norm: str
    budget: bool  # takes eps; otherwise it looks for the smallest distance
    random: bool  # its result depends on the key
    closely: dict = {}  # noqa: RUF012 - settings of a minimum-norm attack that find the optimum
    ratio: float = 1.02  # to the exact minimum, at most, with those settings; inf: not comparable
    changes: dict = {}  # noqa: RUF012 - other values of its traced settings
    beyond: float = 1.05  # times the smallest budget: where a random attack must succeed


CASES = {
    "apgd-linf": Case(functools.partial(attacks.apgd, num_steps=10), "linf", True, True),
    "apgd-l2": Case(
        functools.partial(attacks.apgd, norm="l2", num_steps=10, num_restarts=2),
        "l2",
        True,
        True,
    ),
    "apgd-l1": Case(functools.partial(attacks.apgd, norm="l1", num_steps=10), "l1", True, True),
    "apgd_targeted-linf": Case(
        functools.partial(attacks.apgd_targeted, num_steps=8, num_targets=2), "linf", True, True
    ),
    # BIM is PGD's loop without the random start, which runs in every norm below.
    "bim-linf": Case(attacks.bim, "linf", True, False),
    "fgsm-linf": Case(attacks.fgsm, "linf", True, False),
    "fgsm-l2": Case(functools.partial(attacks.fgsm, norm="l2"), "l2", True, False),
    "fgsm-l1": Case(functools.partial(attacks.fgsm, norm="l1"), "l1", True, False),
    "mim-linf": Case(attacks.mim, "linf", True, False),
    "mim-l2": Case(functools.partial(attacks.mim, norm="l2", num_steps=5), "l2", True, False),
    "pgd-linf": Case(functools.partial(attacks.pgd, num_steps=8), "linf", True, True),
    "pgd-l2": Case(
        functools.partial(attacks.pgd, norm="l2", num_steps=8, num_restarts=2), "l2", True, True
    ),
    "pgd-l1": Case(
        functools.partial(attacks.pgd, norm="l1", num_steps=8, num_restarts=2), "l1", True, True
    ),
    # These two share their core; the other norm of each is in test_estimated.py.
    "nes-l2": Case(
        functools.partial(attacks.nes, norm="l2", num_steps=20, num_samples=64), "l2", True, True
    ),
    "spsa": Case(functools.partial(attacks.spsa, num_steps=40, num_samples=64), "linf", True, True),
    # A corner is reached seldom.
    "square-linf": Case(functools.partial(attacks.square, num_queries=2000), "linf", True, True),
    "square-l2": Case(
        functools.partial(attacks.square, norm="l2", num_queries=2000, num_restarts=2),
        "l2",
        True,
        True,
        beyond=1.2,
    ),
    "boundary": Case(
        functools.partial(attacks.boundary, num_queries=150),
        "l2",
        False,
        True,
        closely={"num_queries": 2000},
        changes={"orthogonal_step": 0.1, "source_step": 0.02},
    ),
    "hop_skip_jump-l2": Case(
        functools.partial(attacks.hop_skip_jump, norm="l2", num_queries=150, num_samples=20),
        "l2",
        False,
        True,
        closely={"num_queries": 5000, "num_samples": 100, "gamma": 0.1},
        ratio=1.05,
        changes={"gamma": 0.5},
    ),
    "hop_skip_jump-linf": Case(
        functools.partial(attacks.hop_skip_jump, norm="linf", num_queries=150, num_samples=20),
        "linf",
        False,
        True,
        closely={"num_queries": 5000, "num_samples": 100, "gamma": 0.1},
        ratio=1.7,  # one example ends at another class's boundary
        changes={"gamma": 0.5},
    ),
    "carlini_wagner_l2": Case(
        functools.partial(
            attacks.carlini_wagner_l2,
            num_searches=5,
            num_steps=40,
            learning_rate=0.05,
            initial_const=0.01,
        ),
        "l2",
        False,
        False,
        closely={"num_searches": 9, "num_steps": 400, "learning_rate": 0.002},
        changes={"confidence": 0.5, "learning_rate": 0.02, "initial_const": 0.1},
    ),
    "carlini_wagner_l0": Case(
        functools.partial(
            attacks.carlini_wagner_l0,
            num_steps=50,
            learning_rate=0.05,
            initial_const=0.1,
            largest_const=100.0,
            const_factor=10.0,
        ),
        "l0",
        False,
        False,
        closely={"num_steps": 200},
        ratio=2.0,  # one feature of few
        changes={
            "confidence": 0.5,
            "learning_rate": 0.02,
            "initial_const": 0.2,
            "largest_const": 50.0,
            "const_factor": 3.0,
        },
    ),
    "carlini_wagner_linf": Case(
        functools.partial(
            attacks.carlini_wagner_linf,
            num_steps=50,
            learning_rate=0.02,
            initial_const=0.1,
            const_factor=10.0,
        ),
        "linf",
        False,
        False,
        closely={"num_steps": 200, "learning_rate": 0.005},
        ratio=1.12,  # the threshold shrinks by a tenth a round
        changes={
            "confidence": 0.5,
            "learning_rate": 0.01,
            "shrink": 0.8,
            "initial_const": 0.2,
            "largest_const": 5.0,
            "const_factor": 3.0,
        },
    ),
    "ddn": Case(
        functools.partial(attacks.ddn, num_steps=40),
        "l2",
        False,
        False,
        closely={"num_steps": 300},
        ratio=1.05,  # the radius moves by 5% a step
        changes={"gamma": 0.1, "initial_norm": 0.5, "step_size": 0.3},
    ),
    "ead": Case(
        functools.partial(attacks.ead, num_searches=6, num_steps=40),
        "l1",
        False,
        False,
        closely={"num_searches": 9, "num_steps": 400},
        ratio=1.05,
        changes={
            "beta": 0.02,
            "confidence": 0.5,
            "learning_rate": 0.02,
            "initial_const": 0.1,
        },
    ),
    "deepfool-l2": Case(
        attacks.deepfool,
        "l2",
        False,
        False,
        closely={"overshoot": 0.01},
        changes={"overshoot": 0.1},
    ),
    "deepfool-linf": Case(
        functools.partial(attacks.deepfool, norm="linf"),
        "linf",
        False,
        False,
        closely={"overshoot": 0.01},
        changes={"overshoot": 0.1},
    ),
    "jsma": Case(
        functools.partial(attacks.jsma, max_features=6),
        "l0",
        False,
        False,
        ratio=np.inf,  # greedy, and in whole pairs
        changes={"theta": 0.5},
    ),
}
CASES["sigma_zero"] = Case(
    functools.partial(attacks.sigma_zero, num_steps=40),
    "l0",
    False,
    False,
    closely={"num_steps": 300},
    ratio=2.0,  # one feature of few
    changes={"step_size": 0.5, "sigma": 0.01, "threshold": 0.2, "threshold_step": 0.02},
)
for _norm in ("linf", "l2", "l1", "l0"):
    CASES[f"fmn-{_norm}"] = Case(
        # Not to the default's 0.001, with which many examples end in what the battery calls a tie.
        functools.partial(attacks.fmn, norm=_norm, num_steps=30, final_gamma=0.02),
        _norm,
        False,
        False,
        closely={"final_gamma": 0.001},
        ratio=2.0 if _norm == "l0" else 1.01,
        changes={"gamma": 0.1, "final_gamma": 0.01, "step_size": 0.3},
    )
for _norm in ("linf", "l2", "l1"):
    for _attack, _more in ((attacks.fab, {}), (attacks.fab_targeted, {"num_targets": 2})):
        CASES[f"{_attack.__name__}-{_norm}"] = Case(
            # From beyond the boundary the overshoots of a step cancel, and it ends in a tie; a
            # smaller beta than the default's leads back across.
            functools.partial(_attack, norm=_norm, num_steps=10, beta=0.75, **_more),
            _norm,
            False,
            False,
            closely={"num_targets": 3} if _more else {},
            changes={"alpha_max": 0.2, "eta": 1.1, "beta": 0.8},
        )
# About half of the test network's examples fall.
BUDGETS = {"linf": 0.1, "l2": 0.25, "l1": 0.4, "l0": 2}


def for_each(argument, values):
    """A test for each value by an attack's name; an attack's tests run where it is compiled."""
    return pytest.mark.parametrize(
        argument,
        [
            pytest.param(value, id=name, marks=pytest.mark.xdist_group(f"battery {name}"))
            for name, value in values.items()
        ],
    )


all_cases = for_each("case", CASES)


def one_norm_each():
    """The attacks, each in its first norm; in l1 APGD is another loop."""
    found = {}
    for name, case in CASES.items():
        fun = getattr(case.attack, "func", case.attack)
        found.setdefault("apgd-l1" if name == "apgd-l1" else fun, (name, case))
    return dict(found.values())


attack_cases = for_each("case", one_norm_each())
budget_cases = for_each("case", {name: case for name, case in CASES.items() if case.budget})
minimum_cases = for_each("case", {name: case for name, case in CASES.items() if not case.budget})
optimum_cases = for_each(
    "case",
    {name: case for name, case in CASES.items() if not case.budget and case.ratio < np.inf},
)

B, SHAPE, D, H, K = 8, (3, 2), 6, 8, 4
KEY = jax.random.key(7)
KEYS = jax.random.split(KEY, B)

# One network plays every part, its weights decide which: a program is compiled once for all.
TRACES = []
PLAIN = {
    "first": np.zeros((D, H), np.float32),
    "second": np.zeros((H, K), np.float32),
    "linear": np.zeros((D, K), np.float32),
    "bias": np.zeros(K, np.float32),
    "broken": np.float32(0.0),  # the value that breaks:
    "broken_at": np.float32(-99.0),  # all logits, where the first input is exactly this
    "broken_past": np.float32(np.inf),  # the last logit, where the inputs' sum is above this
}


def network(weights, inputs):
    """`tanh(W x) V + U x + b`, or a broken version of it; counts how often it is traced."""
    TRACES.append(inputs.shape)
    flat = inputs.reshape(inputs.shape[0], D)
    logits = jnp.tanh((flat - 0.5) @ weights["first"]) @ weights["second"]
    logits = logits + flat @ weights["linear"] + weights["bias"][None]
    hit = flat[:, :1] == weights["broken_at"]
    past = jnp.sum(flat, axis=1, keepdims=True) > weights["broken_past"]
    broken = hit | (past & (jnp.arange(K) == K - 1)[None])
    return jnp.where(broken, weights["broken"], logits)


def part(**weights):
    arrays = {name: jnp.asarray(value, jnp.float32) for name, value in (PLAIN | weights).items()}
    # At a temperature, so that tests with another one share the programs of the rest.
    return nets.with_temperature(nets.callable_logits_fn(network, arrays), 1.0)


def weights_of(logits_fn):
    (weights,) = logits_fn.args[0].args
    return weights


def make(seed=0, scale=1.0, **weights):
    """The small smooth network of most tests."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(0, 1.5, (D, H)), rng.normal(0, scale, (H, K))
    return part(first=first, second=second, **weights)


def numpy_logits(logits_fn, inputs):
    weights = {name: np.asarray(w, np.float64) for name, w in weights_of(logits_fn).items()}
    flat = np.asarray(inputs, np.float64).reshape(-1, D)
    hidden = np.tanh((flat - 0.5) @ weights["first"])
    return hidden @ weights["second"] + flat @ weights["linear"] + weights["bias"]


def nets_call(logits_fn, inputs):
    """The logits, by the program that attacks judge the clean input with."""
    return jax.jit(lambda f, x: f(x))(logits_fn, inputs)


def call(case, logits_fn, inputs, labels, *, key=KEY, eps=None, **kwargs):
    """The attack, with the case's budget where no other is given."""
    if case.budget:
        kwargs["eps"] = BUDGETS[case.norm] if eps is None else eps
    return case.attack(logits_fn, key, inputs, labels, **kwargs)


def run(*args, **kwargs):
    """`call`, and the result as NumPy arrays."""
    return jax.tree.map(np.asarray, call(*args, **kwargs))


def numpy_excess(logits, labels, targets=None):
    """By how much the goal is passed; above 0 is a success."""
    return tiny.margins(logits, labels) if targets is None else -tiny.margins(logits, targets)


def numpy_distance(delta, norm):
    flat = np.asarray(delta, np.float64).reshape(len(delta), -1)
    return np.linalg.norm(flat, tiny.ORDER[norm], axis=1)


MODEL = make()
INPUTS = np.random.default_rng(10).uniform(0, 1, (B, *SHAPE)).astype(np.float32)
CLEAN = numpy_logits(MODEL, INPUTS)
LABELS = CLEAN.argmax(1)  # all right, but for the last one
LABELS[-1] = CLEAN[-1].argmin()
WRONG = B - 1
RIGHT = np.arange(B) != WRONG
TARGETS = np.argsort(CLEAN, axis=1)[:, -2]  # the runner-up


def clear(logits, excess):
    """Examples whose flag rounding cannot change."""
    return np.abs(excess) > 1e-5 * np.abs(logits).max(1)


def assert_same(first, second, *, labels=LABELS, logits_fn=MODEL, targets=None, rtol=1e-4):
    """Equal flags outside ties, equal distances."""
    keep = np.ones(len(first.inputs), bool)
    for result in (first, second):
        logits = numpy_logits(logits_fn, result.inputs)
        keep &= clear(logits, numpy_excess(logits, labels, targets))
    assert keep.sum() >= len(keep) - 1
    np.testing.assert_array_equal(first.success[keep], second.success[keep])
    np.testing.assert_allclose(first.distance[keep], second.distance[keep], rtol=rtol, atol=1e-6)


# -------------------------------------------------------------------------------------------------
# The result


@pytest.mark.floor
@all_cases
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_result_is_what_it_says(case, targeted):
    targets = TARGETS if targeted else None
    result = run(case, MODEL, INPUTS, LABELS, targets=targets)
    assert isinstance(result, attacks.AttackResult)
    assert result.inputs.shape == INPUTS.shape
    assert result.inputs.dtype == np.float32
    assert result.success.dtype == bool
    assert result.queries.dtype == np.int32
    for leaf in jax.tree.leaves(result):
        assert leaf.shape[0] == B
    # In the box, and in the ball where there is one.
    assert np.all((result.inputs >= 0) & (result.inputs <= 1))
    # The distance is that of the returned point, and `inf` where nothing was found.
    distance = numpy_distance(result.inputs - INPUTS, case.norm)
    if case.budget:
        assert np.all(distance <= BUDGETS[case.norm] * (1 + 1e-5))
        np.testing.assert_allclose(result.distance, distance, rtol=1e-5, atol=1e-7)
    else:
        expected = np.where(result.success, distance, np.inf)
        np.testing.assert_allclose(result.distance, expected, rtol=1e-5, atol=1e-7)
    # Success, computed anew in float64.
    logits = numpy_logits(MODEL, result.inputs)
    excess = numpy_excess(logits, LABELS, targets)
    keep = clear(logits, excess)
    np.testing.assert_array_equal(result.success[keep], excess[keep] > 0)
    # The attack did something: it broke examples that were right.
    before = numpy_excess(CLEAN, LABELS, targets) > 0
    assert result.success[~before].sum() >= 2
    assert np.all(result.queries[~before] >= 2)
    # An example already wrong is left alone.
    if not targeted:
        np.testing.assert_array_equal(result.inputs[WRONG], INPUTS[WRONG])
        row = (result.success[WRONG], result.distance[WRONG], result.queries[WRONG])
        assert row == (True, 0, 1)


@all_cases
def test_every_attack_says_how_it_went(case):
    result = run(case, MODEL, INPUTS, LABELS, trace=True)
    plain = run(case, MODEL, INPUTS, LABELS)
    # Another program, which may round the last bit differently.
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), result[:4], plain[:4]
    )
    assert plain.info.keys() >= {"first_success", "gradients"}
    assert "trace" not in plain.info
    first, trace = result.info["first_success"], result.info["trace"]
    # -1 never, 0 the clean input, k >= 1 the k-th point judged.
    np.testing.assert_array_equal(first >= 0, result.success)
    np.testing.assert_array_equal(first == 0, ~RIGHT)
    # What was judged is recorded, point by point; the verification may judge one more.
    assert trace.ndim == 2
    recorded = ~np.isnan(trace)
    events = recorded.sum(1)
    np.testing.assert_array_equal(recorded, np.arange(trace.shape[1]) < events[:, None])
    assert np.all(first <= events + 1)
    assert events[WRONG] == 0
    # What it cost is what was judged, and no more than it can cost.
    budget = {"eps": BUDGETS[case.norm]} if case.budget else {}
    most = attacks.cost(functools.partial(case.attack, **budget), shape=SHAPE, num_classes=K)
    assert result.info["gradients"].dtype == np.int32
    assert np.all(result.queries <= most.forward)
    assert np.all(result.info["gradients"] <= most.backward)
    assert (most.backward > 0) == (attacks.traits(case.attack).access == "gradient")
    if trace.shape[1]:
        rest = result.queries[RIGHT] - 2
        assert np.all(rest % events[RIGHT] == 0)
        assert len(set(rest // events[RIGHT])) == 1  # forward passes per event


@attack_cases
def test_numbers_may_differ_by_example(case):
    parameters = inspect.signature(case.attack).parameters.values()
    numbers = {
        p.name: case.changes.get(p.name, p.default)
        for p in parameters
        if isinstance(p.default, float) and p.name not in SHARED
    }
    numbers = {name: value for name, value in numbers.items()}
    scalars = run(case, MODEL, INPUTS, LABELS, key=KEYS, **numbers)
    each = {name: np.full(B, value, np.float32) for name, value in numbers.items()}
    same = run(case, MODEL, INPUTS, LABELS, key=KEYS, **each)
    jax.tree.map(np.testing.assert_array_equal, same, scalars)
    # Another number for some leaves the others as they were.
    for name, value in numbers.items():
        some = np.where(np.arange(B) < B // 2, value, 0.9 * value).astype(np.float32)
        mixed = run(case, MODEL, INPUTS, LABELS, key=KEYS, **(each | {name: some}))
        half = jax.tree.map(lambda leaf: leaf[: B // 2], (mixed, scalars))
        jax.tree.map(np.testing.assert_array_equal, *half)


# Numbers that hold for all examples: what is seen beyond an image's edges.
SHARED = {"fill"}


@attack_cases
def test_a_start_of_the_callers(case):
    # Every attack that starts from a point takes it; what is outside ball and box is brought in.
    if "init" not in inspect.signature(case.attack).parameters:
        assert attacks.traits(case.attack).name in STARTLESS
        return
    init = np.random.default_rng(4).uniform(-0.2, 1.2, INPUTS.shape).astype(np.float32)
    result = run(case, MODEL, INPUTS, LABELS, init=init)
    np.testing.assert_array_equal(result.inputs[WRONG], INPUTS[WRONG])
    assert np.all((result.inputs >= 0) & (result.inputs <= 1))
    if case.budget:
        assert np.all(result.distance <= BUDGETS[case.norm] * (1 + 1e-5))
    else:
        inside = run(case, MODEL, INPUTS, LABELS, init=init.clip(0, 1))
        jax.tree.map(np.testing.assert_array_equal, result, inside)
        # One beyond the boundary is a success, the first point that is judged.
        pool = np.random.default_rng(5).uniform(0, 1, (64, *SHAPE)).astype(np.float32)
        logits = numpy_logits(MODEL, pool)
        best = [numpy_excess(logits, np.full(64, label)).argmax() for label in LABELS]
        result = run(case, MODEL, INPUTS, LABELS, init=pool[best])
        np.testing.assert_array_equal(result.success, True)
        np.testing.assert_array_equal(result.info["first_success"], RIGHT)
    plain = run(case, MODEL, INPUTS, LABELS)
    assert not np.array_equal(result.inputs, plain.inputs)
    with pytest.raises(ValueError, match=r"expected init of the inputs' shape \(8, 3, 2\), got"):
        run(case, MODEL, INPUTS, LABELS, init=init[:3])


# They start at the input by definition, or draw their starts around it.
STARTLESS = {"ddn", "fab", "fab_targeted", "fgsm", "fmn", "sigma_zero"}


@all_cases
def test_an_example_already_at_its_target_is_left_alone(case):
    # The last example is taken for its target to begin with; its neighbors are not.
    targets = TARGETS.copy()
    targets[WRONG] = CLEAN[WRONG].argmax()
    result = run(case, MODEL, INPUTS, LABELS, targets=targets)
    np.testing.assert_array_equal(result.inputs[WRONG], INPUTS[WRONG])
    row = (result.success[WRONG], result.distance[WRONG], result.queries[WRONG])
    assert row == (True, 0, 1)
    assert np.all(result.queries[:WRONG] > 1)


@budget_cases
def test_no_budget_no_change(case):
    eps = np.full(B, BUDGETS[case.norm], np.float32)
    eps[:4] = 0
    result = run(case, MODEL, INPUTS, LABELS, eps=eps)
    np.testing.assert_array_equal(result.inputs[:4], INPUTS[:4])
    np.testing.assert_array_equal(result.distance[:4], 0)
    assert not np.any(result.success[:4])
    assert np.all(result.distance[4:WRONG] > 0)


@budget_cases
def test_a_budget_per_example(case):
    eps = np.linspace(0.5, 1.5, B).astype(np.float32) * BUDGETS[case.norm]
    together = run(case, MODEL, INPUTS, LABELS, eps=eps, key=KEYS)
    assert np.all(together.distance <= eps * (1 + 1e-5))
    for b in (0, 5):
        alone = run(case, MODEL, INPUTS, LABELS, eps=float(eps[b]), key=KEYS)
        np.testing.assert_allclose(together.inputs[b], alone.inputs[b], atol=1e-6)


@all_cases
def test_the_box_may_be_any(case):
    # In float32, (low + high) / 2 - (high - low) / 2 lies below this `low`.
    low, high = np.float32(-1.55), np.float32(2.46)
    inputs = (low + (high - low) * INPUTS).clip(low, high)
    inputs[0], inputs[1] = low, high  # on its faces
    wide = {"eps": 9.0} if case.budget else {}
    for sign in (1, -1):
        # Class 0 wins everywhere but in one corner of the box.
        linear = np.zeros((D, K))
        linear[:, 1] = sign
        corner = high if sign > 0 else low
        bias = [0, 1e-2 - sign * D * corner, -999, -999]
        result = run(
            case,
            part(linear=linear, bias=bias),
            inputs,
            np.zeros(B, int),
            bounds=(float(low), float(high)),
            **wide,
        )
        assert np.all((result.inputs >= low) & (result.inputs <= high))
        assert np.any(result.distance[2:] > 0.5)


def in_a_box(weights, box, inputs):
    """The network on inputs in a box of this low end and width."""
    return network(weights, (inputs - box[0]) / box[1])


@pytest.mark.parametrize(("low", "high"), [(0.0, 255.0), (-1.0, 1.0)])
@all_cases
def test_the_same_network_in_another_box_fares_the_same(case, low, high):
    # Settings in input units keep their defaults, which follow the box.
    width = high - low
    model = nets.callable_logits_fn(in_a_box, weights_of(MODEL), jnp.float32([low, width]))
    eps = {"eps": BUDGETS[case.norm] * (1 if case.norm == "l0" else width)} if case.budget else {}
    expected = run(case, MODEL, INPUTS, LABELS)
    result = run(case, model, low + width * INPUTS, LABELS, bounds=(low, high), **eps)
    assert np.sum(result.success != expected.success) <= (2 if case.random else 1)
    found = result.success & expected.success
    scale = 1 if case.norm == "l0" else width
    if not case.budget:
        ratio = np.median(result.distance[found] / scale) / np.median(expected.distance[found])
        assert 0.9 <= ratio <= 1.1, ratio


@pytest.mark.slow  # ends per feature are another program
@all_cases
def test_the_box_may_differ_by_feature(case):
    kwargs = {"eps": 3 * BUDGETS[case.norm]} if case.budget else {}
    expected = run(case, MODEL, INPUTS, LABELS, **kwargs)
    ends = np.zeros(SHAPE), np.ones(SHAPE[1:])  # either may be anything that broadcasts
    assert_same(run(case, MODEL, INPUTS, LABELS, bounds=ends, **kwargs), expected)
    low, high = np.zeros(SHAPE, np.float32), np.ones(SHAPE, np.float32)
    low[0], high[0] = INPUTS[:, 0].min(0), INPUTS[:, 0].max(0) + 0.01
    result = run(case, MODEL, INPUTS, LABELS, bounds=(low, high), **kwargs)
    assert np.all((result.inputs >= low) & (result.inputs <= high))
    if case.budget and case.norm in ("linf", "l2"):  # others may leave these features alone
        assert np.any((expected.inputs < low) | (expected.inputs > high))
    both = result.success & expected.success & (expected.distance > 0)
    assert both.sum() >= 3
    if not case.budget:
        assert np.median(result.distance[both] / expected.distance[both]) > 0.97


@for_each("name", {name: name for name in ("deepfool-l2", "fmn-l2", "ddn", "fab-l2")})
def test_a_wide_feature_leaves_the_others_their_scale(name):
    case = CASES[name]._replace(attack=functools.partial(CASES[name].attack, num_steps=60))
    expected = run(case, MODEL, INPUTS, LABELS)
    high = np.ones(SHAPE, np.float32)
    high[0, 0] = 1e6
    result = run(case, MODEL, INPUTS, LABELS, bounds=(0.0, high))
    found = expected.success & result.success & (expected.distance > 0)
    assert found.sum() >= 6
    assert np.median(result.distance[found] / expected.distance[found]) < 1.1


def test_bounds_that_float32_cannot_hold_are_no_bounds():
    largest = float(np.finfo(np.float32).max)
    for low, high in ((-largest, largest), (-1e39, 1e39)):
        with pytest.raises(ValueError, match="with infinite bounds, got None"):
            attacks.ddn(MODEL, None, INPUTS, LABELS, bounds=(low, high))
        with pytest.raises(ValueError, match=r"expected bounds=\(low, high\) finite"):
            attacks.carlini_wagner_l2(MODEL, None, INPUTS, LABELS, bounds=(low, high))
        assert attacks.deepfool(MODEL, None, INPUTS, LABELS, bounds=(low, high)).success.all()
    empty = attacks.deepfool(MODEL, None, INPUTS[:0], LABELS[:0], bounds=(0.0, np.ones(SHAPE)))
    assert empty.success.shape == (0,)


IN_INPUT_UNITS = {"step_size", "initial_norm", "delta", "sigma", "theta"}
NEED_A_BOX = {
    "boundary", "carlini_wagner_l0", "carlini_wagner_l2", "carlini_wagner_linf", "ead",
    "hop_skip_jump", "sigma_zero",
}  # fmt: skip


@all_cases
def test_a_box_without_ends(case):
    attack = functools.partial(case.attack)
    name, settings = attacks.traits(attack).name, attacks.traits(attack).settings
    if name in NEED_A_BOX:
        with pytest.raises(ValueError, match=r"bounds=\(low, high\) finite, got \(-inf, inf\)"):
            run(case, MODEL, INPUTS, LABELS, bounds=(-np.inf, np.inf))
        return
    missing = [key for key in IN_INPUT_UNITS if key in settings and settings[key] is None]
    if (missing and "eps" not in settings and not case.budget) or name in ("spsa", "nes"):
        with pytest.raises(ValueError, match="with infinite bounds, got None"):
            run(case, MODEL, INPUTS, LABELS, bounds=(-np.inf, np.inf))
    own = {key: 0.01 if key in ("delta", "sigma") else 1.0 for key in missing}
    if case.budget and name not in ("spsa", "nes"):
        own = {}
    case = case._replace(attack=functools.partial(case.attack, **own))
    wide = run(case, MODEL, INPUTS, LABELS, bounds=(-50.0, 50.0))
    result = run(case, MODEL, INPUTS, LABELS, bounds=(-np.inf, np.inf))
    assert np.all(np.isfinite(result.inputs))
    assert result.success.any()
    np.testing.assert_array_equal(result.success, wide.success)
    np.testing.assert_allclose(result.distance, wide.distance, rtol=1e-4)


@pytest.mark.slow
def test_drivers_take_ends_per_feature():
    ends = np.zeros(SHAPE), np.ones(SHAPE)
    table = [functools.partial(attacks.pgd, eps=0.2, num_steps=4), attacks.fgsm]
    table[1] = functools.partial(attacks.fgsm, eps=0.2)
    for attack in (
        functools.partial(attacks.ensemble, attacks=table, batch_size=3),
        functools.partial(attacks.autoattack, eps=0.1, batch_size=8),
        functools.partial(attacks.universal, eps=0.3, num_epochs=2),
    ):
        expected = attack(MODEL, KEY, INPUTS, LABELS)
        result = attack(MODEL, KEY, INPUTS, LABELS, bounds=ends)
        np.testing.assert_array_equal(result.success, expected.success)
        np.testing.assert_allclose(result.inputs, expected.inputs, atol=1e-5)


@for_each("name", {name: name for name in ("fgsm-linf", "pgd-l2", "carlini_wagner_l2")})
def test_one_input_axis(name):
    # Tabular inputs [B, D] behave as images [B, ...] of the same numbers.
    case = CASES[name]
    image = run(case, MODEL, INPUTS, LABELS)
    table = run(case, MODEL, INPUTS.reshape(B, D), LABELS)
    assert table.inputs.shape == (B, D)
    assert_same(table, image)


# -------------------------------------------------------------------------------------------------
# Exact optima: a linear network, the box inactive


def linear_problem(num_classes, seed):
    """A linear network of which the other classes never win, and its inputs and labels."""
    rng = np.random.default_rng(seed)
    linear = rng.normal(0, 1, (D, K)).astype(np.float32)
    bias = -0.5 * linear.sum(0) - np.where(np.arange(K) < num_classes, 0, 999)
    inputs = rng.uniform(0.4, 0.6, (B, *SHAPE)).astype(np.float32)
    logits_fn = part(linear=linear, bias=bias)
    return logits_fn, inputs, numpy_logits(logits_fn, inputs).argmax(1)


def exact_distances(logits_fn, inputs, labels, norm):
    """The distance to each other class's boundary, |f| / ‖Δw‖ in the dual norm, `[B, K]`."""
    linear = np.asarray(weights_of(logits_fn)["linear"], np.float64)
    logits = numpy_logits(logits_fn, inputs)
    if norm != "l0":
        return tiny.exact_distances(logits, linear, norm)
    # The most effective entries first, each as far as the box lets it.
    gaps = logits[np.arange(B), labels][:, None] - logits
    slopes = linear.T[labels][:, None] - linear.T[None]
    room = np.where(slopes > 0, inputs.reshape(B, 1, D), 1 - inputs.reshape(B, 1, D))
    gains = np.cumsum(-np.sort(-room * np.abs(slopes), axis=2), axis=2)
    return np.where(gaps > 0, 1.0 + np.sum(gains <= gaps[:, :, None], axis=2), np.inf)


@pytest.mark.floor
@budget_cases
def test_budget_attacks_on_two_classes_succeed_exactly_beyond_the_boundary(case):
    problem = linear_problem(2, seed=3)
    exact = exact_distances(*problem, case.norm).min(1)
    assert exact.max() < 0.2  # far from the box
    for factor, expected in [(0.999, False), (case.beyond if case.random else 1.001, True)]:
        result = run(case, *problem, eps=factor * exact)
        np.testing.assert_array_equal(result.success, np.full(B, expected))


@budget_cases
def test_budget_attacks_on_many_classes_never_beat_the_optimum(case):
    problem = linear_problem(K, seed=4)
    exact = exact_distances(*problem, case.norm).min(1)
    assert not np.any(run(case, *problem, eps=0.999 * exact).success)
    assert np.mean(run(case, *problem, eps=3 * exact).success) >= 0.5


@pytest.mark.floor
@optimum_cases
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_minimum_norm_attacks_find_the_optimum(case, targeted):
    problem = linear_problem(K, seed=4)
    exact = exact_distances(*problem, case.norm)
    targets = exact.argmin(1) if targeted else None
    result = run(case, *problem, targets=targets, **case.closely)
    assert np.all(result.success)
    ratio = result.distance / exact.min(1)
    assert ratio.min() >= 1 - 1e-5
    assert ratio.max() <= case.ratio


# -------------------------------------------------------------------------------------------------
# What is no success, and broken networks


@all_cases
def test_a_tie_is_no_success_of_an_attack_and_no_merit_of_a_network(case):
    linear = np.ones((D, K))
    tied = part(linear=linear, bias=[0, 0, -1, -1])
    assert not np.any(run(case, tied, INPUTS, np.zeros(B, int)).success)
    # `argmax` takes the first of the largest: wrong to begin with, as accuracy has it.
    wrong = run(case, tied, INPUTS, np.ones(B, int))
    assert np.all(wrong.success)
    np.testing.assert_array_equal(wrong.distance, 0)
    np.testing.assert_array_equal(wrong.info["first_success"], 0)
    result = run(case, tied, INPUTS, np.full(B, 2), targets=np.full(B, 0))
    assert not np.any(result.success)


@pytest.mark.parametrize(
    ("weights", "labels"),
    [
        ({"linear": np.zeros((D, K))}, np.arange(B) % K),
        ({"offset": 1e7}, np.arange(B) % K),
        ({"offset": -3e7}, LABELS),
    ],
    ids=["all equal", "1e7 on all", "-3e7 on all"],
)
@all_cases
def test_robust_accuracy_is_at_most_accuracy(case, weights, labels):
    offset = np.full(K, weights.get("offset", 0.0))
    model = part(linear=weights["linear"]) if "linear" in weights else make(bias=offset)
    right = metrics.correct(np.asarray(nets_call(model, INPUTS)), labels)
    result = run(case, model, INPUTS, labels)
    assert np.all(result.success | right)
    assert np.mean(~result.success) <= metrics.accuracy(nets_call(model, INPUTS), labels).value


def of_a_type(weights, like, inputs):
    first, second = weights
    flat = inputs.reshape(inputs.shape[0], D).astype(like.dtype)
    return jnp.tanh((flat - 0.5) @ first.astype(like.dtype)) @ second.astype(like.dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_classes", "dtype"),
    [(2, "float32"), (10, "bfloat16"), (100, "float64"), (300, "float32")],
)
@all_cases
def test_accuracy_bounds_robust_accuracy_for_any_number_and_type(case, num_classes, dtype):
    name = attacks.traits(case.attack).name
    if num_classes == 2 and name in ("apgd_targeted", "fab_targeted"):
        case = case._replace(attack=functools.partial(case.attack, num_targets=1))
    rng = np.random.default_rng(num_classes)
    weights = rng.normal(0, 1.5, (D, H)), rng.normal(0, 1.0, (H, num_classes))
    context = tiny.double_precision() if dtype == "float64" else contextlib.nullcontext()
    with context:
        inputs = jnp.asarray(INPUTS, "float64" if dtype == "float64" else "float32")
        weights = jax.tree.map(lambda leaf: jnp.asarray(leaf, inputs.dtype), weights)
        model = nets.callable_logits_fn(of_a_type, weights, jnp.zeros((), dtype))
        logits = nets_call(model, inputs)
        assert logits.dtype == dtype
        labels = np.array(jnp.argmax(logits, axis=1))
        labels[::3] = (labels[::3] + 1) % num_classes  # some are wrong to begin with
        right = metrics.correct(logits, labels)
        result = run(case, model, inputs, labels)
        judged = np.asarray(nets_call(model, result.inputs), np.float64)
    assert result.inputs.dtype == inputs.dtype
    assert np.all((result.inputs >= 0) & (result.inputs <= 1))
    assert np.all(result.success | right)
    assert np.all(result.distance[~right] == 0)
    assert result.success[right].any()
    fooled = tiny.margins(judged, labels) > -1e-5 * np.abs(judged).max(1)
    assert np.all(fooled | ~result.success | ~right)


@all_cases
def test_a_class_that_is_masked_out_is_no_class(case):
    far, masked = (make(bias=[0, 0, 0, value]) for value in (-30.0, -np.inf))
    labels = np.where(LABELS == 3, 0, LABELS)
    expected, result = (run(case, model, INPUTS, labels) for model in (far, masked))
    assert np.all(np.isfinite(result.inputs))
    assert np.sum(expected.success != result.success) <= 1
    found = expected.success & result.success
    assert found.sum() >= 3
    if not case.budget:
        ratio = np.median(result.distance[found]) / np.median(expected.distance[found])
        assert ratio <= 1.15, ratio


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@all_cases
def test_broken_logits_of_an_adversarial_are_no_success(case, bad):
    # Right while the sum is below D / 2; across that boundary the last logit is broken.
    linear = np.zeros((D, K))
    linear[:, 0], linear[:, 1] = -1, 1
    bias = [D / 2, -D / 2, -9, -9]
    inputs = np.full((B, *SHAPE), 0.48, np.float32)
    whole = run(case, part(linear=linear, bias=bias), inputs, np.zeros(B, int), eps=0.4)
    assert np.all(whole.success)
    broken = part(linear=linear, bias=bias, broken=bad, broken_past=D / 2)
    result = run(case, broken, inputs, np.zeros(B, int), eps=0.4)
    assert not np.any(result.success)
    assert np.all(np.isfinite(result.inputs))
    if not case.budget:
        np.testing.assert_array_equal(result.inputs, inputs)
        assert np.all(np.isinf(result.distance))


def unsound(logits, labels):
    """A cross-entropy as one writes it: the logarithm of a softmax that saturates is -inf."""
    shares = jax.nn.softmax(logits)
    return -jnp.sum(jnp.where(jax.nn.one_hot(labels, K) > 0, 1.0, 0.0) * jnp.log(shares), axis=-1)


@pytest.mark.parametrize("name", ["fgsm", "pgd", "mim", "apgd", "fmn", "ddn"])
def test_a_loss_that_is_nan_is_named(name):
    budget = {} if name in ("fmn", "ddn") else {"eps": 0.01}
    attack = functools.partial(getattr(attacks, name), **budget)
    saturated = make(scale=400.0)
    with pytest.raises(FloatingPointError, match=r"expected a loss .* got NaN for example 0"):
        attack(saturated, KEY, INPUTS, LABELS, loss=unsound)
    attack(make(scale=0.1), KEY, INPUTS, LABELS, loss=unsound)  # where it is sound
    attack(saturated, KEY, INPUTS, LABELS)
    withstood = part(linear=np.zeros((D, K)), bias=[1, 0, 0, np.nan])  # no loss's fault
    attack(withstood, KEY, INPUTS, np.zeros(B, int), loss=unsound)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])  # all logits
@all_cases
def test_broken_clean_logits_count_as_misclassified_and_stay_alone(case, bad):
    inputs = INPUTS.copy()
    inputs[2, 0, 0] = 0.125
    result = run(case, make(broken=bad, broken_at=0.125), inputs, LABELS, key=KEYS)
    assert (result.success[2], result.distance[2], result.queries[2]) == (True, 0, 1)
    np.testing.assert_array_equal(result.inputs[2], inputs[2])
    # The neighbors fare as they do without it.
    others = np.arange(B) != 2
    healthy = run(case, MODEL, INPUTS, LABELS, key=KEYS)
    np.testing.assert_array_equal(result.success[others], healthy.success[others])
    np.testing.assert_allclose(result.inputs[others], healthy.inputs[others], atol=1e-5)


@all_cases
def test_nothing_to_follow_ends_cleanly(case):
    result = run(case, part(bias=[0, 1, 0, 0]), INPUTS, np.ones(B, int))
    assert not np.any(result.success)
    assert np.all((result.inputs >= 0) & (result.inputs <= 1))
    if case.budget:
        assert np.all(result.distance <= BUDGETS[case.norm] * (1 + 1e-5))
        assert case.random or np.all(result.distance == 0)
    else:
        np.testing.assert_array_equal(result.inputs, INPUTS)
        assert np.all(np.isinf(result.distance))


def test_a_saturated_softmax_stops_the_cross_entropy_and_not_the_margin():
    # The claim about distillation in one test: logits times 10^5 leave no gradient to FGSM.
    hot = make(scale=1e5)
    right = CLEAN.argmax(1)
    masked = run(CASES["fgsm-linf"], hot, INPUTS, right, eps=0.3)
    np.testing.assert_array_equal(masked.inputs, INPUTS)
    assert not np.any(masked.success)
    honest = run(CASES["fgsm-linf"], hot, INPUTS, right, eps=0.3, loss=losses.margin)
    plain = run(CASES["fgsm-linf"], MODEL, INPUTS, right, eps=0.3, loss=losses.margin)
    assert np.mean(honest.success) > 0.7
    np.testing.assert_array_equal(honest.success, plain.success)
    assert np.all(run(CASES["carlini_wagner_l2"], hot, INPUTS, right).success)


# -------------------------------------------------------------------------------------------------
# The scale of the logits: what distillation at a temperature multiplies

SCALES = (16.0, 128.0, 1024.0)
# What makes an attack scale-free whose default, as published, follows a softmax at T = 1.
SCALE_FREE = {
    name: {"output": jnp.positive} if name == "jsma" else {"loss": losses.margin}
    for name, case in CASES.items()
    if name == "jsma" or (case.budget and "loss" in inspect.signature(case.attack).parameters)
}
# Their objective weighs the logits with a constant that is searched for: from below what any of
# the scales needs, and by powers of two where the rounds keep the first constant that succeeds.
SEARCHING = {
    "carlini_wagner_l2": {},
    "carlini_wagner_l0": {},
    "carlini_wagner_linf": {"initial_const": 1e-5, "const_factor": 2.0},
    "ead": {},
}


@for_each("name", {name: name for name in CASES if name not in SEARCHING})
def test_no_scale_of_the_logits_changes_a_scale_free_attack(name):
    settings = SCALE_FREE.get(name, {})
    plain = run(CASES[name], make(), INPUTS, LABELS, **settings)
    assert np.sum(plain.success[RIGHT]) >= 2
    for scale in (*SCALES, 2.0**-40, 2.0**60):
        result = run(CASES[name], make(scale=scale), INPUTS, LABELS, **settings)
        np.testing.assert_array_equal(result.success, plain.success)
        np.testing.assert_array_equal(result.inputs, plain.inputs)


@for_each("name", {name: name for name in SEARCHING})
def test_no_scale_of_the_logits_hides_anything_from_a_search(name):
    settings = CASES[name].closely | SEARCHING[name]
    plain = run(CASES[name], make(), INPUTS, LABELS, **settings)
    assert np.all(plain.success)
    for scale in SCALES:
        result = run(CASES[name], make(scale=scale), INPUTS, LABELS, **settings)
        np.testing.assert_array_equal(result.success, plain.success)
        # Where a search ends depends on rounding: by 4% for an example, by 1% in the mean.
        np.testing.assert_allclose(result.distance.mean(), plain.distance.mean(), rtol=0.02)


@for_each("name", {name: name for name in SCALE_FREE})
def test_the_scale_of_the_logits_masks_the_gradient_of_the_softmax(name):
    # Distillation's "robustness": the same decisions, and the published attack finds less and less.
    case, settings = CASES[name], SCALE_FREE[name]
    rates = [
        np.mean(run(case, make(scale=scale), INPUTS, LABELS).success[RIGHT])
        for scale in (1.0, *SCALES)
    ]
    honest = np.mean(run(case, make(scale=1024.0), INPUTS, LABELS, **settings).success[RIGHT])
    assert rates[0] >= honest / 2
    assert rates[-1] <= honest / 2
    assert rates[0] >= rates[1] >= rates[-1]


# -------------------------------------------------------------------------------------------------
# Keys and batches


@all_cases
def test_one_key_is_folded_with_the_position(case):
    one = run(case, MODEL, INPUTS, LABELS, key=KEY)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(B))
    many = run(case, MODEL, INPUTS, LABELS, key=keys)
    raw = run(case, MODEL, INPUTS, LABELS, key=jax.random.key_data(KEY))  # an old-style key
    jax.tree.map(np.testing.assert_array_equal, one, many)
    jax.tree.map(np.testing.assert_array_equal, one, raw)


@all_cases
def test_same_key_same_result_and_another_key_another(case):
    first = run(case, MODEL, INPUTS, LABELS)
    jax.tree.map(np.testing.assert_array_equal, first, run(case, MODEL, INPUTS, LABELS))
    other = run(case, MODEL, INPUTS, LABELS, key=jax.random.key(8))
    assert np.array_equal(first.inputs, other.inputs) != case.random
    if not case.random:
        keyless = run(case, MODEL, INPUTS, LABELS, key=None)
        jax.tree.map(np.testing.assert_array_equal, first, keyless)


@pytest.mark.floor
@all_cases
def test_order_split_and_padding_of_the_batch_change_nothing(case):
    whole = run(case, MODEL, INPUTS, LABELS, key=KEYS)

    order = np.random.default_rng(1).permutation(B)
    permuted = run(case, MODEL, INPUTS[order], LABELS[order], key=KEYS[order])
    assert_same(jax.tree.map(lambda leaf: leaf[np.argsort(order)], permuted), whole)

    halves = [slice(0, B // 2), slice(B // 2, B)]
    split = [run(case, MODEL, INPUTS[h], LABELS[h], key=KEYS[h]) for h in halves]
    assert_same(jax.tree.map(lambda *leaves: np.concatenate(leaves), *split), whole)

    padding = np.array([0, 1, 2, 5, 0, 0, 0, 0])
    padded = run(case, MODEL, INPUTS[padding], LABELS[padding], key=KEYS[padding])
    first = jax.tree.map(lambda leaf: leaf[:4], padded)
    assert_same(
        first, jax.tree.map(lambda leaf: leaf[padding[:4]], whole), labels=LABELS[padding[:4]]
    )
    np.testing.assert_array_equal(padded.queries[4:], padded.queries[:1].repeat(4))


@for_each("name", {name: name for name in ("pgd-linf", "carlini_wagner_l2")})
def test_the_trace_does_not_depend_on_the_neighbors(name):
    # An example that stops early keeps what it recorded while the others go on.
    whole = run(CASES[name], MODEL, INPUTS, LABELS, key=KEYS, trace=True)
    recorded = np.isfinite(whole.info["trace"]).sum(1)
    # All but the forward pass before the loop and the verification after it.
    np.testing.assert_array_equal(recorded, np.where(RIGHT, whole.queries - 2, 0))
    early = np.full(B, np.argmin(np.where(RIGHT, recorded, 999)))
    alone = run(CASES[name], MODEL, INPUTS[early], LABELS[early], key=KEYS[early], trace=True)
    np.testing.assert_allclose(alone.info["trace"], whole.info["trace"][early], rtol=1e-4)


@all_cases
def test_an_empty_batch_is_an_empty_result(case):
    # Nothing has to be compiled to see it.
    result = jax.eval_shape(lambda x: call(case, MODEL, x, LABELS[:0]), INPUTS[:0])
    assert result.inputs.shape == (0, *SHAPE)
    for leaf in jax.tree.leaves(result):
        assert leaf.shape[0] == 0


# -------------------------------------------------------------------------------------------------
# Compilation: jit, vmap, and nothing compiled twice


@attack_cases
def test_under_jit_with_everything_traced(case):
    @jax.jit
    def jitted(logits_fn, key, inputs, labels, scale):
        return call(case, logits_fn, inputs, labels, key=key, eps=scale * BUDGETS[case.norm])

    eager = run(case, MODEL, INPUTS, LABELS, key=KEYS)
    result = jax.tree.map(np.asarray, jitted(MODEL, KEYS, INPUTS, LABELS, 1.0))
    assert_same(result, eager)
    # No check can see a NaN that is traced; it must not reach the other rows.
    inputs = INPUTS.copy()
    inputs[2] = np.nan
    result = jax.tree.map(np.asarray, jitted(MODEL, KEYS, inputs, LABELS, 1.0))
    others = np.arange(B) != 2
    np.testing.assert_array_equal(result.success[others], eager.success[others])
    np.testing.assert_allclose(result.inputs[others], eager.inputs[others], atol=1e-5)


@pytest.mark.floor
@attack_cases
def test_vmapped_over_networks_is_looped(case):
    models = [make(seed) for seed in range(3)]  # the labels are right for some only
    vmapped = jax.vmap(lambda f: call(case, f, INPUTS, LABELS))(nets.stack(models))
    vmapped = jax.tree.map(np.asarray, vmapped)
    for r, model in enumerate(models):
        result = jax.tree.map(lambda leaf, r=r: leaf[r], vmapped)
        assert_same(result, run(case, model, INPUTS, LABELS), logits_fn=model)


@pytest.mark.floor
@all_cases
def test_new_weights_eps_and_temperature_compile_nothing(case):
    def attempt(model, temperature, eps, key=KEY):
        model = nets.with_temperature(model.args[0], temperature)
        return run(case, model, INPUTS, LABELS, eps=eps, key=key)

    before = len(TRACES)
    first = attempt(MODEL, 1.0, 0.05)
    count = len(TRACES)
    assert count <= before + 8
    second = attempt(make(1), 20.0, 0.1)
    attempt(MODEL, 1.0, np.linspace(0, 0.1, B).astype(np.float32), KEYS)
    attempt(make(2), np.float64(3.0), 0, jax.random.key(1))
    if not case.budget:
        model = nets.with_temperature(MODEL.args[0], 2.0)
        run(case, model, INPUTS, LABELS, **case.changes)
    assert len(TRACES) == count
    assert not np.array_equal(first.inputs, second.inputs)


@all_cases
def test_a_plain_function_will_do(case):
    weights = {name: np.asarray(value) for name, value in weights_of(MODEL).items()}
    traced = []

    def plain(inputs):
        traced.append(1)
        return network(weights, inputs)

    def spoilt(inputs):  # pragma: no cover
        raise AssertionError("not the function that was given")

    # The abstract trace is enough to see that the function itself was taken, and taken once.
    jitted = jax.jit(lambda x: call(case, plain, x, LABELS).inputs)
    assert jitted.eval_shape(INPUTS).shape == INPUTS.shape
    count = len(traced)
    assert count > 0
    jax.jit(lambda x: call(case, plain, x, LABELS).inputs).eval_shape(INPUTS)
    assert len(traced) == count
    with pytest.raises(AssertionError, match="not the function"):
        call(case, spoilt, INPUTS, LABELS)


def test_a_plain_function_gives_the_same_result():
    weights = {name: np.asarray(value) for name, value in weights_of(MODEL).items()}
    result = run(CASES["fgsm-l2"], lambda x: network(weights, x), INPUTS, LABELS)
    assert_same(result, run(CASES["fgsm-l2"], MODEL, INPUTS, LABELS))


def test_a_loss_with_a_temperature_that_is_a_leaf():
    case = CASES["fgsm-linf"]
    hot = jax.tree_util.Partial(losses.cross_entropy, temperature=jnp.float32(20.0))
    result = run(case, MODEL, INPUTS, LABELS, loss=hot)
    count = len(TRACES)
    hotter = jax.tree_util.Partial(losses.cross_entropy, temperature=jnp.float32(50.0))
    run(case, MODEL, INPUTS, LABELS, loss=hotter)
    assert len(TRACES) == count
    bound = functools.partial(losses.cross_entropy, temperature=20.0)
    same = run(case, MODEL, INPUTS, LABELS, loss=bound)
    np.testing.assert_allclose(same.inputs, result.inputs, atol=1e-6)


def equations(jaxpr):
    """Every equation, those of inner functions and loops included."""
    for equation in jaxpr.eqns:
        yield equation
        inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: v is not None)
        for value in inner:
            for candidate in value if isinstance(value, (tuple, list)) else [value]:
                candidate = getattr(candidate, "jaxpr", candidate)
                if hasattr(candidate, "eqns"):
                    yield from equations(candidate)


@pytest.mark.floor
@all_cases
def test_products_are_at_full_precision_unless_chosen(case):
    def precisions():
        traced = jax.make_jaxpr(lambda x: call(case, MODEL, x, LABELS))(INPUTS)
        found = [
            str(e.params["precision"])
            for e in equations(traced.jaxpr)
            if e.primitive.name == "dot_general"
        ]
        assert len(found) >= 8  # two forward passes of three products, and a gradient
        return set(found)

    highest = jax.lax.Precision.HIGHEST
    assert precisions() == {str((highest, highest))}
    with jax.default_matmul_precision("bfloat16"):
        assert str((highest, highest)) not in precisions()


def test_double_precision_is_kept():
    with tiny.double_precision():
        model = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), make(0))
        result = run(CASES["pgd-linf"], model, INPUTS.astype(np.float64), LABELS)
    assert result.inputs.dtype == result.distance.dtype == np.float64
    assert result.queries.dtype == result.info["first_success"].dtype == np.int32
    assert np.any(result.success[:WRONG])


# -------------------------------------------------------------------------------------------------
# Bad input: the error names the value


SOME_OWN = np.where(np.arange(B) == 4, LABELS, TARGETS)


@all_cases
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": np.where(np.arange(D).reshape(SHAPE) == 3, np.nan, INPUTS)}, "got nan at"),
        ({"inputs": INPUTS + 1}, r"expected inputs in \[0, 1\], got 1\.\d+ at index \(0, 0, 0\)"),
        ({"inputs": INPUTS, "bounds": (0.25, 0.75)}, r"expected inputs in \[0.25, 0.75\]"),
        ({"inputs": (INPUTS * 255).astype(np.uint8)}, "expected floating-point inputs, got dtype"),
        ({"inputs": INPUTS[0, 0]}, "expected inputs of shape"),
        ({"labels": LABELS + K}, r"expected labels in 0\.\.3 .*, got \d at index 0"),
        ({"labels": LABELS - 5}, r"expected labels in 0\.\.3 .*, got -\d at index 0"),
        ({"labels": np.eye(K)[LABELS]}, r"expected labels of shape \[B\] = \(8,\), got .*\(8, 4\)"),
        ({"labels": LABELS[:-1]}, r"expected labels of shape .* got shape \(7,\)"),
        ({"labels": LABELS.astype(float)}, "expected integer labels, got dtype float64"),
        ({"targets": LABELS + K}, r"expected targets in 0\.\.3"),
        ({"targets": SOME_OWN}, r"expected targets other than the labels, got .* \d at index 4;"),
        ({"bounds": (1.0, 0.0)}, r"expected bounds=\(low, high\) with low < high, got \(1, 0\)"),
        ({"bounds": (np.zeros(5), 1.0)}, r"expected bounds that broadcast .* \(3, 2\), got .*5"),
        ({"bounds": (0.0, np.full(SHAPE, np.nan))}, "with low < high, got"),
        ({"logits_fn": lambda x: x}, r"expected logits of shape \[B, K\]"),
        ({"logits_fn": lambda x: x[:, 0, :1]}, "at least 2"),
        ({"logits_fn": lambda x: x[:, 0].astype(int)}, "floating-point logits, got dtype int"),
        ({"logits_fn": 3}, "expected a callable, got int"),
    ],
)
def test_bad_input_is_named(case, change, message):
    arguments = {"logits_fn": MODEL, "inputs": INPUTS, "labels": LABELS} | change
    with pytest.raises(ValueError, match=message):
        run(case, **arguments)


@for_each("name", {name: name for name in (*SCALE_FREE, "ddn", "fmn-l2") if name != "jsma"})
@pytest.mark.parametrize("loss", [lambda z, y: z, lambda z, y: jnp.mean(z)], ids=["rows", "mean"])
def test_a_loss_of_a_wrong_shape_is_named(name, loss):
    with pytest.raises(ValueError, match=r"expected loss to return one value per example, \[B\] ="):
        run(CASES[name], MODEL, INPUTS, LABELS, loss=loss)


@budget_cases
@settings(max_examples=12, deadline=None)
@given(eps=st.floats().filter(lambda e: not 0 <= e < np.inf))
def test_a_bad_eps_is_named(case, eps):
    with pytest.raises(ValueError, match="expected eps >= 0, got") as error:
        run(case, MODEL, INPUTS, LABELS, eps=eps)
    assert repr(eps) in str(error.value)


# What an attack has beyond the common arguments: counts are static, everything else may be traced.
NOT_NUMBERS = {"norm", "bounds", "targets", "init", "loss", "output", "decision_rule"}
SETTINGS = {
    name: {
        setting: parameter.default
        for setting, parameter in inspect.signature(case.attack).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
        and setting not in NOT_NUMBERS | {"eps"}
        and not isinstance(parameter.default, bool)
    }
    for name, case in CASES.items()
    if name.partition("-")[2] in ("", "l2")
}
COUNTS = [
    (name, setting)
    for name, settings in SETTINGS.items()
    for setting in settings
    if setting.startswith(("num_", "max_"))
]
FLOATS = [(n, s) for n, settings in SETTINGS.items() for s in settings if (n, s) not in COUNTS]


@pytest.mark.parametrize(("name", "setting"), COUNTS)
@settings(max_examples=15, deadline=None)
@given(
    value=st.one_of(
        st.integers(max_value=0), st.floats(), st.booleans(), st.just("3"), st.just([2])
    )
)
def test_a_bad_count_is_named(name, setting, value):
    message = f"expected {setting} to be a whole number >= "
    with pytest.raises(ValueError, match=message) as error:
        run(CASES[name], MODEL, INPUTS, LABELS, **{setting: value})
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(("name", "setting"), FLOATS)
@settings(max_examples=15, deadline=None)
@given(
    value=st.one_of(
        st.sampled_from([np.nan, np.inf, -np.inf, "0.1", [0.1], [[0.1]] * B]),
        st.floats(max_value=-1e-300),
    )
)
def test_a_bad_number_is_named(name, setting, value):
    if setting == "theta" and isinstance(value, float) and np.isfinite(value):
        return  # the one setting with a sign
    with pytest.raises(ValueError, match=f"expected {setting} ") as error:
        run(CASES[name], MODEL, INPUTS, LABELS, **{setting: value})
    assert "; " in str(error.value)  # what to do


@budget_cases
def test_bad_eps_arrays_and_norms_are_named(case):
    eps = np.full(B, 0.1)
    eps[3] = -0.5
    with pytest.raises(ValueError, match=r"got -0\.5 at index 3"):
        run(case, MODEL, INPUTS, LABELS, eps=eps)
    with pytest.raises(ValueError, match=r"scalar or of shape \[B\] = \(8,\), got \(3,\)"):
        run(case, MODEL, INPUTS, LABELS, eps=eps[:3])
    with pytest.raises(ValueError, match=r"norm to be one of 'linf', 'l2', .*got 'l7'"):
        run(case, MODEL, INPUTS, LABELS, norm="l7")
    with pytest.raises(TypeError, match="eps"):
        case.attack(MODEL, KEY, INPUTS, LABELS)


@for_each("name", {name: name for name, case in CASES.items() if case.random})
@pytest.mark.parametrize(
    ("key", "message"),
    [
        (jax.random.key(0, impl="rbg"), "expected a Threefry key, got rbg"),
        (jax.random.split(jax.random.key(0), 3), r"expected one key or \[B\] = \(8,\) keys, got"),
        (None, "expected a PRNG key for random [a-z]+, got None"),
        (0, "expected a PRNG key, got 0"),
        ("key", "expected a PRNG key, got 'key'"),
    ],
)
def test_bad_keys_are_named(name, key, message):
    with pytest.raises(ValueError, match=message):
        run(CASES[name], MODEL, INPUTS, LABELS, key=key)


# -------------------------------------------------------------------------------------------------
# A convolutional network of the library


def test_a_network_of_the_library():
    case = CASES["fgsm-linf"]
    model = nets.ConvNet(features=((4,),), hidden=(8,), num_classes=3, dropout_rate=0.0)
    inputs = np.random.default_rng(0).uniform(0, 1, (4, 6, 6, 1)).astype(np.float32)
    params = [nets.init(model, jax.random.key(seed), (6, 6, 1))[0] for seed in range(2)]
    logits_fns = [nets.logits_fn(model, {"params": p}) for p in params]
    labels = np.argmax(logits_fns[0](inputs), axis=1)
    vmapped = jax.vmap(lambda f: call(case, f, inputs, labels, eps=0.5))(nets.stack(logits_fns))
    assert np.any(vmapped.success[0])
    for r, logits_fn in enumerate(logits_fns):
        looped = run(case, logits_fn, inputs, labels, eps=0.5)
        np.testing.assert_array_equal(vmapped.success[r], looped.success)
        np.testing.assert_allclose(vmapped.distance[r], looped.distance, rtol=1e-4)
        excess = numpy_excess(np.asarray(logits_fn(looped.inputs)), labels)
        np.testing.assert_array_equal(looped.success, excess > 0)
    for attack in (case, CASES["carlini_wagner_l2"]):
        nothing = run(attack, logits_fns[0], inputs[:0], labels[:0])
        assert nothing.inputs.shape == (0, 6, 6, 1)


@pytest.mark.parametrize("value", ["no", 0, 1.0, None])
@pytest.mark.parametrize(
    "attack",
    [
        lambda value: functools.partial(attacks.fgsm, eps=0.1, trace=value),
        lambda value: functools.partial(attacks.pgd, eps=0.1, random_start=value),
        lambda value: functools.partial(attacks.ead, abort_early=value),
        lambda value: functools.partial(attacks.carlini_wagner_l2, abort_early=value),
    ],
)
def test_a_switch_is_true_or_false(attack, value):
    with pytest.raises(ValueError, match="to be True or False, got"):
        attack(value)(MODEL, KEY, INPUTS, LABELS)
