"""Files of an export: written whole, and checked when they are read."""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from jdistill import _files
from jdistill._files import PathLike
from jdistill.typing import Array

FORMAT = 1


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def checksum(config: Mapping[str, Any]) -> str:
    """Hash of all that a configuration says."""
    rest = {name: value for name, value in config.items() if name != "sha256"}
    return sha256(json.dumps(rest, sort_keys=True).encode())


def write(folder: epath.Path, config: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    """The configuration last: with it a folder is an export, and without it none."""
    (folder / "config.json").unlink(missing_ok=True)
    for name, data in files.items():
        if data:
            _files.write_whole(folder / name, data)
        else:
            (folder / name).unlink(missing_ok=True)
    _files.write_whole(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())


def check_free(folder: epath.Path) -> None:
    """No other configuration, such as a study's, would be overwritten."""
    place = folder / "config.json"
    try:
        is_export = "probe_logits" in json.loads(place.read_bytes())
    except FileNotFoundError:
        return
    except ValueError:
        is_export = False
    if not is_export:
        raise ValueError(
            f"expected a folder for an export alone, got {folder}, whose config.json is of another "
            "kind; choose another folder, or delete that file"
        )


def read_config(path: PathLike) -> tuple[epath.Path, dict[str, Any]]:
    """The folder, and its configuration, whose checksum holds."""
    folder = _files.as_path(path)
    place = folder / "config.json"
    try:
        text = place.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(
            f"expected the folder of an export, got {folder}, which has no config.json; check the "
            "path, or write one with export.save"
        ) from None
    try:
        config = json.loads(text)
    except ValueError:
        raise _damaged(place, "no JSON") from None
    number = config.get("format") if isinstance(config, dict) else None
    if number is None:
        raise ValueError(
            f"expected the configuration of an export, got another one in {place}; pass the folder "
            "that export.save wrote"
        )
    if number != FORMAT:
        raise ValueError(
            f"expected an export of format {FORMAT}, got {number!r} in {place}; install a version "
            "of jdistill that knows it"
        )
    if config.get("sha256") != checksum(config):
        raise _damaged(place, "another content than its checksum says")
    return folder, config


def read_file(folder: epath.Path, record: Mapping[str, Any]) -> bytes:
    """The content of a file of the configuration, whose checksum holds."""
    place = folder / record["file"]
    try:
        data = place.read_bytes()
    except FileNotFoundError:
        raise _damaged(place, "no file") from None
    if sha256(data) != record["sha256"]:
        raise _damaged(place, "another content than its checksum in config.json says")
    return data


def read_weights(folder: epath.Path, config: Mapping[str, Any]) -> dict[str, Array]:
    """The weights by their paths."""
    record = config["weights"]
    data = read_file(folder, record)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as held:
            return {
                name: jnp.asarray(held[name].view(jnp.dtype(spec["dtype"])))
                for name, spec in record["arrays"].items()
            }
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise _damaged(folder / record["file"], f"unreadable content ({error})") from error


def program_of(folder: epath.Path, config: Mapping[str, Any]) -> Any:
    """The entry of the program, which an export may lack."""
    if config["program"] is None:
        raise ValueError(
            f"expected an export with a program, got {folder}, which was written with "
            "stablehlo=False; use export.load"
        )
    return config["program"]


def _damaged(place: epath.Path, what: str) -> ValueError:
    return ValueError(
        f"expected {place} as export.save wrote it, got {what}: the file is damaged; copy the "
        "whole folder again, or write it again with export.save"
    )
