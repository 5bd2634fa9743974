"""Hosts that must agree, and that wait for each other."""

from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jdistill import _validate
from jdistill._fingerprint import fingerprint


def check_same(**values: Any) -> None:
    """An error, on every host, where a host has another value than host 0.

    Every process calls it with the same names in the same order; with one process it does nothing.
    Arrays are compared by their content (those without an axis by their value), functions by code.

    Args:
        **values: settings, arrays, or networks, by the name that a message gives them.

    Raises:
        ValueError: the hosts differ; names the first value that does, and the hosts.

    Example:
        >>> check_same(batch_size=128)
    """
    if jax.process_count() == 1:
        return
    digests = [list(bytes.fromhex(fingerprint(each))) for each in values.values()]
    # [hosts, values, bytes]
    found = np.asarray(multihost_utils.process_allgather(np.array(digests, np.uint8)))
    differs = (found != found[:1]).any(axis=2)
    if not differs.any():
        return
    place = int(differs.any(axis=0).argmax())
    hosts = ", ".join(map(str, np.flatnonzero(differs[:, place])))
    name = list(values)[place].replace("_", " ")
    raise ValueError(
        f"expected the same {name} on all {len(found)} hosts, got another on host {hosts} than on "
        "host 0; start the same command, with the same versions and data, on every host"
    )


def barrier(name: str) -> None:
    """Wait until every process has come here; with one process, nothing.

    Args:
        name: of the place, the same in every process.

    Raises:
        ValueError: the name is no text.

    Example:
        >>> barrier("tables written")
    """
    _validate.text(name=name)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"jdistill: {name}")
