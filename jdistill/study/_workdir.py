"""The folder of a study: what it holds, what may extend it, what is refused, who may write."""

import contextlib
import hashlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath

from jdistill import _files, _fingerprint, parallel, runtime

_FORMAT = 1
# A workdir may grow along these; everything else about it is fixed when it is made.
_GROWING = ("temperatures", "seeds", "chains")
_LEASE_SECONDS = 120.0
_SECONDS_BETWEEN_TIMES = 10.0


@contextlib.contextmanager
def reserved(path: _files.PathLike) -> Iterator[epath.Path]:
    """The workdir, made and tried; gone again where it stays empty and the block fails.

    Raises:
        OSError: it cannot be written.
    """
    folder = _files.as_path(path)
    made = not folder.exists()
    runtime.check_writable(folder)
    try:
        yield folder
    except BaseException:
        with contextlib.suppress(OSError):  # another host may have removed it
            if made and not any(folder.iterdir()):
                folder.rmdir()
        raise


def check_shared(folder: epath.Path) -> None:
    """Check that all hosts see one folder.

    Raises:
        OSError: this one does not see what the first host has written.
    """
    if jax.process_count() == 1:
        return
    path = folder / ".hosts"
    if runtime.is_main_process():
        runtime.atomic_write_text(path, uuid.uuid4().hex)
    parallel.barrier("hosts' file")
    seen = path.read_text() if path.exists() else ""
    try:
        parallel.check_same(workdir=seen)
    except ValueError as error:
        raise OSError(
            f"expected one folder that all {jax.process_count()} hosts see, got {folder}, whose "
            f"content differs ({error}); pass a bucket or a shared file system as --workdir"
        ) from None


@contextlib.contextmanager
def held(folder: epath.Path) -> Iterator[None]:
    """The only job that writes the workdir, until the block ends or the process dies.

    Locally by a lock of the operating system, in a bucket by a lease that its holder renews. Of
    a job's processes the first one holds it.

    Raises:
        OSError: another job holds it.
    """
    if jax.process_index() != 0:
        yield
        return
    hold = _leased if _files.is_remote(folder) else _locked
    with hold(folder):
        # Left by writers that were killed; nobody else writes here now.
        if not _files.is_remote(folder):  # in a bucket a file is whole or not there
            for leftover in pathlib.Path(folder).rglob(".*.tmp"):
                leftover.unlink(missing_ok=True)
        yield


