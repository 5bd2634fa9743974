"""A user's typed code, which `make lint` checks: NumPy arrays and literals need no casts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import attacks, diagnose, evaluate, losses, metrics, nets, norms
from jdistill.typing import Norm


def measured(inputs: np.ndarray, labels: np.ndarray) -> float:
    """Attacks, losses, and metrics on NumPy arrays."""
    norm: Norm = "l2"
    logits_fn = nets.callable_logits_fn(lambda w, x: x @ w, jnp.eye(2))
    pgd = functools.partial(attacks.pgd, eps=0.1, norm=norm, num_steps=1)
    pgd(logits_fn, jax.random.key(0), inputs, labels)
    result = evaluate.evaluate(logits_fn, inputs, labels, attacks={"pgd": pgd})
    size = norms.distance(inputs, norm) + losses.margin(inputs, labels)
    return float(size.mean()) + metrics.paired(labels, labels).p_value + len(result.attacks)


def judged(verdict: diagnose.Verdict) -> bool:
    """A comparison that mypy would call impossible if the label were another."""
    return verdict.label == "masked"
