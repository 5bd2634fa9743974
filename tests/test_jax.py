"""The library's own `jit`."""

import dataclasses
import functools
import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import _jax

pytestmark = pytest.mark.floor


@functools.partial(_jax.jit, static_argnames="power")
def scaled(x, *, power=1):
    return 2.0 * x**power


TRANSFORMED = {
    "alone": lambda x: scaled(x, power=3),
    "jit": jax.jit(lambda x: scaled(x, power=3)),
    "jit of constants": lambda x: jax.jit(lambda: scaled(np.asarray(x), power=3))(),
    "vmap": jax.vmap(lambda row: scaled(row, power=3)),
    "gradient of what a function closes over": lambda x: jax.vmap(
        jax.grad(lambda a: _jax.call(jax.tree_util.Partial(lambda: a**4 / 2)))
    )(x),
    "vjp of what a function closes over": lambda x: jax.vjp(
        lambda a: _jax.call(jax.tree_util.Partial(lambda: a**4 / 2)), x
    )[1](jnp.ones(3))[0],
    "scan": lambda x: jax.lax.scan(lambda carry, row: (carry, scaled(row, power=3)), 0, x)[1],
    "gradient of the fourth power": lambda x: jax.vmap(jax.grad(lambda a: scaled(a, power=4) / 4))(
        x
    ),
}


@pytest.mark.parametrize("way", TRANSFORMED)
def test_it_goes_through_all_transformations(way):
    x = jnp.array([1.0, -2.0, 3.0])
    np.testing.assert_allclose(TRANSFORMED[way](x), 2 * np.asarray(x) ** 3, rtol=1e-6)


def test_a_second_call_traces_nothing():
    traces = []

    @_jax.jit
    def counted(x):
        traces.append(x.shape)
        return x + 1

    for value in (1.0, 2.0):
        counted(jnp.full(3, value))
    assert traces == [(3,)]
    counted(jnp.zeros(4))
    assert traces == [(3,), (4,)]


@pytest.fixture
def asked_anew():
    _jax._compiler_options.cache_clear()
    yield
    _jax._compiler_options.cache_clear()


def test_the_options_reach_the_compiler_but_not_under_a_trace(asked_anew, monkeypatch):
    asked, jit = [], jax.jit

    def recorded(fun, *, compiler_options=None, **options):
        asked.append(compiler_options)
        return jit(fun, **options)

    monkeypatch.setattr(jax, "jit", recorded)
    monkeypatch.setattr(_jax, "_compiler_options", lambda: {"some_option": True})
    double = _jax.jit(lambda x: 2 * x)
    assert asked == [None]
    np.testing.assert_array_equal(jit(double)(jnp.ones(3)), 2 * np.ones(3))
    assert asked == [None]
    double(jnp.ones(3))
    double(jnp.ones(3))
    assert asked == [None, {"some_option": True}]


def test_other_backends_have_their_own_options(asked_anew, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert _jax._compiler_options() is None


def test_an_option_that_xla_does_not_know_is_left_out(asked_anew, monkeypatch):
    monkeypatch.setattr(_jax, "_CPU_OPTIONS", {"xla_cpu_no_such_option": False})
    assert _jax._compiler_options() is None
    assert _jax.jit(lambda x: x + 1)(1.0) == 2.0


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="JAX 0.12's XLA has no such option")
def test_the_options_are_known(asked_anew):
    assert _jax._compiler_options() == _jax._CPU_OPTIONS


def test_other_errors_pass():
    @_jax.jit
    def broken(x):
        raise ValueError("as the function has it")

    with pytest.raises(ValueError, match="as the function has it"):
        broken(1.0)


WEIGHTS = jnp.ones(3)


def read_global(x):
    return x * WEIGHTS


def test_what_a_function_captures_is_part_of_it(monkeypatch):
    traces, scale, rows = [], 2.0, np.ones(3)

    def of_closure(x):
        traces.append(x.shape)
        return scale * x * rows + read_global(x)

    x = jnp.arange(3.0)

    def call():
        return _jax.call(_jax.as_pytree(of_closure), x)

    for _ in range(2):
        np.testing.assert_array_equal(call(), 3 * x)
    assert len(traces) == 1  # the list that grew is no array
    scale = 4.0
    np.testing.assert_array_equal(call(), 5 * x)
    rows = np.array([1.0, 0.0, 1.0])
    np.testing.assert_array_equal(call(), jnp.array([0, 1, 10.0]))
    monkeypatch.setitem(globals(), "WEIGHTS", jnp.zeros(3))  # of a function that it calls
    np.testing.assert_array_equal(call(), jnp.array([0, 0, 8.0]))
    assert len(traces) == 4
    # JAX itself keeps what it made of a NumPy array.
    rows[1] = 5.0
    with pytest.raises(
        ValueError, match=r"expected a function whose arrays .* got rows changed in"
    ):
        call()