@contextlib.contextmanager
def _locked(folder: epath.Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows has no such lock
        yield
        return
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise _in_use(folder, file.read() or "another job") from None
        file.truncate(0)
        file.write(_holder())
        file.flush()
        try:
            yield
        finally:
            # Emptied and not removed: a removed file could be locked twice.
            file.truncate(0)


@contextlib.contextmanager
def _leased(folder: epath.Path) -> Iterator[None]:
    place, own = folder / ".lease", uuid.uuid4().hex
    found = _read_lease(place)
    if found and time.time() - found["time"] < _LEASE_SECONDS:
        raise _in_use(folder, found["holder"])
    stop = threading.Event()

    def renew() -> None:
        content = {"id": own, "holder": _holder(), "time": time.time()}
        place.write_text(json.dumps(content))

    def keep() -> None:
        while not stop.wait(_LEASE_SECONDS / 4):
            with contextlib.suppress(OSError):  # the next one may pass
                renew()

    renew()
    found = _read_lease(place)  # two jobs that start at once: the last one to write has it
    if found is None or found["id"] != own:
        raise _in_use(folder, found["holder"] if found else "another job")
    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        place.unlink(missing_ok=True)


def _read_lease(place: epath.Path) -> dict[str, Any] | None:
    try:
        found = json.loads(place.read_text())
        return {
            "id": str(found["id"]),
            "holder": str(found["holder"]),
            "time": float(found["time"]),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _holder() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _in_use(folder: epath.Path, holder: str) -> OSError:
    return OSError(
        f"expected a workdir that no other job writes, got {folder}, which {holder} uses; wait for "
        "it to end, or choose another `--workdir`"
    )


def read_config(folder: epath.Path) -> dict[str, Any] | None:
    """The description of the study that the workdir belongs to; None where there is none yet.

    Raises:
        ValueError: the file does not hold one.
    """
    path = folder / "config.json"
    if not path.exists():
        return None
    try:
        held = json.loads(path.read_text())
        study = held["study"]
        if held["format"] != _FORMAT:
            raise ValueError(f"format {held['format']!r}, not {_FORMAT}")
        if held != sealed(held):
            raise ValueError("its checksum is another")
        temperatures = [float(T) for T in _listed(study["temperatures"])]
        seeds = [_whole(seed) for seed in _listed(study["seeds"])]
        for stages in study["chains"].values():
            dict(stages)
        held["study"] = {**study, "temperatures": temperatures, "seeds": seeds}
        return dict(held)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"expected the description of a study in {path}, got a file that does not hold one "
            f"({type(error).__name__}: {error}); use the version of jdistill that wrote it, or "
            "choose another workdir"
        ) from None


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a file with its checksum."""
    content = {name: value for name, value in content.items() if name != "checksum"}
    return {**content, "checksum": _fingerprint.fingerprint(json.loads(json.dumps(content)))}


def _listed(values: Any) -> list[Any]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is no list")
    return values


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{value!r} is no seed")
    return value


def write_config(
    folder: epath.Path, description: Mapping[str, Any], more: Mapping[str, Any]
) -> None:
    """Write what the workdir belongs to."""
    from jdistill import __version__

    content = {"format": _FORMAT, "jdistill": __version__, **more, "study": description}
    runtime.write_json(folder / "config.json", sealed(content))


def refuse_difference(
    folder: epath.Path, config: Mapping[str, Any], wanted: Mapping[str, Any]
) -> None:
    """Refuse a study that is not the workdir's; more temperatures, seeds, or chains are.

    Raises:
        ValueError: the first differences by name.
    """
    from jdistill import __version__

    if config.get("jdistill") != __version__:
        raise ValueError(
            f"expected jdistill {config.get('jdistill')}, which made {folder}, got {__version__}; "
            "use that version, or choose another workdir"
        )
    held = {name: value for name, value in config["study"].items() if name not in _GROWING[:2]}
    missing = [name for name in held["chains"] if name not in wanted["chains"]]
    if missing:
        raise ValueError(
            f"expected the chain {missing[0]!r} of the workdir {folder} among the chains, got "
            f"{', '.join(wanted['chains'])}; add it, or choose another workdir"
        )
    given = json.loads(json.dumps(_within(wanted, held)))
    found = _fingerprint.differences(held, given, "this study's")
    if found:
        raise ValueError(
            f"expected the study of the workdir {folder}, got another: in the workdir "
            f"{'; '.join(found[:3])}; "
            "choose another workdir, or the same value (only temperatures, seeds, and chains may "
            "extend a workdir)"
        )


def _within(wanted: Any, held: Any, growing: bool = False) -> Any:
    """The wanted content without what has grown: further chains, and values at further T."""
    if not isinstance(wanted, Mapping) or not isinstance(held, Mapping):
        return wanted
    kept = {}
    for name, value in wanted.items():
        further = growing or str(name).startswith("T=") or name in _GROWING[:2]
        if name in held or not further:
            kept[name] = _within(value, held.get(name), growing=name == "chains")
    return kept


class Times:
    """`run.json`: versions, devices, and seconds of this start and of those before it.

    It is written at the start and on the way, so that a killed start counts as well.
    """

    def __init__(self, folder: epath.Path, parallel: str) -> None:
        self._path = folder / "run.json"
        self._parallel = parallel
        self._started = self._written = time.monotonic()
        try:
            before = dict(json.loads(self._path.read_text()))
            self._earlier = [*before.pop("earlier_starts", []), before]
            self._total = float(before.pop("seconds_all_starts"))
        except (OSError, ValueError, KeyError, TypeError):
            self._earlier, self._total = [], 0.0
        self.write()

    def tick(self) -> None:
        """Write where the last time is a while ago."""
        if time.monotonic() - self._written >= _SECONDS_BETWEEN_TIMES:
            self.write()

    def write(self) -> None:
        """Write the seconds so far."""
        if not runtime.is_main_process():
            return
        seconds = round(time.monotonic() - self._started, 1)
        run = {**runtime.describe(), "parallel": self._parallel, "seconds": seconds}
        run["programs"] = runtime.programs()
        run["seconds_all_starts"] = round(self._total + seconds, 1)
        runtime.write_json(self._path, {**run, "earlier_starts": self._earlier})
        self._written = time.monotonic()


def forget_epochs(log: epath.Path, labels: Mapping[str, Any], *, after: int) -> None:
    """Drop the log lines of a stage's epochs that will be run again.

    Raises:
        ValueError: a line of the log is not an epoch's record.
    """
    lines = runtime.read_jsonl(log)
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict) or not isinstance(line.get("epoch"), int):
            raise ValueError(
                f"expected an epoch's record in line {number} of {log}, got {str(line)[:60]!r}; "
                "remove that line"
            )
    kept = [
        line
        for line in lines
        if line["epoch"] <= after or any(line.get(name) != labels[name] for name in labels)
    ]
    if len(kept) < len(lines):
        text = "".join(json.dumps(line) + "\n" for line in kept)
        runtime.atomic_write_text(log, text)


def seal(folder: epath.Path, names: Sequence[str]) -> None:
    """Write `tables.json`, the checksums of the tables that a run has derived."""
    content = {name: _checksum(folder / name) for name in names if (folder / name).exists()}
    runtime.write_json(folder / "tables.json", content)


def check_seal(folder: epath.Path) -> list[str]:
    """The names of the workdir's tables, each as the run has written it.

    Raises:
        FileNotFoundError: no run has written tables there.
        ValueError: a table, or the list of their checksums, is another one.
    """
    path = folder / "tables.json"
    again = "run the same study in this workdir again, which writes the tables anew"
    if not path.exists():
        raise FileNotFoundError(f"expected the tables of a study in {folder}, got none; {again}")
    try:
        sealed = {str(name): str(value) for name, value in json.loads(path.read_text()).items()}
    except (ValueError, AttributeError):
        raise ValueError(f"expected checksums in {path}, got another file; {again}") from None
    for name, checksum in sealed.items():
        if not (folder / name).exists() or _checksum(folder / name) != checksum:
            raise ValueError(
                f"expected {name} in {folder} as the run wrote it, got another or none; {again}"
            )
    return list(sealed)


def _checksum(path: epath.Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
