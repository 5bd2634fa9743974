"""Attacks from elsewhere: their claims are checked before they are counted."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import AttackResult, attacks, evaluate, nets

NET = nets.callable_logits_fn(lambda w, x: (x - 0.5) @ w, jnp.array([[1.0, -1.0], [1.0, -1.0]]))
INPUTS = np.array([[0.6, 0.6], [0.7, 0.9], [0.2, 0.4], [0.5, 0.8]], np.float32)
LABELS = np.array([0, 0, 0, 0])  # the third is wrong to begin with


def boast(logits_fn, key, inputs, labels, *, move=0.0, bounds=(0.0, 1.0), targets=None):
    """Claims to have fooled the network on every example."""
    inputs = jnp.asarray(inputs)
    moved = inputs + move
    ones = jnp.ones(len(inputs))
    distance = jnp.max(jnp.abs(moved - inputs), axis=1)
    return AttackResult(moved, ones > 0, distance, ones, {})


def by_ensemble(attack):
    return attacks.ensemble(NET, None, INPUTS, LABELS, attacks=[attack]).success


def by_evaluation(attack):
    plan = evaluate.AttackPlan(attack)
    return evaluate.under_attack(nets.stack([NET]), INPUTS, LABELS, plan).success[0]


both = pytest.mark.parametrize("judge", [by_ensemble, by_evaluation])


@both
def test_a_claim_that_is_false_is_no_success(judge):
    assert judge(boast).tolist() == [False, False, True, False]
    # Some of the claims are true.
    moved = judge(functools.partial(boast, move=-0.2))
    assert moved.tolist() == [True, False, True, True]


@both
@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: (x, x, x, x, {}), "got tuple from"),
        (lambda x: None, "got NoneType from"),
        (lambda x: AttackResult(x, x[:1, 0] > 0, x[:, 0], x[:, 0], {}), r"got arrays of shapes"),
        (lambda x: AttackResult(x * np.nan, x[:, 0] > 0, x[:, 0], x[:, 0], {}), "expected finite"),
    ],
)
def test_what_is_no_result_is_named(judge, result, message):
    def own(logits_fn, key, inputs, labels, *, eps=0.1, bounds=(0.0, 1.0), targets=None):
        return result(jnp.asarray(inputs))

    with pytest.raises(ValueError, match=message):
        judge(own)


def test_a_result_outside_the_box_is_named():
    with pytest.raises(ValueError, match=r"expected the attack's inputs in \[0, 1\], got 9"):
        by_ensemble(functools.partial(boast, move=9.0))
