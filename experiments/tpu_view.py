"""What the TPU compiler expects of our steps, lowered one way and another; no TPU is needed.

    python -m experiments.tpu_view
    python -m experiments.tpu_view --steps sweep --num-runs 9
    python -m experiments.tpu_view --json runs/tpu-view.json

Compiles ahead of time for one chip (v5e:1x1) with the compiler in the package `libtpu`, which has to
be installed beside JAX. It is that compiler's estimate and no measurement: nothing is run.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies

from experiments import bench_rows, steps
from experiments.progress import Progress
from jdistill import _validate, nets, runtime
from jdistill.nets import _convnet, _convolution, _pooling
from jdistill.typing import Array

_TOPOLOGY = "v5e:1x1"
_INPUT_SHAPE = (28, 28, 1)
ESTIMATE = (
    "the TPU compiler's estimate for one v5e chip and not a measurement: nothing was run on a TPU"
)

StepName = Literal["training", "sweep", "pgd"]
ConvolutionName = Literal["xla", "jdistill", "cpu rules", "patches"]
PoolingName = Literal["xla", "jdistill", "mask"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is compiled."""

    steps: tuple[StepName, ...] = ("training", "sweep", "pgd")
    """Which steps."""
    num_runs: int = 27
    """Runs of the sweep's step, stacked under `vmap`."""
    batch_size: int = 128
    """Images a step, of each run."""
    width: float = 1.0
    """Of the papers' MNIST network: a factor on every number of channels and hidden units."""
    json: str | None = None
    """File ending in .json that gets the rows: a list with the keys of `experiments.bench`, where
    seconds are the compiler's, and flops, bytes and memory (none: nothing is written)."""

    def __post_init__(self) -> None:
        """Check every option, and name the one that is wrong."""
        _validate.count(num_runs=self.num_runs, batch_size=self.batch_size)
        _validate.positive(width=self.width)
        if not self.steps:
            raise ValueError("expected at least one step, got none; pick of training, sweep, pgd")
        if self.json is not None and not self.json.endswith(".json"):
            raise ValueError(f"expected json to end in .json, got {self.json!r}; rename it")


class Lowering(NamedTuple):
    """A way to write a step.

    Attributes:
        name: as in the table.
        convolution: XLA's own; the library's; the library's rules for CPU, on TPU; patches times
            weights.
        pooling: XLA's own; the library's; the library's rule for CPU, on TPU.
        precision: of an attack's products; None is the device's own.
    """

    name: str
    convolution: ConvolutionName = "xla"
    pooling: PoolingName = "xla"
    precision: str | None = "highest"


# The first is what the others are compared with.
LOWERINGS = (
    Lowering("XLA's convolution and pooling"),
    Lowering("jdistill's, as it is", "jdistill", "jdistill"),
    Lowering("convolution by the CPU's rules", "cpu rules"),
    Lowering("patches × weights", "patches"),
    Lowering("max-pool by mask", pooling="mask"),
)
PRECISIONS = (
    Lowering("XLA's, precision high (3 bfloat16 products)", precision="high"),
    Lowering("XLA's, precision default (1 bfloat16 product)", precision="default"),
)


class Estimate(NamedTuple):
    """What the compiler says of a program.

    Attributes:
        flops: floating-point operations.
        bytes: from and to memory, and between operations.
        optimal_seconds: the sum over the operations of what each takes at least; None where the
            compiler has none.
        cycles: the sum of its schedule's estimates for each operation, which know of tiles,
            padding and passes.
        arguments: bytes of what goes in.
        outputs: bytes of what comes out.
        temporaries: bytes in between.
        loops: loops in the program; the body of each is counted once.
        instructions: how many there are of each operation and shape.
        compile_s: seconds that compiling took.
    """

    flops: float
    bytes: float
    optimal_seconds: float | None
    cycles: int
    arguments: int
    outputs: int
    temporaries: int
    loops: int
    instructions: Counter[str]
    compile_s: float

    @property
    def memory(self) -> int:
        """Bytes on the chip, all together."""
        return self.arguments + self.outputs + self.temporaries


