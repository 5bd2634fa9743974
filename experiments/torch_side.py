"""A network and a batch as PyTorch has them, and what was found there.

PyTorch is imported where it is used; `make parity` installs it.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np

INSTALL = "run make bench, or python -m pip install --no-deps -r requirements-peers.txt"


def missing() -> str | None:
    """Why nothing can be done with PyTorch, and what to do about it; None where it can."""
    if importlib.util.find_spec("torch") is None:
        return f"torch is not installed; {INSTALL}"
    return None


def set_threads(count: int) -> int:
    """Let PyTorch use so many cores; returns how many it then does."""
    import torch

    torch.set_num_threads(count)
    return torch.get_num_threads()


def torch_network(params: Mapping[str, Mapping[str, Any]], *, dropout_rate: float = 0.0) -> Any:
    """A `nets.ConvNet` of gray or color images as a `torch.nn.Module`.

    Args:
        params: its weights, layer by layer; two convolutions and a pooling a block.
        dropout_rate: share of the first hidden layer's units that are dropped in training.

    Returns:
        A module of inputs `[B, C, H, W]` in [0, 1], in evaluation mode and without gradients for
        its weights.
    """
    import torch
    from torch import nn

    class Shift(nn.Module):
        def forward(self, inputs: Any) -> Any:
            return inputs - 0.5

    class Features(nn.Module):
        """Flattens in the order of JAX, channels last."""

        def forward(self, inputs: Any) -> Any:
            return inputs.permute(0, 2, 3, 1).flatten(1)

    def tensor(layer: str, kind: str, *axes: int) -> Any:
        value = np.asarray(params[layer][kind], np.float32)
        return torch.tensor(value.transpose(axes).copy() if axes else value.copy())

    layers: list[Any] = [Shift()]
    block = 0
    while f"conv_{block}_0" in params:
        position = 0
        while (name := f"conv_{block}_{position}") in params:
            kernel = tensor(name, "kernel", 3, 2, 0, 1)
            conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2:])
            conv.weight, conv.bias = nn.Parameter(kernel), nn.Parameter(tensor(name, "bias"))
            layers += [conv, nn.ReLU()]
            position += 1
        layers.append(nn.MaxPool2d(2))
        block += 1
    layers.append(Features())
    dense_names = sorted(name for name in params if name.startswith("dense_"))
    for name in [*dense_names, "logits"]:
        kernel = tensor(name, "kernel", 1, 0)
        dense = nn.Linear(kernel.shape[1], kernel.shape[0])
        dense.weight.data, dense.bias.data = kernel, tensor(name, "bias")
        layers += [dense] if name == "logits" else [dense, nn.ReLU()]
        if dropout_rate > 0 and name == "dense_0":
            layers.append(nn.Dropout(dropout_rate))
    model = nn.Sequential(*layers).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def torch_batch(inputs: Any, labels: Any) -> tuple[Any, Any]:
    """Images `[B, H, W, C]` and labels as PyTorch has them: `[B, C, H, W]` and int64."""
    import torch

    images = np.asarray(inputs, np.float32).transpose(0, 3, 1, 2)
    return torch.tensor(images.copy()), torch.tensor(np.asarray(labels)).long()


def fooled(model: Any, found: Any, labels: Any, targets: Any = None) -> np.ndarray:
    """Which of a peer's examples are misclassified, or with targets are taken for them, `[B]`."""
    predicted = model(found).argmax(1)
    return (predicted != labels if targets is None else predicted == targets).numpy()


def distances(
    model: Any, found: Any, inputs: Any, labels: Any, norm: str, targets: Any = None
) -> np.ndarray:
    """The norm of each change, `[B]`; `inf` where the network is not fooled.

    An l0 distance counts the features that a float32's rounding does not explain.
    """
    delta = (found - inputs).flatten(1).numpy()
    if norm == "l0":
        size = (np.abs(delta) > 1e-6).sum(axis=1).astype(float)
    else:
        size = np.linalg.norm(delta, {"l1": 1, "l2": 2, "linf": np.inf}[norm], axis=1)
    return np.where(fooled(model, found, labels, targets), size, np.inf)
