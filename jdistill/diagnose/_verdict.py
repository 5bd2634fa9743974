"""Result of a diagnosis: the verdict, its checks, and the attacks behind it."""

import dataclasses
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from jdistill import _validate
from jdistill._words import percent
from jdistill.metrics import Interval
from jdistill.typing import Norm

Label = Literal["masked", "weak attack", "no sign of masking", "inconclusive"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One piece of evidence.

    Attributes:
        name: such as `"zero_gradients"`; fixed, for programs.
        title: for people.
        outcome: `"masked"` (on its own enough to distrust the naive number), `"clear"`,
            `"undecided"` or `"not run"`.
        figures: numbers by name; shares in `[0, 1]` unless the name says otherwise.
        threshold: what the figures were compared with, in words.
        finding: one sentence.
        source: the paper that the check is from.
    """

    name: str
    title: str
    outcome: str
    figures: Mapping[str, float]
    threshold: str
    finding: str
    source: str


@dataclasses.dataclass(frozen=True)
class Attempt:
    """One attack of those that the worst case is over.

    Attributes:
        name: of the attack.
        robust_accuracy: share of all examples right after this attack and all before it.
        settings: its settings, and the examples it was run on, in words.
        access: what it uses of the network, as in `jdistill.attacks.Traits`.
        follows: what it climbs, likewise.
    """

    name: str
    robust_accuracy: Interval
    settings: str
    access: str | None = None
    follows: str | None = None


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Verdict on a network's robust accuracy: whether it is to be believed, and why.

    Attributes:
        label: `"masked"`: gradients hide examples that are there; do not trust the naive number.
            `"weak attack"`: no sign of that, and yet other attacks find many more at the same
            radius; report the worst case. `"no sign of masking"`: nothing that was tried speaks
            against the naive number. `"inconclusive"`: the budget spent cannot tell.
        reason: one sentence; for an inconclusive verdict it says what would tell.
        naive: robust accuracy under the usual attack, PGD-40 on the cross-entropy at T = 1 from
            one random start, with its 95% interval.
        worst_case: share of the examples right under everything that was tried at `eps`.
        clean: accuracy without an attack.
        eps: radius, in input units.
        norm: of the radius.
        num_examples: all of them count in the three shares.
        num_nonfinite: examples whose clean logits are not finite; they count as wrong.
        attacks: what was tried, in order.
        checks: the evidence.
        budget: what was tried, in one line.
    """

    label: Label
    reason: str
    naive: Interval
    worst_case: Interval
    clean: Interval
    eps: float
    norm: Norm
    num_examples: int
    num_nonfinite: int
    attacks: tuple[Attempt, ...]
    checks: tuple[Check, ...]
    budget: str

    def check(self, name: str) -> Check:
        """The check of this name.

        Raises:
            ValueError: there is none.
        """
        for check in self.checks:
            if check.name == name:
                return check
        names = ", ".join(check.name for check in self.checks)
        raise ValueError(f"expected the name of a check, got {name!r}; pick one of {names}")

    def as_dict(self) -> dict[str, Any]:
        """The verdict as plain JSON values; `from_dict` reads it."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name in ("naive", "worst_case", "clean"):
            plain[name] = plain[name]._asdict()
        plain["attacks"] = [
            {**vars(attempt), "robust_accuracy": attempt.robust_accuracy._asdict()}
            for attempt in self.attacks
        ]
        plain["checks"] = [
            {**dataclasses.asdict(check), "figures": dict(check.figures)} for check in self.checks
        ]
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Verdict":
        """The verdict that `as_dict` made the values of.

        Raises:
            ValueError: the values are of something else.
        """
        _fields(cls, values, "a verdict")
        _choice("label", values["label"], get_args(Label))
        for name in ("eps", "num_examples", "num_nonfinite"):
            _number(name, values[name])
        shares = {name: _interval(name, values[name]) for name in ("naive", "worst_case", "clean")}
        for name in ("attacks", "checks"):
            _validate.sequence(**{f"{name} of a verdict": values[name]})
        attacks = []
        for row in values["attacks"]:
            _fields(Attempt, row, "an attack of a verdict", optional=("access", "follows"))
            name = f"robust_accuracy of {row['name']}"
            attacks.append(
                Attempt(**{**row, "robust_accuracy": _interval(name, row["robust_accuracy"])})
            )
        for row in values["checks"]:
            _fields(Check, row, "a check of a verdict")
            _choice(f"outcome of {row['name']}", row["outcome"], _OUTCOMES)
            _validate.mapping(**{f"figures of {row['name']}": row["figures"]})
            for name, value in row["figures"].items():
                if value is not None:
                    _number(f"{name} of {row['name']}", value)
        checks = tuple(Check(**row) for row in values["checks"])
        return cls(**{**values, **shares, "attacks": tuple(attacks), "checks": checks})

    def __str__(self) -> str:
        spoke = [check for check in self.checks if check.outcome in ("masked", "undecided")]
        lines = [
            f"{self.label}: {self.reason}",
            f"  clean      {_share(self.clean)}",
            f"  naive      {_share(self.naive)}   PGD-40 on the cross-entropy at T = 1",
            f"  worst case {_share(self.worst_case)}   of everything tried",
            *(f"  {check.name}, {check.outcome}: {check.finding}" for check in spoke),
        ]
        for outcome in ("clear", "not run"):
            names = [check.name for check in self.checks if check.outcome == outcome]
            if names:
                lines.append(f"  {outcome}: {', '.join(names)}")
        lines.append(f"  budget: {self.budget}")
        return "\n".join(_wrapped(line) for line in lines)


_OUTCOMES = ("masked", "clear", "undecided", "not run")
_AGAIN = "make the verdict again with this version of jdistill.diagnose"


def _fields(kind: Any, values: Any, what: str, *, optional: Sequence[str] = ()) -> None:
    """The values are those of a dataclass."""
    names = [field.name for field in dataclasses.fields(kind)]
    given = set(values) if isinstance(values, Mapping) else None
    if given is None or not set(names) - set(optional) <= given <= set(names):
        wrong = type(values).__name__ if given is None else _difference(given, set(names))
        raise ValueError(f"expected {what} with {', '.join(names)}, got {wrong}; {_AGAIN}")


def _difference(given: set[str], names: set[str]) -> str:
    missing, more = sorted(names - given), sorted(given - names)
    return " and ".join(
        [*(f"none named {name}" for name in missing), *(f"{name} beside them" for name in more)]
    )


def _choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"expected {name} among {', '.join(choices)}, got {value!r}; {_AGAIN}")


def _number(name: str, value: Any) -> None:
    if isinstance(value, (str, bool)) or not isinstance(value, (int, float)):
        raise ValueError(f"expected {name} to be a number, got {value!r}; {_AGAIN}")
    if not math.isfinite(value):
        raise ValueError(f"expected {name} to be finite, got {value!r}; {_AGAIN}")


def _interval(name: str, value: Any) -> Interval:
    """An interval of shares."""
    if not isinstance(value, Mapping) or set(value) != set(Interval._fields):
        raise ValueError(f"expected {name} with value, low, high, got {value!r}; {_AGAIN}")
    for end, number in value.items():
        _number(f"{end} of {name}", number)
        if not 0 <= number <= 1:
            raise ValueError(f"expected {end} of {name} in [0, 1], got {number!r}; {_AGAIN}")
    return Interval(**value)


def _share(interval: Interval) -> str:
    """A share in percent with its interval."""
    value, low, high = map(percent, interval)
    return f"{value:>6} [{low}, {high}]"


def _wrapped(line: str) -> str:
    """The line in lines of at most 100 characters."""
    return textwrap.fill(line, 100, subsequent_indent="    ", break_on_hyphens=False)