class Row(NamedTuple):
    """A step written one way.

    Attributes:
        step: what is compiled.
        lowering: how.
        estimate: of it.
        first: of the step's first lowering.
    """

    step: str
    lowering: str
    estimate: Estimate
    first: Estimate

    @property
    def ratio(self) -> float | None:
        """Seconds over those of the first lowering; None with loops, or without seconds."""
        ours, theirs = self.estimate.optimal_seconds, self.first.optimal_seconds
        if ours is None or theirs is None or self.estimate.loops or self.first.loops:
            return None
        return ours / theirs

    @property
    def cycles_ratio(self) -> float | None:
        """The same of the cycles."""
        if self.estimate.loops or self.first.loops or not self.first.cycles:
            return None
        return self.estimate.cycles / self.first.cycles

    @property
    def note(self) -> str:
        """What else there is to say."""
        if self.estimate is self.first:
            return ""
        if self.estimate.instructions == self.first.instructions:
            return "the same instructions as the first"
        if self.estimate.loops:
            return f"has {self.estimate.loops} loops, whose bodies are counted once: too low"
        return ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    check_compiler()
    # The host's own backend; the compiler for TPU is asked for by name. No cloud's metadata.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    if options.json is not None:
        folder = pathlib.Path(options.json).expanduser().parent
        runtime.check_writable(folder, remedy="choose another --json")
    run(options)


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line; `--help` explains each."""
    return tyro.cli(
        Options,
        prog="python -m experiments.tpu_view",
        description=__doc__,
        args=list(arguments),
    )


def check_compiler() -> None:
    """Raise where there is no compiler for TPU.

    Raises:
        ImportError: `libtpu` is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "expected the package libtpu beside JAX, got none; do `pip install libtpu`, best in an "
            "environment of its own: with libtpu there, JAX looks for a TPU wherever it starts"
        )


def run(options: Options) -> None:
    """Compile everything, print the table, and write the rows where asked to."""
    device = topologies.get_topology_desc(
        platform="tpu", topology_name=_TOPOLOGY, chips_per_host_bounds=[1, 1, 1]
    ).devices[0]
    rows = estimates(options, lambda step: compiled(step, device))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    shared = {"device": f"{device.device_kind}, {_TOPOLOGY}, not run", "versions": versions}
    print(_heading(options, versions) + text(rows, options.num_runs), end="")
    if options.json is not None:
        content = [record(row, shared) for row in rows]
        runtime.write_json(pathlib.Path(options.json).expanduser(), content)


def estimates(options: Options, compile_: Callable[[steps.Step], Estimate]) -> list[Row]:
    """The rows of every step and lowering.

    Args:
        options: which.
        compile_: what the compiler says of a step.
    """
    rows: list[Row] = []
    with Progress() as progress:
        for name in options.steps:
            lowerings = (*LOWERINGS, *(PRECISIONS if name == "pgd" else ()))
            move = {"event": "call", "stage": name, "total": len(lowerings), "unit": "program"}
            progress({**move, "done": 0})
            first = None
            for done, lowering in enumerate(lowerings, start=1):
                with _written(lowering):
                    estimate = compile_(_step(name, lowering, options))
                first = first or estimate
                rows.append(Row(_titles(options)[name], lowering.name, estimate, first))
                progress({**move, "done": done})
    return rows


