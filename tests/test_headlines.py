"""The field's headline on distillation, first hand: on the networks that the parity tests attack.

`tests/parity/plain.npz` is an ordinary network for MNIST, `distilled.npz` the student at T = 100 of
one teacher assistant; `tests/parity/make_networks.py` says how they were made.
"""

import pathlib

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import subjects
from jdistill import attacks, nets

FOLDER = pathlib.Path(__file__).parent / "parity"
NUM_IMAGES = 20
IMAGES = tuple(column[:NUM_IMAGES] for column in subjects.read_images(FOLDER / "images.npz"))


def network(name):
    params = subjects.read_params(FOLDER / f"{name}.npz")
    return nets.logits_fn(subjects.conv_net(params, (28, 28, 1)), {"params": params})


def jsma_success_rate(name, **settings):
    """Towards the next class, with at most 112 features, as Papernot et al. allow."""
    inputs, labels = IMAGES
    targets = jnp.asarray((labels + 1) % 10)
    result = attacks.jsma(
        network(name), None, inputs, labels, targets=targets, max_features=112, **settings
    )
    return float(result.success.mean())


@pytest.mark.slow
def test_distillation_stops_the_saliency_map_attack_that_it_was_published_against():
    # Papernot et al. 2016, "Distillation as a Defense", section V: 95.89% to 0.45%.
    assert jsma_success_rate("plain") >= 0.8
    assert jsma_success_rate("distilled") <= 0.05
    # Carlini & Wagner 2016: at the softmax of its training the same network falls.
    assert jsma_success_rate("distilled", output=attacks.softmax_at(100.0)) >= 0.9


@pytest.mark.slow
def test_distillation_hides_from_the_cross_entropy_of_autoattack_alone():
    settings = {"eps": 0.15, "num_steps": 30}
    broken = {}
    for name in ("plain", "distilled"):
        arguments = (network(name), jax.random.key(0), *IMAGES)
        by_ce = attacks.apgd(*arguments, **settings).success.mean()
        by_targets = attacks.apgd_targeted(*arguments, num_targets=3, **settings).success.mean()
        broken[name] = (float(by_ce), float(by_targets))
    plain, distilled = broken["plain"], broken["distilled"]
    assert distilled[0] <= 0.1
    assert distilled[1] >= distilled[0] + 0.3
    assert abs(plain[1] - plain[0]) <= 0.1