class Holder:
    def __init__(self, weights):
        self.weights, self.calls = weights, 0

    def apply(self, x):
        self.calls += 1
        return x * self.weights


CAPTURED = {
    "a NumPy scalar": lambda v: (lambda s: lambda x: x * s)(np.float32(v)),
    "a default": lambda v: lambda x, s=v: x * s,
    "a number in a mapping": lambda v: (lambda c: lambda x: x * c["scale"])({"scale": v}),
    "an array in a list": lambda v: (lambda c: lambda x: x * c[0])([np.full(3, v, np.float32)]),
    "a partial": lambda v: (lambda g: lambda x: g(x))(
        functools.partial(lambda k, x: k * x, np.float32(v))
    ),
    "an object": lambda v: (lambda h: lambda x: x * h.weights)(Holder(np.float32(v) * np.ones(3))),
    "a method": lambda v: (lambda f: lambda x: f(x))(Holder(jnp.full(3, v)).apply),
}


@pytest.mark.parametrize("kind", CAPTURED)
def test_whatever_a_function_captures(kind):
    functions = [CAPTURED[kind](value) for value in (1.0, 1.0, 2.0)]
    tokens = [[_jax._token(held) for _, held in _jax.captured(each)] for each in functions]
    assert tokens[0]
    assert tokens[0] != tokens[2]
    if kind != "a method":  # whose array is another one each time
        assert tokens[0] == tokens[1]


def test_names_of_attributes_and_of_what_is_counted_are_not_captured(monkeypatch):
    monkeypatch.setitem(globals(), "T", 0)
    monkeypatch.setitem(globals(), "mean", np.zeros(2))
    monkeypatch.setitem(globals(), "mixed", {1: jnp.ones(3), "b": [2]})
    exec(
        "def counted(x):\n    global T\n    T += 1\n    return x.T * x.mean() * mixed['b'][0]",
        globals(),
    )
    names = [name for name, _ in _jax.captured(globals().pop("counted"))]
    assert names == ["mixed[1]"]


def test_a_function_that_captures_nothing_is_itself():
    assert _jax.static(jnp.tanh) is jnp.tanh
    assert _jax.as_pytree(test_a_second_call_traces_nothing).func.__name__.startswith("test_a_")


# Classes of pytrees


def number_class(number):
    """A class of two numbers and a static one, whose instances say their class's number."""
    annotations = {"one": jax.Array, "other": jax.Array, "count": int}
    held = {"__annotations__": annotations, "count": _jax.static_field(default=2)}
    return _jax.register(type(f"Class{number}", (), {**held, "number": number}))


def test_classes_of_equal_fields_are_different_structures():
    """Or jit runs what it has compiled for another one, once in a while."""
    values = [number_class(number)(one=1.0, other=2.0) for number in range(300)]
    structures = [jax.tree.structure(value) for value in values]
    assert all(one != other for one, other in itertools.pairwise(structures))
    assert len(set(structures)) == len(values)
    which = jax.jit(lambda value: value.number + 0 * value.one)
    for _ in range(2):
        assert [int(which(value)) for value in values] == list(range(300))


def test_no_class_is_registered_otherwise():
    """`jax.tree_util.register_dataclass` confuses classes of equal fields."""
    for path in pathlib.Path(_jax.__file__).parent.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"register_dataclass\s*[(\n]", text), path


def test_a_class_is_a_pytree_of_its_leaves():
    cls = number_class(0)
    value = cls(one=1.0, other={"a": 2.0}, count=5)
    leaves, structure = jax.tree_util.tree_flatten_with_path(value)
    assert [(jax.tree_util.keystr(path), leaf) for path, leaf in leaves] == [
        (".one", 1.0),
        (".other['a']", 2.0),
    ]
    assert jax.tree.unflatten(structure, [3, 4]) == cls(one=3, other={"a": 4}, count=5)
    assert structure != jax.tree.structure(cls(one=1.0, other={"a": 2.0}, count=6))
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.one = 2.0
    with pytest.raises(TypeError):
        cls(1.0, 2.0)