def compiled(step: steps.Step, device: Any) -> Estimate:
    """What the compiler says of a step on a device that need not be there."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        step.arguments,
    )
    started = time.perf_counter()
    program = jax.jit(step.call).lower(*arguments).compile()
    seconds = time.perf_counter() - started
    memory = program.memory_analysis()
    return read(
        program.as_text() or "",
        program.cost_analysis() or {},
        (
            memory.argument_size_in_bytes,
            memory.output_size_in_bytes - memory.alias_size_in_bytes,
            memory.temp_size_in_bytes,
        ),
        seconds,
    )


def read(
    program: str, costs: Mapping[str, float], sizes: tuple[int, int, int], compile_s: float
) -> Estimate:
    """An estimate out of what the compiler gives.

    Args:
        program: its text.
        costs: `cost_analysis`.
        sizes: bytes of arguments, outputs and temporaries.
        compile_s: seconds that compiling took.
    """
    # An operation that the compiler has no estimate for counts as -1 s. Only these are known to
    # take no time: parts that were copied next to each other are called one array.
    unknown = program.count('custom_call_target="ConcatBitcast"')
    seconds = costs.get("optimal_seconds")
    if seconds is not None and seconds < 0:
        seconds += unknown
    # The computations before are the insides of the operations in it.
    entry = program[program.find("\nENTRY") :]
    return Estimate(
        costs.get("flops", 0.0),
        costs.get("bytes accessed", 0.0),
        None if seconds is None or seconds < 0 else seconds,
        sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry))),
        *sizes,
        len(re.findall(r" while\(", program)),
        Counter(re.findall(r"^\s*(?:ROOT )?%\S+ = (\S+ [\w-]+)\(", program, re.MULTILINE)),
        compile_s,
    )


def record(row: Row, shared: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-able: the row with the keys of `bench_rows.record` that it has, and its own."""
    ours, first = row.estimate, row.first
    return {
        "row": f"{row.step}: {row.lowering}",
        "ours_s": ours.optimal_seconds,
        "theirs_s": first.optimal_seconds,
        "peer": LOWERINGS[0].name,
        "ratio": row.ratio,
        "target": None,
        "compile_s": ours.compile_s,
        "note": "; ".join(part for part in (ESTIMATE, row.note) if part),
        "flops": ours.flops,
        "bytes": ours.bytes,
        "cycles": ours.cycles,
        "cycles_ratio": row.cycles_ratio,
        "memory": ours.memory,
        "arguments": ours.arguments,
        "outputs": ours.outputs,
        "temporaries": ours.temporaries,
        "loops": ours.loops,
        "same_instructions": ours.instructions == first.instructions,
        **shared,
    }


def text(rows: Sequence[Row], num_runs: int) -> str:
    """The rows in Markdown, and what one run after another would be."""
    cells = [_cells(row) for row in rows]
    single = next((row.first for row in rows if row.step == _TITLES["training"]), None)
    stacked = next((row for row in rows if row.step.startswith("sweep")), None)
    if single is not None and stacked is not None:
        lowering = f"{num_runs} × the training step"
        cells.append(_cells(Row(stacked.step, lowering, _times(single, num_runs), stacked.first)))
    head = ["step", "lowering", "GFLOP", "MB accessed", "optimal ms", "ratio"]
    head += ["Mcycles", "ratio", "MB on the chip", "note"]
    return bench_rows.table(head, cells)


def _cells(row: Row) -> list[str]:
    ours = row.estimate

    def of(value: float | None, form: str = ".2f") -> str:
        return "–" if value is None else format(value, form)

    return [
        row.step,
        row.lowering,
        of(ours.flops / 1e9, ".3g"),
        of(ours.bytes / 1e6, ",.0f"),
        of(None if ours.optimal_seconds is None else 1e3 * ours.optimal_seconds, ".3f"),
        of(row.ratio),
        of(ours.cycles / 1e6, ".3f"),
        of(row.cycles_ratio),
        of(ours.memory / 1e6, ",.0f"),
        row.note,
    ]


def _times(one: Estimate, count: int) -> Estimate:
    """One after another: the work of all, the temporaries of one."""
    seconds = one.optimal_seconds
    return one._replace(
        flops=count * one.flops,
        bytes=count * one.bytes,
        optimal_seconds=None if seconds is None else count * seconds,
        cycles=count * one.cycles,
        arguments=count * one.arguments,
        outputs=count * one.outputs,
    )


