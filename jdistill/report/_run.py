"""What a run has, as the checklist asks for it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jdistill.report import _text
from jdistill.report._networks import AttackKey, Network, attack_keys
from jdistill.report._table import Row
from jdistill.report._verdicts import Judged


@dataclass(frozen=True)
class Run:
    """What the rules look at."""

    found: Sequence[Network]
    judged: Sequence[Judged]
    measures: Mapping[str, Sequence[Row]]
    config: Mapping[str, Any]
    has_weights: bool

    @property
    def keys(self) -> list[AttackKey]:
        return attack_keys(self.found)

    def tried(self, fact: str, *values: str) -> list[str]:
        """The attacks, of `results.csv` and of the verdicts, of which a fact is one of the values.

        Args:
            fact: `"access"` or `"follows"`.
            *values: of the fact.
        """
        made = [(_text.attack_name(key), getattr(key.facts, fact)) for key in self.keys]
        for item in self.judged:
            attacks = [attack for found in item.verdicts for attack in found["attacks"]]
            made += [(str(attack["name"]), attack.get(fact)) for attack in attacks]
        return list(dict.fromkeys(name for name, value in made if value in values))

    def check(self, *names: str) -> str:
        """What the verdicts' checks of these names found; nothing where none was run."""
        made = [
            check
            for item in self.judged
            for found in item.verdicts
            for check in found["checks"]
            if check["name"] in names and check["outcome"] != "not run"
        ]
        if not made:
            return ""
        bad = sum(check["outcome"] == "masked" for check in made)
        open_ones = sum(check["outcome"] == "undecided" for check in made)
        text = _text.count(len(made), "check")
        if bad:
            worst = next(check for check in made if check["outcome"] == "masked")
            which = "it" if len(made) == 1 else f"{bad} of them"
            which += " points" if bad == 1 else " point"
            return f"{text}: {which} to masking. {_text.sentence(worst['finding'])}"
        if open_ones:
            return f"{text}: none points to masking, {open_ones} could not be decided."
        return f"{text}: none points to masking."

    def curves(self, curve: str) -> dict[tuple[Any, ...], list[tuple[float, float]]]:
        """The points of each curve of one network, seed and attack, from left to right."""
        found: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
        for row in self.measures["curves"]:
            if row["curve"] == curve:
                network = tuple(
                    row[name] for name in ("dataset", "temperature", "seed", "generation")
                )
                attack = tuple(row[name] for name in ("attack", "norm", "eps"))
                point = (float(row["x"]), float(row["robust_accuracy"]))
                found.setdefault((network, attack), []).append(point)
        return {key: sorted(points) for key, points in found.items()}
