"""The folder of one attack with one choice of settings: a row and a point for every example.

settings.json                    the attack, every setting, the networks, versions
T100_seed0_g2_step3010.csv       a row an example
T100_seed0_g2_step3010.npz       the adversarial inputs, and what else is an array
T100_seed0_g2_step3010.partial.npz   how far autoattack got, until it is done
partial/                         how far any other attack got, until it is done
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from experiments.networks import Trained
from experiments.training import temperature_name
from jdistill import evaluate, metrics, runtime
from jdistill.attacks import EnsembleState

Row = dict[str, Any]

_FILE = "settings.json"
_LEGEND = (
    "Percent, with Wilson intervals. of those right: of the examples that the network gets right\n"
    "without an attack. distance: over successes (0 where none was needed). queries: forward\n"
    "passes, mean. An attack that fails shows only that this attack failed: the workdir's\n"
    "report.html says where gradients are masked."
)


class Folder:
    """What is kept of an attack; a network is kept when `settings.json` lists it.

    Args:
        path: the folder; it need not exist.
        settings: what the results depend on beside the network, JSON-able.
        overwrite: whether to let go of the results of other settings, and of a settings.json that
            cannot be read, whose results stay where they are until they are computed again.

    Raises:
        ValueError: it holds results of other settings, or a settings.json that cannot be read.
    """

    def __init__(
        self, path: epath.Path, settings: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        self.path = path
        self._settings = json.loads(json.dumps(settings))
        self._runs: list[Any] = []
        self._networks: list[dict[str, Any]] = []
        self._stale: list[dict[str, Any]] = []  # of other settings
        if not (path / _FILE).exists():
            return
        try:
            held = self._read()
        except ValueError:
            if overwrite:
                return
            raise
        different = [name for name in self._settings if held.get(name) != self._settings[name]]
        if different and not overwrite:
            name = different[0]
            raise ValueError(
                f"expected {name}={held.get(name)!r}, as in {path / _FILE}, got "
                f"{self._settings[name]!r}; pass --overwrite, or move that folder away"
            )
        if different:
            self._stale = held["networks"]
        else:
            self._runs, self._networks = held["runs"], held["networks"]

    def has(self, network: Trained) -> bool:
        """Whether the network's results are there, with these weights."""
        return any(
            entry["weights"] == network.weights
            and all(path.exists() for path in self.files(network))
            for entry in self._networks
            if _identity(entry) == _identity(network._asdict())
        )

    def forget(self, networks: Iterable[Trained]) -> None:
        """Let go of the networks' results, and of those of other settings."""
        networks = list(networks)
        for network in networks:
            self._state_file(network).unlink(missing_ok=True)
            _forget(self.shards, self.stem(network))
        names = [_identity(network._asdict()) for network in networks]
        gone = [entry for entry in self._networks if _identity(entry) in names]
        self._networks = [entry for entry in self._networks if entry not in gone]
        gone, self._stale = gone + self._stale, []
        if gone:
            self._write()  # first, so that it lists nothing that is not there
        for entry in gone:
            for name in (entry["csv"], entry["npz"]):
                (self.path / name).unlink(missing_ok=True)

    def files(self, network: Trained) -> tuple[epath.Path, epath.Path]:
        """The network's CSV and its NPZ."""
        stem = self.stem(network)
        return self.path / f"{stem}.csv", self.path / f"{stem}.npz"

    def stem(self, network: Trained) -> str:
        """The network's name in the folder."""
        temperature = temperature_name(network.temperature)
        return f"T{temperature}_seed{network.seed}_g{network.generation}_step{network.step}"

    def save(
        self,
        network: Trained,
        rows: Sequence[Row],
        arrays: Mapping[str, np.ndarray],
        *,
        batch_size: int,
    ) -> None:
        """Keep what an attack did to a network."""
        table, points = self.files(network)
        content = io.BytesIO()
        np.savez(content, **dict(arrays))  # type: ignore[arg-type]
        runtime.atomic_write(points, content.getvalue())
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows([_cell(value) for value in row.values()] for row in rows)
        runtime.atomic_write_text(table, text.getvalue())
        run = runtime.describe()
        if run not in self._runs:
            self._runs.append(run)
        entry = {name: value for name, value in network._asdict().items() if name != "logits_fn"}
        entry |= {"csv": table.name, "npz": points.name, "batch_size": batch_size}
        # One entry a file: what was there of the same network is overwritten.
        self._networks = [held for held in self._networks if _identity(held) != _identity(entry)]
        self._networks.append({**entry, "run": self._runs.index(run)})
        self._networks.sort(key=_identity)
        self._write()
        self._state_file(network).unlink(missing_ok=True)
        _forget(self.shards, self.stem(network))

    @property
    def shards(self) -> runtime.ShardFolder:
        """Store of `evaluate` for an attack under way, until its results are saved."""
        return runtime.ShardFolder(self.path / "partial")

    def save_state(self, network: Trained, state: EnsembleState) -> None:
        """Keep how far an attack got with a network."""
        content = io.BytesIO()
        np.savez(content, network=self._of(network), **state._asdict())
        runtime.atomic_write(self._state_file(network), content.getvalue())

    def load_state(self, network: Trained) -> EnsembleState | None:
        """How far this attack got with these weights, or None."""
        path = self._state_file(network)
        if not path.exists():
            return None
        with np.load(io.BytesIO(path.read_bytes())) as file:
            if set(EnsembleState._fields) - set(file.files) or file["network"] != self._of(network):
                return None
            return EnsembleState(*(file[name] for name in EnsembleState._fields))

    def _of(self, network: Trained) -> np.ndarray:
        return np.array(json.dumps([network.weights, self._settings]))

    def _state_file(self, network: Trained) -> epath.Path:
        return self.files(network)[1].with_suffix(".partial.npz")

    def rows(self, network: Trained) -> list[dict[str, str]]:
        """The network's rows, as text."""
        return list(csv.DictReader(io.StringIO(self.files(network)[0].read_text(), newline="")))

    def _read(self) -> dict[str, Any]:
        path = self.path / _FILE
        try:
            held = dict(json.loads(path.read_text()))
            for entry in held["networks"]:
                _identity(entry), entry["weights"], entry["csv"], entry["npz"]
            return {**held, "runs": list(held["runs"])}
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"expected the settings of an attack in {path}, got a file that does not hold "
                "them; pass --overwrite, or move that folder away"
            ) from None

    def _write(self) -> None:
        content = {**self._settings, "networks": self._networks, "runs": self._runs}
        runtime.write_json(self.path / _FILE, content)


