"""The options of each command of `experiments.bench`."""

import dataclasses
import pathlib
from typing import Literal

from experiments.bench_attacks import COMPARISONS
from jdistill import _validate

_NAMES = tuple(dict.fromkeys(comparison.attack for comparison in COMPARISONS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What all commands have."""

    repeats: int = 5
    """Timed calls of each side, in turn, after one that warms up."""
    json: str | None = None
    """File ending in .json that gets the rows: a list, each with row, ours_s, theirs_s, peer,
    ratio, target, device and more (none: nothing is written)."""
    flags: bool = True
    """Add the XLA flag that the experiments run with on a CPU (`runtime.add_cpu_flags`)."""

    def __post_init__(self) -> None:
        """Check every option, and name the one that is wrong."""
        _validate.count(repeats=self.repeats)
        if self.json is not None and not self.json.endswith(".json"):
            raise ValueError(f"expected json to end in .json, got {self.json!r}; rename it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attacks(Options):
    """Each attack beside the toolkits for PyTorch that have it too: same network, images, budget.

    Printed are, for each attack, the median seconds of a call (and the range), ours over the
    fastest toolkit's, the seconds that compiling adds to our first call, and what was found for
    that time.
    """

    attacks: tuple[Literal[_NAMES], ...] = _NAMES  # type: ignore[valid-type]
    """Which attacks."""
    network: str | None = None
    """File of a network's weights, as tests/parity/make_networks.py writes them (none: the
    checkout's tests/parity/plain.npz, the papers' network trained on MNIST)."""
    images: str | None = None
    """File of images and labels, from the same program (none: the checkout's
    tests/parity/images.npz, the first test images of MNIST)."""
    batch_size: int = 100
    """Images a call: the first so many that the network classifies correctly. AutoAttack and
    the longest of Carlini & Wagner's have their own number."""
    repeats: int = 5
    """Timed calls of each attack, in turn with the toolkits', after one that warms up; those with
    a number of images of their own once."""
    slow_seconds: float = 120.0
    """A toolkit whose first call takes longer than so many seconds is not called again."""
    output: str | None = None
    """File ending in .md that gets what is printed, anew after each attack; beside it, ending in
    .json, every call's seconds (none: nothing is written)."""

    def __post_init__(self) -> None:
        """Check every option, and name the one that is wrong."""
        super().__post_init__()
        _validate.count(batch_size=self.batch_size)
        _validate.positive(slow_seconds=self.slow_seconds)
        if not self.attacks:
            raise ValueError(f"expected at least one attack, got none; pick of {', '.join(_NAMES)}")
        if self.output is not None and not self.output.endswith(".md"):
            raise ValueError(
                f"expected output to end in .md, got {self.output!r}; the tables are Markdown"
            )
        if self.json and self.output and _path(self.json) == _path(self.output, ".json"):
            raise ValueError(
                f"expected json to be another file than the one beside output, got {self.json!r}; "
                "rename it"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(Options):
    """The evaluation of several networks in one call against one call each: seconds and ratios.

    Clean measures, FGSM and PGD. One call is timed both ways that a stack can be run: in a loop
    over its networks, which is the default on a CPU, and under `vmap`, the default elsewhere.
    """

    num_networks: int = 9
    """How many networks: the file's weights, each time disturbed a little."""
    num_examples: int = 200
    """Images."""
    batch_size: int = 100
    """Images at a time."""
    num_steps: int = 10
    """Steps of PGD."""
    repeats: int = 3
    """Timed calls of each way, in turn, after one that warms up."""
    network: str | None = None
    """As of `attacks`."""
    images: str | None = None
    """As of `attacks`."""

    def __post_init__(self) -> None:
        """Check every option, and name the one that is wrong."""
        super().__post_init__()
        for field in ("num_networks", "num_examples", "batch_size", "num_steps"):
            _validate.count(**{field: getattr(self, field)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(Options):
    """A training step and an input gradient beside the same in eager PyTorch, on the CPU.

    The step is that of `train.fit`: dropout on, SGD with Nesterov momentum. The gradient is that
    of an attack's compiled loop, once in a scan of sign steps that no image ends early, and once
    in `attacks.pgd`, in a ball so small that no image is misclassified.
    """

    num_steps: int = 20
    """Steps of a timed call; the seconds printed are those of one step."""
    batch_size: int = 128
    """Images a step."""
    network: str | None = None
    """As of `attacks`: where the training begins, and what is attacked."""
    images: str | None = None
    """As of `attacks`; they come around again and again."""

    def __post_init__(self) -> None:
        """Check every option, and name the one that is wrong."""
        super().__post_init__()
        _validate.count(num_steps=self.num_steps, batch_size=self.batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Options):
    """All temperatures and seeds as one program against one run at a time: a generation's steps.

    The program is timed both ways: run after run inside the compiled loop, which is the default
    on a CPU, and all runs at once under `vmap`, the default elsewhere.
    """

    num_temperatures: int = 9
    """How many, from 1 to 100 by equal factors."""
    num_seeds: int = 1
    """Runs at each temperature."""
    num_steps: int = 8
    """Steps of each run in a timed call."""
    batch_size: int = 128
    """Images a step."""
    width: float = 1.0
    """Of the papers' MNIST network: a factor on every number of channels and hidden units."""

    def __post_init__(self) -> None:
        """Check every option, and name the one that is wrong."""
        super().__post_init__()
        for field in ("num_temperatures", "num_seeds", "num_steps", "batch_size"):
            _validate.count(**{field: getattr(self, field)})
        _validate.positive(width=self.width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Options):
    """An epoch's shuffled batches: out of the store on the device, from the host, from PyTorch.

    The store is what `sweep` trains from: bytes that lie on the device, read inside the compiled
    loop. From the host: `data.batches`, each batch put on the device, as `train.fit` does. PyTorch
    has a DataLoader over a TensorDataset of the same floats, in this process.
    """

    num_examples: int = 60_000
    """Random images of 28 x 28 pixels."""
    batch_size: int = 128
    """Images a batch."""

    def __post_init__(self) -> None:
        """Check every option, and name the one that is wrong."""
        super().__post_init__()
        _validate.count(num_examples=self.num_examples, batch_size=self.batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Startup(Options):
    """Seconds of `import jdistill` in a fresh process against `import jax, flax, optax`."""

    repeats: int = 5
    """Timed processes of each, in turn, after one that warms up."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline(Options):
    """What a training step and a step of PGD reach of what the device can do, and what limits them.

    Measured are the device's rates (a large float32 product; passes over a large array) and the
    seconds of both steps; operations and bytes of the steps are counted in closed form, and beside
    it by the compiler.
    """

    num_steps: int = 20
    """Steps of a timed call; the seconds printed are those of one step."""
    batch_size: int = 128
    """Images a step."""
    matmul_size: int = 4096
    """Rows and columns of the matrices whose product is the peak of arithmetic."""
    copy_megabytes: int = 256
    """Size of the array that is read and written for the peak of memory; larger than any cache."""
    network: str | None = None
    """As of `attacks`."""
    images: str | None = None
    """As of `attacks`."""

    def __post_init__(self) -> None:
        """Check every option, and name the one that is wrong."""
        super().__post_init__()
        for field in ("num_steps", "batch_size", "matmul_size", "copy_megabytes"):
            _validate.count(**{field: getattr(self, field)})


def _path(name: str, suffix: str | None = None) -> pathlib.Path:
    path = pathlib.Path(name).expanduser().absolute()
    return path if suffix is None else path.with_suffix(suffix)
