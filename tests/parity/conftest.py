"""The same networks in JAX and in PyTorch, the images, and the table that a full run writes.

Small by default; `JDISTILL_PARITY=full` (what `make parity` sets) runs at full size and writes
`docs/parity.md`.
"""

import contextlib
import functools
import os
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from experiments.bench.torch_side import torch_network
from jdistill import nets

FULL = os.environ.get("JDISTILL_PARITY") == "full"
TABLE = pathlib.Path(__file__).parents[2] / "docs" / "parity.md"

FOLDER = pathlib.Path(__file__).parent
NAMES = ("plain", "distilled", "robust", "plain_small", "distilled_small", "robust_small")


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
    params = weights(name)
    width = params["dense_0"]["bias"].size / 200
    return nets.logits_fn(nets.mnist_net(width=width), {"params": params})


class Pair(NamedTuple):
    """One network in both frameworks."""

    logits_fn: Any
    model: Any


@functools.cache
def _pair(name):
    return Pair(jax_network(name), torch_network(weights(name)))


@pytest.fixture(scope="session")
def pair():
    """`pair(name)`: the network in both frameworks."""
    return _pair


@pytest.fixture(scope="session")
def all_images():
    """`all_images(count)`: the first so many images and labels."""
    return images


@contextlib.contextmanager
def _double_precision():
    """Both sides in float64; the reference casts to float32 by `float()` alone."""
    import torch

    single = torch.Tensor.float
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    try:
        with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
            yield
    finally:
        torch.Tensor.float = single
        torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def double_precision():
    """`with double_precision():` both sides compute in float64."""
    return _double_precision


ROWS = []


@pytest.fixture
def record():
    """`record(comparison, network, measure, ours, theirs, shares)`: a row of the table."""

    def add(comparison, network, measure, ours, theirs, shares=None):
        name = f"{comparison.attack} {comparison.norm}"
        row = (name, network, measure, comparison.budget, ours, dict(theirs), dict(shares or {}))
        ROWS.append(row)
        print(_line(*row), end="")

    return add


def pytest_sessionfinish():
    if FULL and ROWS:
        TABLE.write_text(merged(TABLE.read_text(), [_line(*row) for row in ROWS]))


def merged(page, lines):
    """The page with these lines in place of those of the same attack, network and budget."""

    def place(line):
        attack, network, what, budget, *_ = line.strip("| \n").split(" | ")
        return attack, budget, what, NAMES.index(network)

    *_, rows = page.partition("|---|---|---|---|---|---|\n")
    before = [f"{line}\n" for line in rows.splitlines() if line]
    table = {place(line): line for line in [*before, *lines]}
    return HEAD + "".join(table[key] for key in sorted(table))


HEAD = """# Parity with other toolkits

Written by `make parity`: each attack beside the toolkits that have it, in one process, on the same
weights, images and budget; a row that is measured again takes the place of the one before. MNIST's
first 100 test images (20 for Carlini & Wagner's L0 and Linf, 500 for APGD, Square and AutoAttack);
`plain` is an ordinary network, `distilled` the student of a chain at T = 100, `robust` a smaller
network trained on PGD examples (linf, 0.1); `plain_small`, `distilled_small` and `robust_small`
(linf, 0.3) are narrower ones. `tests/parity/make_networks.py` makes them.

APGD starts from the same points on both sides. Where the two part, float32 decides: a
cross-entropy of 1e-5 has two digits left (the same two on both sides for nearly all images on a
processor with AVX-512, as its rows here; for 74% of 19 on one with AVX2 alone), and a ReLU's kink
two gradients; in float64 they are one algorithm. Square draws a window a step for each example,
the reference one for the whole batch, so its share varies with the seed: on `plain_small` and
5,000 queries 29.2, 28.6, 29.0, 27.6, 28.8 and 28.6% stood here and 27.6, 28.2, 27.2, 28.0, 28.6
and 28.2 there (seeds 0 to 5; the means are 28.6 and 28.0); on 500 queries, the mean of eight
seeds, 81.0 and 80.8.

A mean distance is over the images that all of them fool, and the lower one is the better attack. A
toolkit that fools fewer than half of the images stands with that share and without a mean, which
would be one of its easiest images alone. A robust accuracy is the share of images that are right
and stay right.

| attack | network | what | budget | jdistill | others |
|---|---|---|---|---|---|
"""


def _line(attack, network, measure, budget, ours, theirs, shares):
    others = [f"{name} {value:.4g}" for name, value in theirs.items()]
    others += [f"{name} fools {share:.0%}" for name, share in shares.items() if name not in theirs]
    return f"| {attack} | {network} | {measure} | {budget} | {ours:.4g} | {', '.join(others)} |\n"
