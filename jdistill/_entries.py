"""Checked entries of a store: arrays, what they were made of, and a checksum of both."""

import hashlib
import json
import logging
from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np

from jdistill import _fingerprint

Store = MutableMapping[str, Mapping[str, np.ndarray]]

_MARKS = ("settings", "checksum")
_log = logging.getLogger("jdistill")


def write(store: Store, name: str, settings: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Keep arrays under a name.

    Args:
        store: a dict or a `runtime.ShardFolder`.
        name: of the entry.
        settings: JSON-able, all that the arrays depend on.
        arrays: by name.
    """
    arrays = {key: np.asarray(values) for key, values in arrays.items()}
    text = _text(settings)
    marks = {"settings": np.array(text), "checksum": np.array(_checksum(text, arrays))}
    store[name] = {**arrays, **marks}


def read(
    store: Store, name: str, settings: Mapping[str, Any], *, strict: bool = True
) -> dict[str, np.ndarray] | None:
    """The arrays of an entry; None where it is missing or damaged.

    Args:
        store: where it was written.
        name: likewise.
        settings: what it must have been made of.
        strict: whether an entry of other settings is an error, or as good as missing.

    Raises:
        ValueError: it was made with other settings; says with which.
    """
    try:
        entry = dict(store[name])
    except KeyError:
        return None
    text, checksum = (str(entry.pop(mark, "")) for mark in _MARKS)
    if not text or _checksum(text, entry) != checksum:
        _log.warning("shard %r is damaged; it is computed again", name)
        return None
    if text == _text(settings):
        return entry
    if not strict:
        return None
    found = _fingerprint.differences(json.loads(text), json.loads(_text(settings)), "this run's")
    raise ValueError(
        f"expected shard {name!r} to be of this run, got one whose {'; '.join(found[:5])}; pass "
        "the settings that it was made with, or delete the shard, and it is computed again"
    )


def _text(settings: Mapping[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def _checksum(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
