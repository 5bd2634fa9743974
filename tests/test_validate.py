"""Bad input is refused with its value, what was expected and a remedy; good input passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill import _validate

quick = settings(max_examples=40, deadline=None)
finite = st.floats(allow_nan=False, allow_infinity=False, width=64)


def refused(message, function, *args, **kwargs):
    """The call raises, says all of `message`, and follows "expected X, got Y; do Z"."""
    with pytest.raises(ValueError, match=r"(?s)^expected .+, got .+; .+") as error:
        function(*args, **kwargs)
    for part in message:
        assert part in str(error.value)


@quick
@given(finite)
def test_positive_and_non_negative_split_the_reals(value):
    for function, good in [(_validate.positive, value > 0), (_validate.non_negative, value >= 0)]:
        if good:
            function(eps=value)
        else:
            refused(["eps", repr(value)], function, eps=value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, -1.0])
@pytest.mark.parametrize("function", [_validate.positive, _validate.non_negative])
@pytest.mark.parametrize("wrap", [float, np.float32, jnp.asarray])
def test_non_finite_and_negative_numbers_are_named(function, value, wrap):
    refused(["temperature", repr(value)], function, temperature=wrap(value))


def test_an_array_is_checked_entry_by_entry():
    _validate.non_negative(eps=np.array([0.0, 0.5]))
    refused(["-0.5 at index 1"], _validate.non_negative, eps=np.array([0.0, -0.5, -1.0]))
    refused(["-2.0 at index (1, 0)"], _validate.positive, eps=np.array([[1.0, 1.0], [-2.0, 1.0]]))


def test_the_remedy_can_be_given():
    refused(["pass a temperature"], _validate.positive, remedy="pass a temperature", t=-1)


def test_within():
    _validate.within(0.0, 1.0, rate=np.array([0.0, 1.0]))
    for bad in (1.5, -0.1, np.nan):
        refused(["rate in [0, 1]", repr(bad)], _validate.within, 0.0, 1.0, rate=bad)


@pytest.mark.parametrize("value", [0, -1, 1.0, 2.5, True, "3", None, np.float32(2)])
def test_counts_are_whole_and_positive(value):
    refused(["num_steps", repr(value)], _validate.count, num_steps=value)


@pytest.mark.parametrize("value", ["0.1", "much", 1j, [[1.0], [1.0, 2.0]]])
def test_what_is_no_number_is_named(value):
    for function in (_validate.positive, _validate.non_negative, _validate.non_zero):
        refused(["eps to be a number", str(value)[:3]], function, eps=value)
    refused(["eps to be a number"], _validate.within, 0.0, 1.0, eps=value)


def test_counts_pass():
    _validate.count(num_steps=1, num_restarts=np.int64(3))
    _validate.count(minimum=0, num_assistants=0)
    refused([">= 2"], _validate.count, minimum=2, num_classes=1)


def test_one_of_lists_the_options():
    _validate.one_of(("linf", "l2"), norm="l2")
    refused(["'linf', 'l2'", "'l3'"], _validate.one_of, ("linf", "l2"), norm="l3")


@pytest.mark.parametrize(
    "value", [(1.0, 0.0), (0.0, 0.0), (0.0, np.inf), (np.nan, 1.0), (0.0,), (0, 1, 2), 1.0, None]
)
def test_bounds_must_be_two_rising_finite_numbers(value):
    refused(["bounds=(low, high)"], _validate.bounds, value)


def test_bounds_come_back_as_floats():
    assert _validate.bounds((0, np.float32(255))) == (0.0, 255.0)


def inputs_in_unit_box(value):
    _validate.inputs_in_box(value, (0.0, 1.0))


@quick
@given(st.floats(width=32), st.integers(0, 3), st.integers(0, 2))
def test_inputs_in_box_finds_the_one_bad_entry(value, row, column):
    inputs = np.full((4, 3), 0.5, np.float32)
    inputs[row, column] = value
    if 0.0 <= value <= 1.0:
        inputs_in_unit_box(inputs)
    else:
        refused(
            [f"{np.float32(value).item()!r} at index ({row}, {column})"], inputs_in_unit_box, inputs
        )


def test_inputs_outside_float32_are_refused():
    refused(["finite inputs", "inf"], inputs_in_unit_box, np.full((1, 1), 1e300))


def test_inputs_of_wrong_rank_or_type():
    refused(["rank >= 2", "(3,)", "inputs[None]"], inputs_in_unit_box, np.zeros(3))
    refused(["uint8", "255"], inputs_in_unit_box, np.zeros((2, 3), np.uint8))
    inputs_in_unit_box(np.zeros((2, 3), np.float64))
    inputs_in_unit_box(jnp.zeros((2, 3), jnp.bfloat16))
    inputs_in_unit_box([[0.0, 1.0]])


@quick
@given(st.integers(-(2**31), 2**31 - 1), st.integers(0, 3))
def test_labels_must_name_a_class(value, position):
    labels = np.zeros(4, np.int32)
    labels[position] = value
    if 0 <= value < 10:
        _validate.class_indices(labels, batch_size=4, num_classes=10)
    else:
        refused(
            ["labels in 0..9", f"{value} at index {position}"],
            _validate.class_indices,
            labels,
            batch_size=4,
            num_classes=10,
        )


def test_labels_of_wrong_shape_or_type():
    refused(["[B] = (4,)", "(4, 10)"], _validate.class_indices, np.eye(10)[:4], batch_size=4)
    refused(["(3,)"], _validate.class_indices, np.zeros(3, int), batch_size=4)
    refused(["float64"], _validate.class_indices, np.zeros(4), batch_size=4)
    refused(["bool"], _validate.class_indices, np.zeros(4, bool), batch_size=4)
    refused(["targets"], _validate.class_indices, np.zeros(4), name="targets", batch_size=4)


def test_rank():
    _validate.rank(2, x=np.zeros((1, 2)))
    refused(["x of rank 2", "(3,)"], _validate.rank, 2, x=np.zeros(3))


def test_values_under_a_tracer_are_skipped_but_shapes_are_not():
    @jax.jit
    def values(x):
        _validate.positive(t=x[0, 0])
        _validate.non_negative(t=x)
        _validate.within(0, 1, t=x)
        inputs_in_unit_box(x)
        _validate.class_indices(x[0].astype(int), batch_size=2, num_classes=2)
        return x

    values(jnp.full((2, 2), -jnp.inf))
    assert not _validate.is_traced(jnp.zeros(2), 3.0)
    with pytest.raises(ValueError, match="rank >= 2"):
        jax.jit(inputs_in_unit_box)(jnp.zeros(3))
    with pytest.raises(ValueError, match="expected labels of shape"):
        jax.jit(lambda x: _validate.class_indices(x, batch_size=2))(jnp.zeros(3, int))


def test_show_is_short():
    assert _validate._show(np.float32(0.5)) == "0.5"
    assert len(_validate._show(np.zeros((100, 100)))) < 200
