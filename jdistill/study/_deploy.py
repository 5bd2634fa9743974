"""The students of a study as exports, with their sizes and their speed.

Sizes are those of the files. Times are measured once for each export and kept in the workdir's
shards, so that another start changes no number.
"""

import functools
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from jdistill import __version__, _entries, attacks, export, report, runtime
from jdistill.export import _folder, _program
from jdistill.report import NetworkName
from jdistill.study._study import Examples, Study
from jdistill.study._training import Trained, chains_of

Row = dict[str, Any]
_BATCH_SIZES = (1, 128)
_NUM_CALLS = 20


def check_packages(study: Study) -> None:
    """Say before the first training step that no export could be written.

    Raises:
        ImportError: no package `flatbuffers`.
    """
    if study.deployed:
        _program.check_flatbuffers()


def deploy(
    folder: epath.Path, study: Study, networks: Sequence[Trained], examples: Examples, say: Any
) -> None:
    """Export what the study deploys, and write `deployment.csv`; none where it deploys nothing.

    For the main process alone.

    Args:
        folder: the workdir.
        study: that was trained there.
        networks: all of its networks.
        examples: of the study.
        say: called with lines for people.

    Raises:
        ValueError: a student that cannot be exported.
        OSError: an export cannot be written.
    """
    place = folder / "deployment.csv"
    if not study.deployed:
        place.unlink(missing_ok=True)  # of an earlier start
        return
    shards = runtime.ShardFolder(folder / "shards")
    rows: list[Row] = []
    parameters: dict[tuple[float, str, int], int] = {}
    for network, first in _deployed(study, networks):
        where = (network.temperature, network.chain, network.generation)
        exported = _exported(folder, study, network, examples, say)
        if exported is None:
            continue
        parameters[where] = exported.parameters
        # A first network is written before the students of its chain.
        largest = None if first is None else parameters.get((network.temperature, *first))
        name = NetworkName(
            examples.name, network.temperature, network.seed, network.generation, network.chain
        )
        rows.append(
            {
                **name.columns(),
                "parameters": exported.parameters,
                "share_of_first": largest and exported.parameters / largest,
                "weights_bytes": exported.weights_bytes,
                "program_bytes": exported.program_bytes,
                **_times(shards, network, exported.place, examples),
                "export": network.stem,
            }
        )
    if rows:
        report.write_table(place, "deployment", rows)
    else:
        place.unlink(missing_ok=True)


def _deployed(
    study: Study, networks: Sequence[Trained]
) -> list[tuple[Trained, tuple[str, int] | None]]:
    """The first seed's students, each with the place of its chain's first network, and these.

    A first network comes before its students; that of a chain without a teacher has no place.
    """
    chains = {chain.name: chain for chain in chains_of(study)}
    places: dict[tuple[str, int], tuple[str, int] | None] = {}
    for chain, generation in study.students().values():
        if len(chains[chain].stages) == 1:
            places.setdefault((chain, generation), None)
            continue
        first = chains[chain].owners[0], 0
        places[first] = first
        places.setdefault((chain, generation), first)
    there = {
        (network.temperature, network.chain, network.generation): network
        for network in networks
        if network.seed == study.seeds[0]
    }
    return [
        (there[temperature, *place], first)
        for temperature in study.temperatures
        for place, first in places.items()
        if (temperature, *place) in there  # a run of a sweep may have diverged
    ]


class _Export(NamedTuple):
    """A network's folder, and what it holds."""

    place: epath.Path
    parameters: int
    weights_bytes: int
    program_bytes: int


def _exported(
    folder: epath.Path, study: Study, network: Trained, examples: Examples, say: Any
) -> _Export | None:
    """The export of a network, written unless it is there and whole.

    None for a frozen teacher that cannot be written: what is deployed are the students.
    """
    place = folder / "exports" / network.stem
    found = _whole(place)
    if found is not None:
        return found
    (place / "config.json").unlink(missing_ok=True)  # damaged
    settings = (attacks.traits(plan.attack).settings for plan in study.attacks.values())
    bounds = [each["bounds"] for each in settings if each.get("bounds") is not None]
    try:
        export.save(
            place,
            network.logits_fn,
            input_shape=examples.test.inputs.shape[1:],
            bounds=bounds[0] if bounds else (0.0, 1.0),
        )
    except ValueError as error:
        if network.step == 0 and network.generation == 0:
            say(f"{network.title} is not exported: {error}")
            return None
        raise ValueError(
            f"expected students that jdistill.export.save can write, got {network.title} "
            f"({error}); run the study with deployed=False"
        ) from error
    return _whole(place)


def _whole(place: epath.Path) -> _Export | None:
    """What a folder holds; None where it is no whole export."""
    try:
        _, config = _folder.read_config(place)
        weights, program = (
            _folder.read_file(place, record) for record in (config["weights"], config["program"])
        )
    except (FileNotFoundError, ValueError):
        return None
    shapes = {name: each["shape"] for name, each in config["weights"]["arrays"].items()}
    # A Flax module's running statistics are no parameters; other networks do not tell them apart.
    learned = {name: shape for name, shape in shapes.items() if name.startswith("params/")}
    parameters = sum(math.prod(shape) for shape in (learned or shapes).values())
    return _Export(place, parameters, len(weights), len(program))


def _times(
    shards: runtime.ShardFolder, network: Trained, place: epath.Path, examples: Examples
) -> Row:
    """Columns about an export's speed, out of its shard or measured."""
    name = f"deployment/{network.stem}"
    settings = {
        "network": network.weights,
        "batch_sizes": list(_BATCH_SIZES),
        "num_calls": _NUM_CALLS,
        "jdistill": __version__,
    }
    kept = _entries.read(shards, name, settings, strict=False)
    if kept is None:
        loaded = export.load_stablehlo(place)
        times = [_milliseconds(loaded, examples.test.inputs, size) for size in _BATCH_SIZES]
        kept = {
            "milliseconds": np.array(times),
            "backend": np.array(jax.default_backend()),
            "device": np.array(jax.devices()[0].device_kind),
        }
        _entries.write(shards, name, settings, kept)
    columns = (f"milliseconds_per_image_batch_{size}" for size in _BATCH_SIZES)
    return {
        **dict(zip(columns, map(float, kept["milliseconds"]), strict=True)),
        "num_calls": _NUM_CALLS,
        "backend": str(kept["backend"]),
        "device": str(kept["device"]),
    }


def _milliseconds(network: Any, inputs: np.ndarray, batch_size: int) -> float:
    """Median time of an image in calls of the compiled program; compiling is not in it."""
    rows = np.resize(np.arange(len(inputs)), batch_size)
    batch = jax.device_put(inputs[rows].astype(np.float32))
    call = functools.partial(jax.jit(_logits), network, batch)
    seconds = []
    for _ in range(2):  # the first one compiles
        jax.block_until_ready(call())
    for _ in range(_NUM_CALLS):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds) / batch_size


def _logits(network: Any, inputs: Any) -> Any:
    return network(inputs)