def _forget(shards: runtime.ShardFolder, stem: str) -> None:
    for name in [name for name in shards if stem in name.split("/")]:
        del shards[name]


def _identity(entry: Mapping[str, Any]) -> tuple[float, int, int, int]:
    """What names a network in the folder."""
    return entry["temperature"], entry["seed"], entry["generation"], entry["step"]


def per_example(
    network: Trained,
    outcome: evaluate.AttackOutcome,
    index: np.ndarray,
    columns: Mapping[str, np.ndarray | None],
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """The rows and the arrays that are kept.

    Args:
        network: the network attacked.
        outcome: of a stack of this network alone.
        index: `[M]`, each attacked example's place in the test set.
        columns: `[M]` further columns, to stand before the outcome's; None leaves the cells blank.

    Returns:
        A row an example, and the arrays of all of them.
    """
    info = {f"info_{name}": values[0] for name, values in sorted(outcome.info.items())}
    named = {name: getattr(network, name) for name in ("temperature", "seed", "generation", "step")}
    columns = {
        **{name: np.full(len(index), value) for name, value in named.items()},
        "index": index,
        **columns,
        "success": outcome.success[0],
        "distance": outcome.distance[0],
        "queries": outcome.queries[0],
        **{name: values for name, values in info.items() if values.ndim == 1},
    }
    rows = [
        {name: None if values is None else values[place] for name, values in columns.items()}
        for place in range(len(index))
    ]
    arrays = {"inputs": outcome.inputs[0], "index": index}
    return rows, arrays | {name: values for name, values in info.items() if values.ndim > 1}


def _cell(value: Any) -> str:
    """A value in a CSV: flags as 0 and 1, floats by the fewest digits that are the same float."""
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, np.bool_) else str(value)


def table(rows_of: Mapping[str, Sequence[Mapping[str, str]]]) -> str:
    """A line for each network: accuracy, success with its 95 % interval, distance, queries.

    Args:
        rows_of: by the network's name, its rows as `Folder.rows` returns them.
    """
    head = ("network", "accuracy", "success [95 %]", "of those right", "mean distance", "median")
    lines = [(*head, "queries"), *((name, *_entries(rows)) for name, rows in rows_of.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        [line[0].ljust(widths[0])]
        + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        for line in lines
    ]
    return "\n".join(["  ".join(cells) for cells in aligned] + ["", _LEGEND])


def _entries(rows: Sequence[Mapping[str, str]]) -> list[str]:
    success = np.array([row["success"] == "1" for row in rows])
    right = np.array([row["clean_prediction"] == row["label"] for row in rows])
    distance = np.array([float(row["distance"]) for row in rows])
    found = metrics.robustness(distance, success)
    queries = np.mean([float(row["queries"]) for row in rows])
    return [
        f"{100 * right.mean():.4g}",
        _share(success),
        _share(success[right]),
        *(f"{value:.4g}" if np.isfinite(value) else "–" for value in found[:2]),
        f"{queries:.4g}" if queries < 1000 else f"{queries:.0f}",
    ]


def _share(flags: np.ndarray) -> str:
    """A share in percent, with its interval."""
    if not flags.size:
        return "–"
    share = metrics.proportion(int(flags.sum()), flags.size)
    return f"{100 * share.value:.4g} [{100 * share.low:.1f}, {100 * share.high:.1f}]"
