"""Every attack against the toolkits that have it: same process, weights, images and budget."""

import os

import jax
import numpy as np
import pytest

from jdistill import attacks, train

torch = pytest.importorskip(
    "torch", reason="parity needs torch and the toolkits: make parity installs them"
)
foolbox = pytest.importorskip("foolbox")
torchattacks = pytest.importorskip("torchattacks")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # the peers' own warnings

FULL = os.environ.get("JDISTILL_PARITY") == "full"
NUM_IMAGES = 100 if FULL else 20
KEY = jax.random.key(0)
MARGIN = 1.02  # times the best peer's mean norm


@pytest.fixture
def images(all_images):
    return all_images(NUM_IMAGES)


@pytest.fixture
def tensors(images):
    """The images as PyTorch has them: `[B, 1, 28, 28]`."""
    inputs, labels = images
    return torch.tensor(inputs.transpose(0, 3, 1, 2).copy()), torch.tensor(labels).long()


def norms(model, found, tensors, order=2):
    """Of a peer's examples: the norm of each change, and inf where the network is not fooled."""
    inputs, labels = tensors
    delta = (found - inputs).flatten(1).numpy()
    fooled = (model(found).argmax(1) != labels).numpy()
    return np.where(fooled, np.linalg.norm(delta, order, axis=1), np.inf)


def mean_norms(ours, peers):
    """Means over the images that all fool; and no peer fools an image that we do not."""
    everyone = np.stack([ours, *peers.values()])
    shared = np.isfinite(everyone).all(0)
    assert shared.sum() >= 0.9 * len(ours)
    found = [np.isfinite(peer).sum() for peer in peers.values()]
    assert np.isfinite(ours).sum() >= max(found)
    return ours[shared].mean(), {name: peer[shared].mean() for name, peer in peers.items()}


@pytest.mark.parametrize("name", ["plain", "distilled", "robust"])
def test_the_networks_are_the_same(name, pair, images, tensors):
    logits = train.predict(pair(name).logits_fn, images[0])
    peers = pair(name).model(tensors[0]).numpy()
    np.testing.assert_allclose(logits, peers, rtol=1e-4, atol=1e-5 * np.abs(peers).max())
    assert (logits.argmax(1) == images[1]).mean() >= 0.95


@pytest.mark.parametrize(("name", "eps"), [("plain", 0.1), ("robust", 0.1), ("robust", 0.15)])
def test_pgd(name, eps, pair, images, tensors, record):
    """Robust accuracy; from the image itself, so that all three make the same steps."""
    steps, step_size = 40, eps / 10
    logits_fn, model = pair(name)
    result = attacks.pgd(
        logits_fn, KEY, *images, eps=eps, num_steps=steps, step_size=step_size, random_start=False
    )
    ours = 100 * (1 - result.success.mean())
    found = torchattacks.PGD(model, eps=eps, alpha=step_size, steps=steps, random_start=False)(
        *tensors
    )
    attack = foolbox.attacks.LinfPGD(
        abs_stepsize=step_size, steps=steps, random_start=False, rel_stepsize=None
    )
    bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    _, clipped, _ = attack(bounded, *tensors, epsilons=eps)
    peers = {
        "torchattacks": 100 * (model(found).argmax(1) == tensors[1]).float().mean().item(),
        "foolbox": 100 * (model(clipped).argmax(1) == tensors[1]).float().mean().item(),
    }
    record("pgd linf", name, "robust accuracy, %", f"eps {eps}, {steps} steps", ours, peers)
    # Ours stops at the first success, theirs keep the last step: it may be below, never above.
    for peer in peers.values():
        assert ours <= peer
        assert peer - ours <= max(1.0, 100 / NUM_IMAGES)


@pytest.mark.parametrize("name", ["plain", "distilled", "robust"])
def test_carlini_wagner_l2(name, pair, images, tensors, record, adv_lib):
    searches, steps, rate, const = (9, 400, 0.05, 0.1) if FULL else (6, 100, 0.1, 0.1)
    logits_fn, model = pair(name)
    result = attacks.carlini_wagner_l2(
        logits_fn,
        None,
        *images,
        num_searches=searches,
        num_steps=steps,
        learning_rate=rate,
        initial_const=const,
    )
    bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.L2CarliniWagnerAttack(
        binary_search_steps=searches, steps=steps, stepsize=rate, initial_const=const
    )
    _, found, _ = attack(bounded, *tensors, epsilons=None)
    peers = {"foolbox": norms(model, found, tensors)}
    found = adv_lib.carlini_wagner_l2(
        model,
        *tensors,
        binary_search_steps=searches,
        max_iterations=steps,
        learning_rate=rate,
        initial_const=const,
    )
    peers["adv-lib"] = norms(model, found, tensors)
    ours, means = mean_norms(np.asarray(result.distance), peers)
    budget = f"{searches} × {steps} steps"
    record("carlini_wagner_l2", name, "mean L2", budget, ours, means)
    assert ours <= MARGIN * min(means.values())
