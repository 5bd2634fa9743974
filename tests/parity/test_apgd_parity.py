"""APGD-CE and APGD-T beside the reference's, from the same starting points."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import peers, torch_side
from jdistill import attacks, losses

torch = pytest.importorskip(
    "torch", reason="parity needs torch and the toolkits: make parity installs them"
)
reference = pytest.importorskip("pyautoattack.autopgd_base", reason="make parity installs it")

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

FULL = os.environ.get("JDISTILL_PARITY") == "full"
EPS = {
    "plain_small": {"linf": 0.1, "l2": 1.0},
    "robust_small": {"linf": 0.3, "l2": 3.0},
}
NUM_TRACED = 100 if FULL else 20
NUM_FLAGGED = 500 if FULL else 40
NUM_STEPS = 100 if FULL else 25  # a checkpoint among them
SAME_STEPS = 20


def start_of(inputs, eps, norm):
    """Somewhere in the ball and the box; the draw is NumPy's."""
    noise = np.random.default_rng(0).uniform(-1, 1, inputs.shape).astype(np.float32)
    if norm == "l2":
        noise /= np.linalg.norm(noise.reshape(len(noise), -1), axis=1)[:, None, None, None]
    return np.clip(inputs + eps * noise, 0, 1)


def theirs(model, inputs, labels, start, eps, norm, rank):
    """The reference's single run: its losses `[steps + 1, B]`, and which examples it breaks."""
    logits = []

    def recorded(x):
        logits.append(model(x))
        return logits[-1]

    kwargs = {"n_iter": NUM_STEPS, "norm": norm.capitalize(), "eps": eps, "device": "cpu"}
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
def runs(name, norm, rank, count, pair, all_images):
    """Both toolkits' losses and flags, on the images that the network gets right."""
    logits_fn, model = pair(name)
    inputs, labels = all_images(count)
    right = np.asarray(logits_fn(inputs)).argmax(1) == labels
    inputs, labels = inputs[right], labels[right]
    eps = EPS[name][norm]
    start = start_of(inputs, eps, norm)
    batch = (*torch_side.torch_batch(inputs, labels), torch_side.torch_batch(start, labels)[0])
    their_losses, their_flags = theirs(model, *batch, eps, norm, rank)
    kwargs = {"eps": eps, "norm": norm, "num_steps": NUM_STEPS, "init": start, "trace": True}
    if rank is None:
        result = attacks.apgd(logits_fn, None, inputs, labels, **kwargs)
    else:
        result = attacks.apgd_targeted(
            logits_fn, None, inputs, labels, num_targets=1, first_target=rank, **kwargs
        )
    return np.asarray(result.info["loss"])[:, 0], result.success, their_losses.T, their_flags


CASES = {
    f"{name}-{norm}-{'ce' if rank is None else f'targeted-{rank}'}": (name, norm, rank)
    for name in EPS
    for norm, rank in [("linf", None), ("linf", 0), ("linf", 3), ("l2", None), ("l2", 0)]
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_losses_go_the_same_way(case, pair, all_images):
    # Alone: in float32 the rounding of a convolution depends on how many images are beside one.
    ours, _, theirs, _ = runs(*case, NUM_TRACED, pair, all_images)
    ours, theirs = ours[:, : SAME_STEPS + 1], theirs[:, : SAME_STEPS + 1]
    until_success = np.isfinite(ours)  # ours stops there
    # A loss near 0 is the difference of logits of about 20, which float32 rounds at 2e-6.
    close = np.abs(ours - theirs) <= 1e-4 * np.abs(theirs) + 3e-6
    share = np.all(close | ~until_success, axis=1).mean()
    # A step of linf is a sign; one of l2 is the gradient, which jumps at a ReLU's kink, and on
    # which side of it an iterate lies is float32's to decide.
    assert share >= (0.99 if case[1] == "linf" else 0.9)
    assert until_success.mean() > 0.5


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_same_examples_break(case, pair, all_images, record):
    _, ours, _, theirs = runs(*case, NUM_FLAGGED, pair, all_images)
    name, norm, rank = case
    comparison = peers.Comparison(
        "apgd" if rank is None else "apgd_targeted",
        norm,
        f"eps {EPS[name][norm]:g}, {NUM_STEPS} steps"
        + ("" if rank is None else f", class {rank + 1}"),
        attacks.apgd,
        {},
    )
    left = {"pyautoattack": 100 * (1 - theirs.mean())}
    record(comparison, name, "of those right, stand, %", 100 * (1 - ours.mean()), left)
    record(comparison, name, "same flags, %", 100 * (ours == theirs).mean(), {})
    assert (ours == theirs).mean() >= (0.995 if FULL else 0.95)
    assert ours.any()
    assert not ours.all()
