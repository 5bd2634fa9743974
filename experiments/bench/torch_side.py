"""Networks and batches as PyTorch has them, and the distances that were found there.

PyTorch is imported where it is used; `make bench` installs it.
"""

import importlib.util
import itertools
from typing import Any

import numpy as np

from jdistill import nets

INSTALL = "run make bench, or python -m pip install --no-deps -r requirements-peers.txt"


def missing() -> str | None:
    """Reason why nothing can be done with PyTorch, and the remedy; None where it can."""
    if importlib.util.find_spec("torch") is None:
        return f"torch is not installed; {INSTALL}"
    return None


def torch_network(params: Any, *, dropout_rate: float = 0.0) -> Any:
    """Network of a `nets.ConvNet`'s weights as a `torch.nn.Module`.

    Args:
        params: layer by layer.
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

    def weights(layer: str, *axes: int) -> dict[str, Any]:
        kernel, bias = (np.array(params[layer][kind], np.float32) for kind in ("kernel", "bias"))
        return {"weight": torch.tensor(kernel.transpose(axes).copy()), "bias": torch.tensor(bias)}

    layers: list[Any] = [Shift()]
    for block in itertools.count():
        names = sorted(name for name in params if name.startswith(f"conv_{block}_"))
        if not names:
            break
        for name in names:
            state = weights(name, 3, 2, 0, 1)
            size, channels, *window = state["weight"].shape
            layers += [nn.Conv2d(channels, size, window), nn.ReLU()]
            layers[-2].load_state_dict(state)
        layers.append(nn.MaxPool2d(2))
    layers.append(Features())
    for name in [*sorted(name for name in params if name.startswith("dense_")), "logits"]:
        state = weights(name, 1, 0)
        layers.append(nn.Linear(*reversed(state["weight"].shape)))
        layers[-1].load_state_dict(state)
        layers += [] if name == "logits" else [nn.ReLU()]
        if dropout_rate > 0 and name == "dense_0":
            layers.append(nn.Dropout(dropout_rate))
    return nn.Sequential(*layers).eval().requires_grad_(False)


def torch_vit(params: Any, model: nets.ViT) -> Any:
    """Network of a `nets.ViT`'s weights as a `torch.nn.Module`, its blocks PyTorch's own.

    Args:
        params: without a distillation token.
        model: the network's fields.

    Returns:
        A module of inputs `[B, C, H, W]` in [0, 1], in evaluation mode and without gradients for
        its weights.
    """
    import torch
    from torch import nn

    def tensor(array: Any) -> Any:
        return torch.tensor(np.array(np.transpose(array), np.float32))  # kernels the other way

    def fill(layer: Any, weights: Any) -> Any:
        kind = "scale" if "scale" in weights else "kernel"
        layer.load_state_dict({"weight": tensor(weights[kind]), "bias": tensor(weights["bias"])})
        return layer

    def block(weights: Any) -> Any:
        layer = nn.TransformerEncoderLayer(
            model.width,
            model.num_heads,
            model.mlp_ratio * model.width,
            dropout=0.0,
            activation="gelu",
            layer_norm_eps=1e-6,
            batch_first=True,
            norm_first=True,
        )
        parts = [weights[name] for name in ("query", "key", "value")]
        attention = layer.self_attn
        with torch.no_grad():
            attention.in_proj_weight.copy_(torch.cat([tensor(part["kernel"]) for part in parts]))
            attention.in_proj_bias.copy_(torch.cat([tensor(part["bias"]) for part in parts]))
        fill(attention.out_proj, weights["out"])
        fill(layer.linear1, weights["dense_0"])
        fill(layer.linear2, weights["dense_1"])
        fill(layer.norm1, weights["attention_norm"])
        fill(layer.norm2, weights["mlp_norm"])
        return layer

    class Vit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.class_token = nn.Parameter(tensor(params["class_token"]))
            self.positions = nn.Parameter(tensor(params["position_embedding"].T))
            patches, logits = params["patch_embedding"], params["logits"]
            self.patches = fill(nn.Linear(*np.shape(patches["kernel"])), patches)
            blocks = (block(params[f"block_{number}"]) for number in range(model.depth))
            self.blocks = nn.ModuleList(blocks)
            self.norm = fill(nn.LayerNorm(model.width, eps=1e-6), params["norm"])
            self.logits = fill(nn.Linear(*np.shape(logits["kernel"])), logits)

        def forward(self, inputs: Any) -> Any:
            batch, channels, height, width = inputs.shape
            side = model.patch_size
            rows, columns = height // side, width // side
            cut = (inputs - model.shift).reshape(batch, channels, rows, side, columns, side)
            # The pixels of a patch in the order of JAX, channels last.
            flat = cut.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
            first = self.class_token.expand(batch, 1, -1)
            x = torch.cat([first, self.patches(flat)], dim=1) + self.positions
            for layer in self.blocks:
                x = layer(x)
            return self.logits(self.norm(x)[:, 0])

    return Vit().eval().requires_grad_(False)


def torch_batch(inputs: Any, labels: Any) -> tuple[Any, Any]:
    """Images `[B, H, W, C]` and labels as PyTorch has them: `[B, C, H, W]` and int64."""
    import torch

    images = np.asarray(inputs, np.float32).transpose(0, 3, 1, 2)
    return torch.tensor(images.copy()), torch.tensor(np.asarray(labels)).long()


def fooled(model: Any, found: Any, labels: Any, targets: Any = None) -> np.ndarray:
    """Flags of a peer's examples that are misclassified, or with targets taken for them, `[B]`."""
    predicted = np.asarray(model(found)).argmax(1)
    return predicted != np.asarray(labels) if targets is None else predicted == np.asarray(targets)


def distances(
    model: Any, found: Any, inputs: Any, labels: Any, norm: str, targets: Any = None
) -> np.ndarray:
    """Norm of each change, `[B]`; `inf` where the network is not fooled.

    An l0 distance counts the features that a float32's rounding does not explain.
    """
    delta = np.asarray(found) - np.asarray(inputs)
    delta = delta.reshape(len(delta), -1)
    if norm == "l0":
        size = (np.abs(delta) > 1e-6).sum(axis=1).astype(float)
    else:
        size = np.linalg.norm(delta, {"l1": 1, "l2": 2, "linf": np.inf}[norm], axis=1)
    return np.where(fooled(model, found, labels, targets), size, np.inf)
