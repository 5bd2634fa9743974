"""The vision transformer beside PyTorch's own blocks with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench import torch_side
from jdistill import nets

pytest.importorskip("torch", reason="needs torch and the toolkits: make parity installs them")

pytestmark = pytest.mark.parity
SHAPE = (12, 8, 3)


@pytest.fixture(scope="module")
def both():
    """A small network, its weights moved from where they start, and the same in PyTorch."""
    model = nets.ViT(patch_size=4, width=24, depth=3, num_heads=3, num_classes=5)
    params, _ = nets.init(model, jax.random.key(0), SHAPE)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda leaf: leaf + rng.normal(0, 0.2, leaf.shape).astype(np.float32), params
    )
    return model, moved, torch_side.torch_vit(moved, model)


def test_logits_are_pytorchs(both):
    model, params, peer = both
    inputs = np.random.default_rng(1).uniform(size=(6, *SHAPE)).astype(np.float32)
    batch, _ = torch_side.torch_batch(inputs, np.zeros(6, int))
    expected = peer(batch).numpy()
    assert np.abs(expected - expected[:1]).max() > 0.1
    got = nets.logits_fn(model, {"params": params})(inputs)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_gradients_are_pytorchs(both):
    import torch

    model, params, peer = both
    inputs = np.random.default_rng(2).uniform(size=(6, *SHAPE)).astype(np.float32)
    labels = np.arange(6) % 5

    def total(params, inputs):
        logits = model.apply({"params": params}, inputs)
        return -jnp.sum(jax.nn.log_softmax(logits)[jnp.arange(6), labels])

    ours, on_inputs = jax.jit(jax.grad(total, (0, 1)))(params, inputs)
    peer = peer.train().requires_grad_(True)
    batch, classes = torch_side.torch_batch(inputs, labels)
    batch.requires_grad_(True)
    torch.nn.functional.cross_entropy(peer(batch), classes, reduction="sum").backward()

    def check(got, expected):
        expected = expected.grad.numpy()
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())

    check(np.asarray(on_inputs).transpose(0, 3, 1, 2), batch)
    check(ours["position_embedding"], peer.positions)
    check(np.asarray(ours["patch_embedding"]["kernel"]).T, peer.patches.weight)
    for number, block in enumerate(peer.blocks):
        mine = ours[f"block_{number}"]
        joined = [mine[name]["kernel"].T for name in ("query", "key", "value")]
        check(np.concatenate(joined), block.self_attn.in_proj_weight)
        check(mine["dense_0"]["bias"], block.linear1.bias)
        check(np.asarray(mine["dense_1"]["kernel"]).T, block.linear2.weight)
        check(mine["mlp_norm"]["scale"], block.norm2.weight)
