"""FAB-T against AutoAttack's own: nothing is random, so the norms are the same, image by image.

Until rounding decides: an iterate at a ReLU's kink, or on the boundary. There the reference in
float32 parts from itself in float64, and from ours.
"""

import copy
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import peers, torch_side
from jdistill import attacks

torch = pytest.importorskip(
    "torch", reason="parity needs torch and the toolkits: make parity installs them"
)
pytest.importorskip("pyautoattack", reason="make parity installs it")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # the peers' own warnings

FULL = os.environ.get("JDISTILL_PARITY") == "full"
NUM_IMAGES, NUM_TARGETS, NUM_STEPS = (100, 9, 100) if FULL else (20, 2, 15)
NETWORKS = ["plain", "distilled", "robust"]
RADII = {"plain": 0.1, "distilled": 0.1, "robust": 0.15}
SAME = 0.01  # of the distance


def reference(model, norm, **settings):
    """AutoAttack's FAB-T, with its counts."""
    from pyautoattack.fab_pt import FABAttack_PT

    settings |= {"n_iter": NUM_STEPS, "n_target_classes": NUM_TARGETS, "targeted": True}
    return FABAttack_PT(model, norm=norm.capitalize(), **settings)


def smallest_distances(model, inputs, labels, norm):
    """Over all classes, `[B]`; its own `perturb` ends with the first class that is within eps."""
    attack = reference(model, norm)
    found = []
    for rank in range(2, NUM_TARGETS + 2):
        attack.target_class = rank
        points = attack.attack_single_run(inputs, labels, is_targeted=True)
        found.append(torch_side.distances(model, points, inputs, labels, norm))
    return np.min(found, axis=0)


def double_distances(double_precision, logits_fn, model, inputs, labels, settings):
    """Ours and theirs in float64."""
    with double_precision():
        doubles = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), logits_fn)
        found = attacks.fab_targeted(doubles, None, inputs.astype(float), labels, **settings)
        images, classes = torch_side.torch_batch(inputs, labels)
        model = copy.deepcopy(model).double()
        theirs = smallest_distances(model, images.double(), classes, settings["norm"])
        return np.asarray(found.distance), theirs


def share_of_same(ours, theirs):
    """Of the examples that both broke by a change, how many are equally far."""
    both = np.isfinite(ours) & np.isfinite(theirs) & (theirs > 0)
    assert both.mean() >= 0.5
    return float(np.mean(np.abs(ours[both] / theirs[both] - 1) <= SAME)), both


@pytest.mark.parametrize(
    ("name", "norm"),
    [(name, "linf") for name in NETWORKS] + [(name, "l2") for name in NETWORKS[: 3 if FULL else 1]],
)
def test_the_norms_are_the_same(name, norm, pair, all_images, record, double_precision):
    logits_fn, model = pair(name)
    inputs, labels = all_images(NUM_IMAGES)
    settings = {"norm": norm, "num_targets": NUM_TARGETS, "num_steps": NUM_STEPS}
    result = attacks.fab_targeted(logits_fn, None, inputs, labels, **settings)
    ours = np.asarray(result.distance)
    theirs = smallest_distances(model, *torch_side.torch_batch(inputs, labels), norm)
    share, both = share_of_same(ours, theirs)
    comparison = peers.Comparison(
        "fab_targeted",
        norm,
        f"{NUM_TARGETS} × {NUM_STEPS} steps",
        functools.partial(attacks.fab_targeted, **settings),
        {},
    )
    means = {"pyautoattack": theirs[both].mean()}
    record(comparison, name, "mean distance", ours[both].mean(), means)
    record(comparison, name, "norms within 1%, %", 100 * share, {})
    assert np.mean(np.isfinite(ours) != np.isfinite(theirs)) <= 0.01
    assert share >= 0.95
    # Of the others float32 decides: in float64 both go the same way.
    parted = both & (np.abs(ours / np.where(both, theirs, 1) - 1) > SAME)
    if (name, norm) == ("plain", "linf"):
        parted[np.flatnonzero(both)[0]] = True  # so that float64 is looked at in any case
    if not parted.any():
        return
    batch = (inputs[parted], labels[parted])
    ours, theirs = double_distances(double_precision, logits_fn, model, *batch, settings)
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


@pytest.mark.parametrize("name", NETWORKS if FULL else NETWORKS[:1])
def test_the_same_are_broken_within_a_radius(name, pair, all_images):
    logits_fn, model = pair(name)
    inputs, labels = all_images(NUM_IMAGES)
    eps = RADII[name]
    settings = {"num_targets": NUM_TARGETS, "num_steps": NUM_STEPS}
    result = attacks.fab_targeted(logits_fn, None, inputs, labels, eps=eps, **settings)
    batch = torch_side.torch_batch(inputs, labels)
    points = reference(model, "linf", eps=eps).perturb(*batch)
    theirs = torch_side.distances(model, points, *batch, "linf")
    ours = np.asarray(result.distance)
    assert 0.05 <= np.mean(result.success) <= 0.95  # so that the radius decides
    assert np.mean(np.isfinite(theirs) != np.isfinite(ours)) <= 0.01
    both = np.isfinite(ours) & np.isfinite(theirs) & (theirs > 0)
    assert np.mean(np.abs(ours[both] / theirs[both] - 1) <= SAME) >= 0.95
