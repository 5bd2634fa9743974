"""The decision-based attacks beside foolbox's, from the same starts, at equal numbers of queries.

Foolbox's attacks take steps, not queries: every forward pass is counted, the last one ends the run,
and the closest adversarial of all of them counts, whichever the attack would have returned.
"""

import functools
import os

import jax
import numpy as np
import pytest

from experiments.bench import peers, torch_side
from jdistill import attacks

torch = pytest.importorskip(
    "torch", reason="parity needs torch and the toolkits: make parity installs them"
)
foolbox = pytest.importorskip("foolbox")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]  # the peers' own warnings

FULL = os.environ.get("JDISTILL_PARITY") == "full"
NUM_IMAGES = 20
NUM_QUERIES = 2000 if FULL else 200
MARGIN = 1.25
ORDERS = {"l2": 2, "linf": np.inf}
CASES = {
    "boundary-l2": (attacks.boundary, foolbox.attacks.BoundaryAttack(steps=NUM_QUERIES)),
    "hop_skip_jump-l2": (
        functools.partial(attacks.hop_skip_jump, norm="l2"),
        foolbox.attacks.HopSkipJumpAttack(steps=NUM_QUERIES, constraint="l2"),
    ),
    "hop_skip_jump-linf": (
        functools.partial(attacks.hop_skip_jump, norm="linf"),
        foolbox.attacks.HopSkipJumpAttack(steps=NUM_QUERIES, constraint="linf"),
    ),
}


@pytest.fixture(autouse=True)
def one_thread():
    """Thousands of small batches one after another: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class NoQueryLeft(Exception):
    """The budget is spent."""


class Counted(torch.nn.Module):
    """A network that keeps the closest adversarial it was asked for, and stops at the budget."""

    def __init__(self, model, inputs, labels, norm):
        super().__init__()
        self.model, self.inputs, self.labels, self.norm = model, inputs, labels, norm
        self.queries, self.distance = 0, np.full(len(inputs), np.inf)

    def forward(self, inputs):
        if self.queries == NUM_QUERIES:
            raise NoQueryLeft
        self.queries += 1
        with torch.no_grad():
            logits = self.model(inputs)
        delta = (inputs - self.inputs).flatten(1).numpy()
        distance = np.linalg.norm(delta, ORDERS[self.norm], axis=1)
        wrong = (logits.argmax(1) != self.labels).numpy()
        self.distance = np.minimum(self.distance, np.where(wrong, distance, np.inf))
        return logits


@pytest.mark.parametrize("network", ["plain", "distilled", "robust"] if FULL else ["robust"])
@pytest.mark.parametrize("name", CASES)
def test_no_farther_at_equal_queries(name, network, pair, all_images, record):
    ours, theirs = CASES[name]
    attack, _, norm = name.rpartition("-")
    logits_fn, model = pair(network)
    inputs, labels = all_images(NUM_IMAGES)
    # The next image of another class: foolbox ends with an error where it finds no start.
    others = [np.roll(labels, -row) != labels[row] for row in range(NUM_IMAGES)]
    init = inputs[(np.arange(NUM_IMAGES) + np.argmax(others, axis=1)) % NUM_IMAGES]
    result = ours(logits_fn, jax.random.key(0), inputs, labels, init=init, num_queries=NUM_QUERIES)
    assert np.all(result.success)
    found, target = torch_side.torch_batch(result.inputs, labels)
    images, _ = torch_side.torch_batch(inputs, labels)
    assert torch_side.fooled(model, found, target).mean() >= 0.95  # the other framework's word

    torch.manual_seed(0)
    counted = Counted(model, images, target, norm).eval()
    wrapped = foolbox.PyTorchModel(counted, bounds=(0, 1), device="cpu")
    with pytest.raises(NoQueryLeft):
        theirs.run(
            wrapped,
            images,
            foolbox.criteria.Misclassification(target),
            starting_points=torch_side.torch_batch(init, labels)[0],
        )
    comparison = peers.Comparison(attack, norm, f"{NUM_QUERIES} queries", ours, {"foolbox": theirs})
    mean, other = np.mean(result.distance), np.mean(counted.distance)
    record(comparison, network, "mean distance", mean, {"foolbox": other})
    assert mean <= MARGIN * other
    first = np.linalg.norm((init - inputs).reshape(NUM_IMAGES, -1), ORDERS[norm], axis=1)
    assert mean < 0.95 * np.mean(first)
