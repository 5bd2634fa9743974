"""TPU compiler on a machine without a TPU: chips, topologies, and what the compiler says.

The package `libtpu` compiles ahead of time for chips that need not be there. Its numbers are
estimates and no measurement: nothing is run.
"""

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import pathlib
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

# So that libtpu does not ask a cloud's metadata which TPU this is, nor insist on being the only
# process that has it: there is no device to share.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
# The shape, a tuple's too, and the operation.
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%\S+ = ((?:\(.*?\)|\S+) [\w-]+)\(", re.MULTILINE)
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]")
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)
# Products of bfloat16 that a float32 product takes at a precision.
PASSES = {"default": 1, "bfloat16": 1, "high": 3, "tensorfloat32": 3, "highest": 6, "float32": 6}


class Chip(NamedTuple):
    """Numbers of a chip, as Google publishes them.

    Attributes:
        axes: of a topology.
        memory: bytes.
        flops: of bfloat16, per second.
        bandwidth: of the memory, bytes per second.
        links: bytes per second to the other chips, over all links.
        options: of the topology's description.
    """

    axes: int
    memory: float
    flops: float
    bandwidth: float
    links: float
    options: Mapping[str, Any]


# Google Cloud's documentation, "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" (Trillium), tables
# of key specifications; gigabytes are taken as 1e9 bytes, the smaller reading.
CHIPS: Mapping[str, Chip] = {
    # Both cores of a chip are one device to JAX, but for an ahead-of-time topology by default.
    "v4": Chip(3, 32e9, 275e12, 1200e9, 300e9, {"chip_config_name": "megacore"}),
    "v5e": Chip(2, 16e9, 197e12, 819e9, 200e9, {}),
    "v5p": Chip(3, 95e9, 459e12, 2765e9, 600e9, {}),
    "v6e": Chip(2, 32e9, 918e12, 1600e9, 400e9, {}),
}


class Topology(NamedTuple):
    """Chips of a slice, which need not be there.

    Attributes:
        name: such as `"v5e:4x4"`.
        chip: the numbers of each.
        devices: one a chip, to compile for.
    """

    name: str
    chip: Chip
    devices: tuple[Any, ...]


class Estimate(NamedTuple):
    """Estimate of a program by the compiler, for each chip.

    Attributes:
        flops: floating-point operations.
        bytes: from and to memory, and between operations.
        seconds: the sum over the operations of what each takes at least; NaN where the compiler
            has none.
        cycles: the sum of its schedule's estimates for each operation, which, unlike the seconds,
            grow with the passes that a precision takes.
        memory: bytes on the chip: arguments, outputs and temporaries.
        loops: loops in the program; the body of each is counted once.
        instructions: how many there are of each operation and shape.
    """

    flops: float
    bytes: float
    seconds: float
    cycles: int
    memory: int
    loops: int
    instructions: Counter[str]

    @property
    def communication(self) -> dict[str, int]:
        """Bytes that each kind of exchange between chips gives, by its name."""
        found: Counter[str] = Counter()
        for instruction, count in self.instructions.items():
            shape, _, name = instruction.rpartition(" ")
            kind = name.removesuffix("-start")
            if kind in _COLLECTIVES:
                found[kind] += count * _bytes_of(shape)
        return dict(found)


def check_compiler() -> None:
    """Check that the compiler is there.

    Raises:
        ImportError: it is not.
    """
    if importlib.util.find_spec("libtpu") is None and not os.environ.get("TPU_LIBRARY_PATH"):
        raise ImportError(
            "expected the package libtpu beside JAX, got none; do `pip install "
            "'jdistill[tpu-plan]'`, best in an environment of its own: with libtpu there, JAX "
            "looks for a TPU wherever it starts"
        )


def versions() -> dict[str, str]:
    """Versions of JAX and of the compiler, `"?"` where that does not say its own."""
    found = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}
    library = os.environ.get("TPU_LIBRARY_PATH")
    path = [str(pathlib.Path(library).parents[1])] if library else sys.path
    packages = importlib.metadata.distributions(name="libtpu", path=path)
    return {**found, "libtpu": next((each.version for each in packages), "?")}


