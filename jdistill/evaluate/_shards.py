"""Results of attacks on one network and one batch, kept so that each is computed once."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jdistill import _entries
from jdistill._entries import Store
from jdistill.attacks import AttackResult
from jdistill.evaluate._runs import Place, Unit

_INFO = "info."
_PART = ".part"  # of a shard's name: how far the attack is that makes it


class Piece(NamedTuple):
    """Result of an attack on one network and one batch; every leaf leads with its rows."""

    result: AttackResult
    finite: np.ndarray  # whether the network's logits are, on what the attack returned
    predictions: np.ndarray  # the class of the largest


class Shards(NamedTuple):
    """A store, and what each place's shard is called and must say of itself."""

    store: Store
    names: Mapping[Place, str]
    settings: Mapping[Place, Mapping[str, Any]]

    def read(self, place: Place) -> Piece | None:
        """The place's shard; None where it is missing or damaged.

        Raises:
            ValueError: it was made with other settings.
        """
        shard = _entries.read(self.store, self.names[place], self.settings[place])
        if shard is None:
            return None
        info = {key[len(_INFO) :]: shard.pop(key) for key in list(shard) if key.startswith(_INFO)}
        finite, predictions = shard.pop("finite"), shard.pop("predictions")
        return Piece(AttackResult(**shard, info=info), finite, predictions)  # type: ignore[arg-type]

    def read_part(self, place: Place) -> np.ndarray | None:
        """State of a stopped run at the place; None where nothing that fits was kept."""
        name = self.names[place] + _PART
        shard = _entries.read(self.store, name, self.settings[place], strict=False)
        return None if shard is None else shard["part"]

    def write_part(self, place: Place, part: np.ndarray) -> None:
        """Keep how far the attack is with the place."""
        name = self.names[place] + _PART
        _entries.write(self.store, name, self.settings[place], {"part": part})

    def write(self, place: Place, piece: Piece) -> None:
        """Keep a place's result."""
        arrays = piece.result._asdict()
        info = arrays.pop("info")
        arrays |= {"finite": piece.finite, "predictions": piece.predictions}
        arrays |= {_INFO + name: info[name] for name in info}
        _entries.write(self.store, self.names[place], self.settings[place], arrays)
        self.store.pop(self.names[place] + _PART, None)


def work(
    units: Iterable[Unit],
    compute: Callable[[Unit], Mapping[Place, Piece]],
    shards: Shards | None,
    announce: Callable[[Unit], None],
) -> dict[Place, Piece]:
    """Read the units' shards, and compute and keep those that are not there."""
    pieces: dict[Place, Piece] = {}
    for unit in units:
        known = {place: shards.read(place) if shards else None for place in unit.places}
        if None in known.values():
            # Under vmap the others of the unit are computed again: one program fits all.
            for place, piece in compute(unit).items():
                if known[place] is None:
                    if shards:
                        shards.write(place, piece)
                    known[place] = piece
        pieces |= {place: piece for place, piece in known.items() if piece is not None}
        announce(unit)
    return pieces
