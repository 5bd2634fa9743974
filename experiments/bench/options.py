"""Options that commands of `experiments.bench` share, and the command line that gives them."""

import dataclasses
import math
import shlex
from typing import Any, ClassVar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every command."""

    on_cpu: ClassVar[bool] = False  # even where JAX has an accelerator

    repeats: int = 5
    """Timed calls of each side, in turn, after one that warms up."""
    json: str | None = None
    """File ending in .json that gets the rows as a list, anew after each comparison."""
    flags: bool = True
    """Add the XLA flag that the experiments run with on a CPU (`runtime.add_cpu_flags`)."""

    def __post_init__(self) -> None:
        """Check every option, and name the one that is wrong."""
        check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkOptions(Options):
    """Options of the commands that work on a network and images."""

    width: float = 1.0
    """Of the papers' MNIST network: a factor on every number of channels and hidden units. Its
    weights are trained on the digits, once, in less than a minute, and kept in the cache."""
    network: str | None = None
    """Another network: an .npz file of a `nets.ConvNet` with an array per `layer/kind`."""
    images: str | None = None
    """Other images: an .npz file of `inputs` [N, H, W, C] (uint8) and `labels` [N]."""

    def __post_init__(self) -> None:
        """Check every option, and name the one that is wrong."""
        super().__post_init__()
        if self.network is not None and self.width != 1.0:
            raise ValueError(
                f"expected a width or a network of your own, got width {self.width} and "
                f"{self.network!r}; leave one of them out"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TorchOptions(NetworkOptions):
    """Options of the commands that PyTorch, too, can do on a network and images, on the CPU."""

    on_cpu: ClassVar[bool] = True

    peers: bool = True
    """Time PyTorch and its toolkits beside us; without them they need not be installed."""


def check(options: Any) -> None:
    """Check that counts are at least 1, numbers above 0, and a file's name ends in .json.

    Args:
        options: a dataclass.

    Raises:
        ValueError: an option that is wrong, by name.
    """
    for field in dataclasses.fields(options):
        name, value = field.name, getattr(options, field.name)
        if type(value) is int and value < 1:
            raise ValueError(f"expected {name} >= 1, got {value}; pass a count")
        if type(value) is float and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"expected {name} > 0 and finite, got {value}; pass such a number")
        if value == ():
            raise ValueError(f"expected at least one of {name}, got none; see --help")
        if name == "json" and value is not None and not value.endswith(".json"):
            raise ValueError(f"expected json to end in .json, got {value!r}; rename it")


def command(options: Any, *, program: str = "experiments.bench", **changes: Any) -> str:
    """Command line that gives these options, but for where the rows are written.

    Args:
        options: of the program, or of a command of the bench.
        program: the module.
        **changes: options that differ, such as the one attack of a row.
    """
    words = ["python", "-m", program]
    words += [type(options).__name__.lower()] if isinstance(options, Options) else []
    chosen = dataclasses.replace(options, json=None, **changes)
    for field in dataclasses.fields(chosen):
        value, flag = getattr(chosen, field.name), field.name.replace("_", "-")
        if value == field.default:
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag}")
        else:
            words += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    return shlex.join(words)
