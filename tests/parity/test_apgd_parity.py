"""APGD-CE and APGD-T beside the reference's, from the same starting points."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import torch_side
from jdistill import attacks, losses

torch = pytest.importorskip(
    "torch", reason="parity needs torch and the toolkits: make parity installs them"
)
reference = pytest.importorskip("pyautoattack.autopgd_base", reason="make parity installs it")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

FULL = os.environ.get("JDISTILL_PARITY") == "full"
EPS = {"plain": 0.1, "robust": 0.1}
NUM_TRACED = 100 if FULL else 20
NUM_FLAGGED = 500 if FULL else 40
NUM_STEPS = 100 if FULL else 25  # a checkpoint among them
SAME_STEPS = 20


def start_of(inputs, eps):
    """Somewhere in the ball and the box; the draw is NumPy's."""
    noise = np.random.default_rng(0).uniform(-1, 1, inputs.shape).astype(np.float32)
    return np.clip(inputs + eps * noise, 0, 1)


def theirs(model, inputs, labels, start, eps, rank):
    """The reference's single run: its losses `[steps + 1, B]`, and which examples it breaks."""
    logits = []

    def recorded(x):
        logits.append(model(x))
        return logits[-1]

    kwargs = {"n_iter": NUM_STEPS, "norm": "Linf", "eps": eps, "device": "cpu"}
    if rank is None:
        attack = reference.APGDAttack(recorded, loss="ce", **kwargs)
    else:
        attack = reference.APGDAttack_targeted(recorded, **kwargs)
        attack.y_target = model(inputs).sort(dim=1)[1][:, -2 - rank]
    attack.init_hyperparam(inputs)
    attack.ndims = inputs.ndim - 1
    _, stands, _, _ = attack.attack_single_run(inputs, labels, x_init=start)
    values = jnp.asarray(np.stack([z.detach().numpy() for z in logits]))
    goal = jnp.asarray(labels.numpy())
    if rank is None:
        traced = jax.vmap(losses.cross_entropy, in_axes=(0, None))(values, goal)
    else:
        aim = jnp.asarray(attack.y_target.numpy())
        traced = jax.vmap(losses.targeted_dlr, in_axes=(0, None, None))(values, goal, aim)
    return np.asarray(traced), ~stands.numpy()


@functools.cache
def runs(name, rank, pair, all_images):
    """Both toolkits' losses and flags, on the images that the network gets right."""
    logits_fn, model = pair(name)
    inputs, labels = all_images(NUM_FLAGGED)
    right = np.asarray(logits_fn(inputs)).argmax(1) == labels
    inputs, labels = inputs[right], labels[right]
    start = start_of(inputs, EPS[name])
    batch = (*torch_side.torch_batch(inputs, labels), torch_side.torch_batch(start, labels)[0])
    their_losses, their_flags = theirs(model, *batch, EPS[name], rank)
    kwargs = {"eps": EPS[name], "num_steps": NUM_STEPS, "init": start, "trace": True}
    if rank is None:
        result = attacks.apgd(logits_fn, None, inputs, labels, **kwargs)
    else:
        result = attacks.apgd_targeted(
            logits_fn, None, inputs, labels, num_targets=1, first_target=rank, **kwargs
        )
    return np.asarray(result.info["loss"])[:, 0], result.success, their_losses.T, their_flags


@pytest.mark.parametrize("name", ["plain", "robust"])
@pytest.mark.parametrize("rank", [None, 0, 3], ids=["ce", "targeted-0", "targeted-3"])
def test_the_losses_go_the_same_way(name, rank, pair, all_images):
    ours, _, theirs, _ = (column[:NUM_TRACED] for column in runs(name, rank, pair, all_images))
    ours, theirs = ours[:, : SAME_STEPS + 1], theirs[:, : SAME_STEPS + 1]
    until_success = np.isfinite(ours)  # ours stops there
    # A loss near 0 is the difference of logits of about 20, which float32 rounds at 2e-6.
    close = np.abs(ours - theirs) <= 1e-4 * np.abs(theirs) + 3e-6
    share = np.all(close | ~until_success, axis=1).mean()
    assert share >= 0.99
    assert until_success.mean() > 0.5


@pytest.mark.parametrize("name", ["plain", "robust"])
@pytest.mark.parametrize("rank", [None, 0], ids=["ce", "targeted-0"])
def test_the_same_examples_break(name, rank, pair, all_images):
    _, ours, _, theirs = runs(name, rank, pair, all_images)
    assert (ours == theirs).mean() >= (0.995 if FULL else 0.95)
    assert ours.any()
    assert not ours.all()
