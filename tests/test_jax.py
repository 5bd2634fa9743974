"""The library's own `jit`."""

import functools

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


def test_options_are_those_of_the_backend(asked_anew, monkeypatch):
    assert _jax._compiler_options() == _jax._CPU_OPTIONS
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    _jax._compiler_options.cache_clear()
    assert _jax._compiler_options() is None


def test_an_option_that_xla_does_not_know_is_left_out(asked_anew, monkeypatch):
    monkeypatch.setattr(_jax, "_CPU_OPTIONS", {"xla_cpu_no_such_option": False})
    assert _jax._compiler_options() is None
    assert _jax.jit(lambda x: x + 1)(1.0) == 2.0
