"""Defensive distillation through teacher assistants, and an honest account of the result.

The library in one screen:

* `data`: data sets as NumPy arrays; `nets`: networks, and adapters for any other;
* `train`, `distill`: one pure step, and chains teacher → assistants → student;
* `robust`: distillation with adversarial examples, from robust teachers;
* `sweep`: all temperatures and seeds of a study as one program;
* `attacks`: compiled attacks on any `logits_fn`; `losses`, `norms`: what they are made of;
* `metrics`, `evaluate`: accuracy, two sensitivities, robustness, for whole stacks of networks;
* `diagnose`: whether a robust accuracy is to be believed, and why;
* `parallel`: the step on one device or many;
* `study`: studies of own data, networks, and losses, from training to a report;
* `export`: networks as files that later versions read;
* `checkpoint`, `runtime`, `report`: storage, start-up and files. These five load on first use.

Importing the library starts no device and imports no TensorFlow, TFDS, Orbax or matplotlib.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jdistill import (
    attacks,
    data,
    diagnose,
    distill,
    evaluate,
    losses,
    metrics,
    nets,
    norms,
    parallel,
    robust,
    sweep,
    train,
    typing,
)
from jdistill.attacks import AttackResult

if TYPE_CHECKING:
    from jdistill import checkpoint, export, report, runtime, study

__version__ = "0.1.0"

_LAZY = ("checkpoint", "export", "report", "runtime", "study")

__all__ = [
    "AttackResult",
    "__version__",
    "attacks",
    "checkpoint",
    "data",
    "diagnose",
    "distill",
    "evaluate",
    "export",
    "losses",
    "metrics",
    "nets",
    "norms",
    "parallel",
    "report",
    "robust",
    "runtime",
    "study",
    "sweep",
    "train",
    "typing",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"jdistill.{name}")
    raise AttributeError(f"module 'jdistill' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
