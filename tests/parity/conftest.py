"""The same networks in JAX and in PyTorch, the images, and the table that a full run writes.

Small by default; `JDISTILL_PARITY=full` (what `make parity` sets) runs at full size and writes
`docs/parity.md`.
"""

import functools
import os
import pathlib
import sys
import types
from typing import Any, NamedTuple

import numpy as np
import pytest

from jdistill import nets

FULL = os.environ.get("JDISTILL_PARITY") == "full"
TABLE = pathlib.Path(__file__).parents[2] / "docs" / "parity.md"

FOLDER = pathlib.Path(__file__).parent
NAMES = ("plain", "distilled", "robust")


def images(count):
    """The first test images of MNIST: inputs `[count, 28, 28, 1]` in [0, 1], and labels."""
    with np.load(FOLDER / "images.npz") as file:
        inputs = file["inputs"][:count].astype(np.float32) / 255
        return inputs, file["labels"][:count].astype(np.int32)


def weights(name):
    """Layer by layer, as `nets.ConvNet` has them."""
    params = {}
    with np.load(FOLDER / f"{name}.npz") as file:
        for path in file.files:
            layer, kind = path.split("/")
            params.setdefault(layer, {})[kind] = file[path]
    return params


def jax_network(name):
    """The `logits_fn`."""
    width = 0.5 if name == "robust" else 1.0
    return nets.logits_fn(nets.mnist_net(width=width), {"params": weights(name)})


def torch_network(name):
    """The same as a `torch.nn.Module` of inputs `[B, 1, 28, 28]` in [0, 1]."""
    import torch
    from torch import nn

    params = weights(name)

    class Shift(nn.Module):
        def forward(self, inputs):
            return inputs - 0.5

    class Features(nn.Module):
        """Flattens in the order of JAX, channels last."""

        def forward(self, inputs):
            return inputs.permute(0, 2, 3, 1).flatten(1)

    layers = [Shift()]
    for block in range(2):
        for position in range(2):
            kernel = params[f"conv_{block}_{position}"]["kernel"]
            conv = nn.Conv2d(kernel.shape[2], kernel.shape[3], 3)
            conv.weight.data = torch.tensor(kernel.transpose(3, 2, 0, 1).copy())
            conv.bias.data = torch.tensor(params[f"conv_{block}_{position}"]["bias"])
            layers += [conv, nn.ReLU()]
        layers.append(nn.MaxPool2d(2))
    layers.append(Features())
    for layer in ("dense_0", "dense_1", "logits"):
        kernel = params[layer]["kernel"]
        dense = nn.Linear(*kernel.shape)
        dense.weight.data = torch.tensor(kernel.T.copy())
        dense.bias.data = torch.tensor(params[layer]["bias"])
        layers += [dense] if layer == "logits" else [dense, nn.ReLU()]
    model = nn.Sequential(*layers).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


class Pair(NamedTuple):
    """One network in both frameworks."""

    logits_fn: Any
    model: Any


@functools.cache
def _pair(name):
    return Pair(jax_network(name), torch_network(name))


@pytest.fixture(scope="session")
def pair():
    """`pair(name)`: the network in both frameworks."""
    return _pair


@pytest.fixture(scope="session")
def all_images():
    """`all_images(count)`: the first so many images and labels."""
    return images


@pytest.fixture(scope="session")
def adv_lib():
    """adv-lib's attacks. Its loggers and perceptual distances, unused here, want two packages."""
    for name in ("torchvision", "visdom"):
        sys.modules.setdefault(name, types.ModuleType(name))
    torchvision = sys.modules["torchvision"]
    if not hasattr(torchvision, "models"):
        torchvision.models = sys.modules["torchvision.models"] = types.ModuleType("models")
    return pytest.importorskip("adv_lib.attacks")


ROWS = []


@pytest.fixture
def record():
    """`record(attack, network, measure, budget, ours=…, peers={name: value})` for the table."""

    def add(attack, network, measure, budget, ours, peers):
        ROWS.append((attack, network, measure, budget, ours, dict(peers)))

    return add


def pytest_sessionfinish(session):
    if FULL and ROWS and not session.config.getoption("keyword"):
        TABLE.write_text(HEAD + "".join(_line(*row) for row in sorted(ROWS, key=lambda r: r[:2])))


HEAD = """# Parity with other toolkits

Written by `make parity`: each attack beside the toolkits that have it, in one process, on the same
weights, images and budget. MNIST's first test images; `plain` is an ordinary network, `distilled`
the student of a chain at T = 100, `robust` a smaller network trained on PGD examples (linf, 0.1);
`tests/parity/make_networks.py` makes them. A mean norm is over the images that all of them fool.

| attack | network | what | budget | jdistill | others |
|---|---|---|---|---|---|
"""


def _line(attack, network, measure, budget, ours, peers):
    others = ", ".join(f"{name} {value:.4g}" for name, value in peers.items())
    return f"| {attack} | {network} | {measure} | {budget} | {ours:.4g} | {others} |\n"