_TITLES = {"training": "training step", "pgd": "PGD step"}


def _titles(options: Options) -> dict[str, str]:
    return {**_TITLES, "sweep": f"sweep step, {options.num_runs} runs"}


def _heading(options: Options, versions: Mapping[str, str]) -> str:
    lines = [
        f"This is {ESTIMATE}.",
        ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; `nets.mnist_net(width={options.width})`, batch {options.batch_size}",
        "optimal: the least that each operation takes by its operations and bytes, added up; "
        "cycles: the compiler's estimates for what it scheduled, added up; ratio: to the step's "
        "first lowering; on the chip: arguments, outputs and temporaries",
    ]
    return "".join(f"* {line}\n" for line in lines) + "\n"


def _step(name: StepName, lowering: Lowering, options: Options) -> steps.Step:
    """The step, with a network that is written that way."""
    model = nets.mnist_net(
        width=options.width, conv_general_dilated=_CONVOLUTIONS[lowering.convolution]
    )
    if name == "training":
        return steps.training(model, _INPUT_SHAPE, options.batch_size)
    if name == "sweep":
        return steps.sweeping(model, _INPUT_SHAPE, options.batch_size, options.num_runs)
    return steps.ascending(model, _INPUT_SHAPE, options.batch_size, lowering.precision)


@contextlib.contextmanager
def _written(lowering: Lowering) -> Iterator[None]:
    """Within: what the network has no argument for is written that way, too."""
    jax.clear_caches()  # of the rules that were traced before
    with contextlib.ExitStack() as stack:
        if lowering.convolution == "cpu rules":
            stack.enter_context(mock.patch.object(_convolution, "lax", _CpuRules()))
        if lowering.pooling == "mask":
            stack.enter_context(mock.patch.object(_pooling, "lax", _CpuRules()))
        if lowering.pooling == "xla":
            stack.enter_context(mock.patch.object(_convnet, "max_pool", _xla_max_pool))
        yield
    jax.clear_caches()


class _CpuRules:
    """`jax.lax`, but every platform gets what is meant for CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jax.lax, name)

    @staticmethod
    def platform_dependent(
        *arguments: Any, cpu: Callable[..., Any], default: Callable[..., Any]
    ) -> Any:
        del default
        return cpu(*arguments)


def _xla_max_pool(inputs: Array) -> Array:
    return nn.max_pool(inputs, (2, 2), (2, 2))


def patches_convolution(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: Any,
    *,
    precision: Any = None,
    **options: Any,
) -> Array:
    """A 'valid' convolution as shifted inputs side by side times the weights, one product.

    Under `vmap` over weights that is a batched product, where XLA's convolution is a grouped one.

    Args:
        lhs: inputs `[B, H, W, I]`.
        rhs: kernel `[h, w, I, O]`.
        window_strides: all 1.
        padding: `"VALID"`, or pairs of 0.
        precision: of the product.
        **options: the rest of what `jax.lax.conv_general_dilated` takes; not looked at.
    """
    del window_strides, padding, options
    rows, columns, _, features = rhs.shape
    height, width = lhs.shape[1] - rows + 1, lhs.shape[2] - columns + 1
    patches = jnp.concatenate(
        [
            lhs[:, row : row + height, column : column + width]
            for row in range(rows)
            for column in range(columns)
        ],
        axis=-1,
    )
    return jnp.matmul(patches, jnp.reshape(rhs, (-1, features)), precision=precision)


_CONVOLUTIONS: Mapping[ConvolutionName, Callable[..., Array]] = {
    "xla": jax.lax.conv_general_dilated,
    "jdistill": nets.conv_general_dilated,
    "cpu rules": nets.conv_general_dilated,
    "patches": patches_convolution,
}


if __name__ == "__main__":
    runtime.run_main(main)
