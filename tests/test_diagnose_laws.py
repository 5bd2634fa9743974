"""What the diagnosis does with any network and any input, on networks that cost nothing."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import diagnose, metrics, nets

KEY, SIZE = jax.random.key(3), 48
RNG = np.random.default_rng(0)
INPUTS = RNG.uniform(0.05, 0.95, (SIZE, 4)).astype(np.float32)
WEIGHTS = jnp.asarray(RNG.normal(0, 6, (4, 5)), jnp.float32)
NEVER = 2.0


def network(weights, poison, inputs):
    """A linear network whose logits are not finite where the first feature is large."""
    logits = (inputs - 0.5) @ weights
    return jnp.where(inputs[:, :1] > poison, jnp.nan, logits)


def linear(poison=NEVER, scale=1.0):
    return nets.callable_logits_fn(network, scale * WEIGHTS, jnp.float32(poison))


LABELS = np.asarray(linear()(INPUTS)).argmax(1).astype(np.int32)
masking = functools.partial(diagnose.masking, eps=0.05, num_queries=30)


@pytest.fixture(scope="module")
def verdict():
    return masking(linear(), KEY, INPUTS, LABELS)


@pytest.mark.slow
def test_an_honest_network(verdict):
    assert verdict.label == "no sign of masking", verdict
    assert verdict.clean.value == 1
    # A linear network's robust accuracy is known: no margin to another class within eps · |w|_1.
    logits = np.asarray(linear()(INPUTS), np.float64)
    reach = 0.05 * np.abs(np.asarray(WEIGHTS)[:, None] - np.asarray(WEIGHTS)[:, :, None]).sum(0)
    gaps = logits[np.arange(SIZE), LABELS][:, None] - logits - reach[LABELS]
    gaps[np.arange(SIZE), LABELS] = np.inf
    exact = np.mean(gaps.min(axis=1) > 0)
    assert 0.2 < exact < 0.95
    assert verdict.worst_case.value == pytest.approx(exact, abs=1e-6)  # the box is never reached
    assert verdict.worst_case == metrics.proportion(round(exact * SIZE), SIZE)


def test_the_same_key_gives_the_same_verdict(verdict):
    assert masking(linear(), KEY, INPUTS, LABELS) == verdict


@pytest.mark.slow
def test_ends_per_feature_are_the_box(verdict):
    ends = np.zeros(4), np.ones(4)
    found = masking(linear(), KEY, INPUTS, LABELS, bounds=ends)
    assert [check.outcome for check in found.checks] == [check.outcome for check in verdict.checks]
    assert (found.worst_case, found.label) == (verdict.worst_case, verdict.label)
    wide = masking(linear(), KEY, INPUTS, LABELS, bounds=(0.0, np.array([1, 1, 1, 1e6])))
    assert wide.check("gradient_agreement").outcome == "clear"
    with pytest.raises(ValueError, match=r"bounds=\(low, high\) finite, got \(-inf, inf\)"):
        masking(linear(), KEY, INPUTS, LABELS, bounds=(-np.inf, np.inf))


@pytest.mark.slow
def test_batches_decide_nothing():
    # 47 rows are a chunk of another size with padding, and pieces of 16.
    rows = slice(0, 47)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(KEY, jnp.arange(SIZE))[rows]
    whole = masking(linear(scale=100.0), keys, INPUTS[rows], LABELS[rows])
    pieces = masking(linear(scale=100.0), keys, INPUTS[rows], LABELS[rows], batch_size=16)
    assert whole.label == "masked"
    assert (pieces.label, pieces.reason) == (whole.label, whole.reason)
    assert pieces.attacks == whole.attacks
    for name in ("zero_gradients", "loss_gap", "unbounded", "gradient_agreement", "eps_curve"):
        assert pieces.check(name) == whole.check(name)


def test_logits_that_are_not_finite_are_counted(verdict):
    poison = float(np.sort(INPUTS[:, 0])[-6])  # five inputs are above
    found = masking(linear(poison), KEY, INPUTS, LABELS)
    assert (found.num_nonfinite, found.num_examples) == (5, SIZE)
    assert found.clean.value == pytest.approx((SIZE - 5) / SIZE)
    assert found.naive.value <= found.clean.value
    check = found.check("finite_logits")
    assert check.outcome == "undecided"
    assert check.figures["clean"] == pytest.approx(5 / SIZE)
    assert check.finding.startswith("5 of 48 clean inputs")
    assert found.label == "inconclusive"  # more than a tenth
    assert "repair the network" in found.reason


def test_all_logits_not_finite():
    found = masking(linear(-1.0), KEY, INPUTS, LABELS)
    assert found.label == "inconclusive"
    assert "right on none of the 48 examples" in found.reason
    assert found.num_nonfinite == SIZE
    assert found.clean.value == found.naive.value == found.worst_case.value == 0


def test_one_class():
    label = np.bincount(LABELS).argmax()
    labels = np.full(SIZE, label, np.int32)
    inputs = INPUTS[np.resize(np.flatnonzero(label == LABELS), SIZE)]
    found = masking(linear(), KEY, inputs, labels)
    assert found.label == "inconclusive"
    assert "pass examples of every class" in found.reason
    assert found.check("classes").figures == {"labels": 1.0, "outputs": 5.0}


def test_few_examples():
    found = masking(linear(), KEY, INPUTS[:16], LABELS[:16])
    assert found.label == "inconclusive"
    assert "right on 16 examples only; pass more examples" in found.reason
    # What is certain is certain all the same.
    assert masking(linear(scale=1e4), KEY, INPUTS[:16], LABELS[:16]).label == "masked"


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_other_norms(norm):
    found = masking(linear(), KEY, INPUTS, LABELS, eps=0.1, norm=norm)
    assert found.label == "no sign of masking", found
    assert found.worst_case.value < found.clean.value
    assert (found.check("black_box").outcome == "not run") == (norm == "l1")
    assert found.budget.endswith(f"at {norm} ≤ 0.1, 48 examples")
    assert masking(linear(scale=1e4), KEY, INPUTS, LABELS, eps=0.1, norm=norm).label == "masked"


def test_a_stack_is_its_networks(verdict):
    stack = nets.stack([linear(), linear(scale=1e4)])
    found = diagnose.masking_of_stack(stack, KEY, INPUTS, LABELS, eps=0.05, num_queries=30)
    assert found[0] == verdict
    assert found[1] == masking(linear(scale=1e4), KEY, INPUTS, LABELS)


def test_new_weights_compile_nothing(verdict):
    del verdict
    traces = []

    def counted(weights, inputs):
        traces.append(inputs.shape)
        return (inputs - 0.5) @ weights

    fun = functools.partial(nets.callable_logits_fn, counted)
    masking(fun(WEIGHTS), KEY, INPUTS, LABELS)
    before = len(traces)
    masking(fun(WEIGHTS * 1.0001), KEY, INPUTS, LABELS, eps=0.0501, train_temperature=2.0)
    # Survivors may fill a chunk of another size; nothing else is traced.
    sizes = {shape[0] for shape in traces}
    assert sizes <= {1, SIZE, *range(16, SIZE)}
    assert len(traces) <= before + 3


def test_hidden_state_is_noticed():
    """Logits that change from call to call: a function that is none."""
    generator = np.random.default_rng(0)

    def drifting(shape):
        return generator.normal(0, 0.5, shape).astype(np.float32)

    def stateful(inputs):
        clean = (inputs - 0.5) @ WEIGHTS
        like = jax.ShapeDtypeStruct(clean.shape, clean.dtype)
        constant = jax.lax.stop_gradient(clean)
        return clean + jax.pure_callback(lambda z: drifting(z.shape), like, constant)

    found = masking(stateful, KEY, INPUTS, LABELS, num_queries=5)
    assert found.check("gradient_agreement").figures["unrepeated"] >= 0.5


BAD = [
    ({"eps": 0.0}, "expected eps > 0"),
    ({"eps": np.array([0.1, 0.2])}, "expected eps of rank 0"),
    ({"eps": float("nan")}, "expected eps > 0"),
    ({"norm": "l0"}, "expected norm to be one of 'linf', 'l2', 'l1', got 'l0'"),
    ({"train_temperature": 0.0}, "expected train_temperature > 0"),
    ({"num_queries": 0}, "expected num_queries to be a whole number >= 1"),
    ({"batch_size": 0}, "expected batch_size to be a whole number >= 1"),
    ({"bounds": (1.0, 0.0)}, "expected bounds=\\(low, high\\) with low < high"),
    ({"key": None}, "expected a PRNG key"),
    ({"labels": LABELS + 5}, "expected labels in 0..4"),
    ({"labels": LABELS[:3]}, "expected labels of shape"),
    ({"inputs": INPUTS + 1}, "expected inputs in \\[0, 1\\]"),
    ({"inputs": INPUTS[:0], "labels": LABELS[:0]}, "expected at least one example"),
    ({"surrogate": 3}, "expected a callable"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments(change, message):
    arguments = {"key": KEY, "inputs": INPUTS, "labels": LABELS, "eps": 0.05, **change}
    with pytest.raises(ValueError, match=message):
        diagnose.masking(linear(), **arguments)


def test_tracers_are_refused():
    with pytest.raises(ValueError, match="masking is a loop on the host"):
        jax.jit(lambda x: masking(linear(), KEY, x, LABELS).naive.value)(INPUTS)


def test_stacks_that_are_none():
    arguments = (KEY, INPUTS, LABELS)
    with pytest.raises(ValueError, match="share a leading axis R"):
        diagnose.masking_of_stack(linear(), *arguments, eps=0.1)
    stack = nets.stack([linear(), linear()])
    with pytest.raises(ValueError, match=r"scalar or of shape \[R\] = \(2,\)"):
        diagnose.masking_of_stack(stack, *arguments, eps=0.1, train_temperature=[1.0, 2.0, 3.0])


def test_the_signature():
    for fun in (diagnose.masking, diagnose.masking_of_stack):
        parameters = inspect.signature(fun).parameters
        assert list(parameters)[1:4] == ["key", "inputs", "labels"]
        described = inspect.getdoc(fun)
        for name, parameter in parameters.items():
            assert f"\n    {name}:" in described
            if name not in ("logits_fn", "stack", "key", "inputs", "labels"):
                assert parameter.kind == inspect.Parameter.KEYWORD_ONLY
        assert parameters["eps"].default is inspect.Parameter.empty
        assert parameters["norm"].default == "linf"