def topology(name: str) -> Topology:
    """Chips to compile for.

    Args:
        name: the kind of chip and the chips along each axis, such as `"v5e:1x1"`, `"v5p:2x2x2"`.

    Raises:
        ValueError: no such topology.
        ImportError: the compiler is not there.
    """
    kind, _, shape = name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape):
        raise ValueError(
            f"expected a topology such as v5e:1x1 (of {', '.join(CHIPS)}), got {name!r}; name the "
            "chip, a colon, and how many there are along each axis"
        )
    sizes = [int(size) for size in shape.split("x")]
    if len(sizes) != chip.axes:
        raise ValueError(
            f"expected {chip.axes} axes of chips for {kind}, got {shape}; write such as "
            f"{kind}:{'x'.join('2' * chip.axes)}"
        )
    check_compiler()
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    first, second, *_ = sizes
    bounds = [2 - first % 2, 2 - second % 2, 1]
    try:
        made: Any = topologies.get_topology_desc(
            platform="tpu", topology_name=name, chips_per_host_bounds=bounds, **chip.options
        )
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"expected a topology that there is, got {name} ({str(error).splitlines()[0]:.200}); "
            "Google's documentation of the chip lists them"
        ) from None
    return Topology(name, chip, tuple(made.devices))


def compiled(program: Any, *arguments: Any, hasty: bool = False) -> Estimate:
    """Estimate of a jitted function by the compiler.

    Args:
        program: of `jax.jit`.
        *arguments: pytrees of `jax.ShapeDtypeStruct` on the devices of a topology.
        hasty: whether to compile with the least effort, in a fifth of the time and less. Of the
            MNIST training step and sweep the operations are then the same to 0.2%, the bytes to
            a fifth, and the memory 1.0 to 1.8 times as much, most in small programs.

    Raises:
        MemoryError: it does not fit into the chip's memory.
    """
    options = {"exec_time_optimization_effort": -1.0} if hasty else None
    try:
        with _nothing_kept():
            found = program.lower(*arguments).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryError(str(error).splitlines()[0]) from None
    sizes: Any = found.memory_analysis()
    memory = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
    memory += sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
    # Some programs have temporaries in their peak alone.
    memory = max(memory, getattr(sizes, "peak_memory_in_bytes", 0))
    return read(found.as_text() or "", found.cost_analysis() or {}, memory)


@contextlib.contextmanager
def _nothing_kept() -> Iterator[None]:
    """Context in which no program is put into JAX's cache: from there they cannot be read."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


def read(program: str, costs: Mapping[str, float], memory: int) -> Estimate:
    """Estimate out of what the compiler gives.

    Args:
        program: its text.
        costs: `cost_analysis`.
        memory: bytes on the chip.
    """
    # An operation that the compiler has no estimate for counts as -1 s. Only these are known to
    # take no time: parts that were copied next to each other are called one array.
    unknown = program.count('custom_call_target="ConcatBitcast"')
    seconds = costs.get("optimal_seconds", -1.0)
    seconds += unknown if seconds < 0 else 0
    # The computations before are the insides of the operations in it.
    entry = program[program.find("\nENTRY") :]
    return Estimate(
        costs.get("flops", 0.0),
        costs.get("bytes accessed", 0.0),
        seconds if seconds >= 0 else math.nan,
        sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry))),
        memory,
        len(re.findall(r" while\(", program)),
        Counter(_INSTRUCTION.findall(program)),
    )


def _bytes_of(shape: str) -> int:
    """Bytes of a shape as XLA writes it, of a tuple all its parts."""
    total = 0
    for kind, sizes in _SHAPE.findall(shape):
        bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
        total += math.prod(int(size) for size in sizes.split(",") if size) * bits // 8
    return total
