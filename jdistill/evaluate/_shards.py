"""What an attack did to one network on one batch, kept so that it is done only once."""

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import NamedTuple

import numpy as np

from jdistill import _fingerprint, _validate
from jdistill.attacks import AttackResult
from jdistill.evaluate._runs import Place, Unit

Store = MutableMapping[str, Mapping[str, np.ndarray]]

_log = logging.getLogger("jdistill")
_INFO = "info."
_PART = ".part"  # of a shard's name: how far the attack is that makes it


class Piece(NamedTuple):
    """What an attack did to one network on one batch; every leaf leads with its rows."""

    result: AttackResult
    finite: np.ndarray  # whether the network's logits are, on what the attack returned


class Shards(NamedTuple):
    """A store, and what each place's shard is called and must say of itself.

    A shard holds the result's arrays; `settings`, JSON of all that they depend on; `checksum`, of
    both.
    """

    store: Store
    names: Mapping[Place, str]
    settings: Mapping[Place, Mapping[str, object]]

    def read(self, place: Place) -> Piece | None:
        """The place's shard; None where it is missing or damaged.

        Raises:
            ValueError: it was made with other settings.
        """
        name = self.names[place]
        try:
            shard = dict(self.store[name])
        except KeyError:
            return None
        text, checksum = (str(shard.pop(entry, "")) for entry in ("settings", "checksum"))
        if not text or _checksum(text, shard) != checksum:
            _log.warning("shard %r is damaged; it is computed again", name)
            return None
        if text != self._text(place):
            found = _fingerprint.differences(json.loads(text), dict(self.settings[place]))
            raise ValueError(
                f"expected shard {name!r} to be of this run, got one with "
                f"{'; '.join(found[:5])}; pass the settings that it was made "
                "with, or delete the shard, and it is computed again"
            )
        info = {key[len(_INFO) :]: shard.pop(key) for key in list(shard) if key.startswith(_INFO)}
        finite = shard.pop("finite")
        return Piece(AttackResult(**shard, info=info), finite)  # type: ignore[arg-type]

    def read_part(self, place: Place) -> np.ndarray | None:
        """State of a stopped run at the place; None where nothing that fits was kept."""
        shard = self.store.get(self.names[place] + _PART)
        if shard is None or str(shard["settings"]) != self._text(place):
            return None
        arrays = {"part": np.asarray(shard["part"])}
        whole = str(shard["checksum"]) == _checksum(self._text(place), arrays)
        return arrays["part"] if whole else None

    def write_part(self, place: Place, part: np.ndarray) -> None:
        """Keep how far the attack is with the place."""
        self._put(self.names[place] + _PART, place, {"part": part})

    def write(self, place: Place, piece: Piece) -> None:
        """Keep a place's result."""
        arrays = piece.result._asdict()
        info = arrays.pop("info")
        arrays |= {"finite": piece.finite, **{_INFO + name: info[name] for name in info}}
        arrays = {name: np.asarray(values) for name, values in arrays.items()}
        self._put(self.names[place], place, arrays)
        self.store.pop(self.names[place] + _PART, None)

    def _put(self, name: str, place: Place, arrays: Mapping[str, np.ndarray]) -> None:
        text = self._text(place)
        marks = {"settings": np.array(text), "checksum": np.array(_checksum(text, arrays))}
        self.store[name] = {**arrays, **marks}

    def _text(self, place: Place) -> str:
        return json.dumps(self.settings[place], sort_keys=True)


class Progressed(NamedTuple):
    """The pieces at hand, and how many of them were computed and not read."""

    pieces: dict[Place, Piece]
    num_computed: int


def work(
    units: Iterable[Unit],
    compute: Callable[[Unit], Mapping[Place, Piece]],
    shards: Shards | None,
    announce: Callable[[Unit], None],
) -> Progressed:
    """Read the units' shards, and compute and keep those that are not there."""
    pieces: dict[Place, Piece] = {}
    num_computed = 0
    for unit in units:
        known = {place: shards.read(place) if shards else None for place in unit.places}
        if None in known.values():
            # Under vmap the others of the unit are computed again: one program fits all.
            for place, piece in compute(unit).items():
                if known[place] is None:
                    if shards:
                        shards.write(place, piece)
                    known[place] = piece
                    num_computed += 1
        pieces |= {place: piece for place, piece in known.items() if piece is not None}
        announce(unit)
    return Progressed(pieces, num_computed)


def share(units: list[Unit], host: int, num_hosts: int) -> list[Unit]:
    """One host's units: those of its index modulo the number of hosts."""
    _validate.count(num_hosts=num_hosts)
    _validate.count(minimum=0, host=host)
    if host >= num_hosts:
        raise ValueError(
            f"expected host in 0..{num_hosts - 1}, got {host}; number the hosts from 0, as "
            "jax.process_index() does"
        )
    return units[host::num_hosts]


def _checksum(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
