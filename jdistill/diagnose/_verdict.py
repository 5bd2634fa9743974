"""What a diagnosis returns: the verdict, its checks, and the attacks behind it."""

import dataclasses
import textwrap
from collections.abc import Mapping
from typing import Any, Literal

from jdistill.metrics import Interval
from jdistill.typing import Norm

Label = Literal["masked", "no sign of masking", "inconclusive"]


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
    """Whether a network's robust accuracy under the usual attack is to be believed, and why.

    Attributes:
        label: `"masked"`: the naive number is not to be believed. `"no sign of masking"`: nothing
            that was tried speaks against it. `"inconclusive"`: the budget spent cannot tell.
        reason: one sentence; for an inconclusive verdict it says what would tell.
        naive: robust accuracy under the usual attack, PGD-40 on the cross-entropy at T = 1 from
            one random start, with its 95 % interval.
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
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(values, Mapping) or set(values) != set(names):
            got = sorted(values) if isinstance(values, Mapping) else type(values).__name__
            raise ValueError(
                f"expected a verdict with {', '.join(names)}, got {got}; pass what as_dict returned"
            )
        shares = {name: Interval(**values[name]) for name in ("naive", "worst_case", "clean")}
        attacks = tuple(
            Attempt(**{**row, "robust_accuracy": Interval(**row["robust_accuracy"])})
            for row in values["attacks"]
        )
        checks = tuple(Check(**row) for row in values["checks"])
        return cls(**{**values, **shares, "attacks": attacks, "checks": checks})

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


def _share(interval: Interval) -> str:
    """A share in percent with its interval."""
    value, low, high = (f"{100 * number:.1f}" for number in interval)
    return f"{value:>5} % [{low}, {high}]"


def _wrapped(line: str) -> str:
    """The line in lines of at most 100 characters, no number apart from its percent sign."""
    line = line.replace(" %", "\u00a0%")
    # A non-breaking space is none to textwrap.
    line = textwrap.fill(line, 100, subsequent_indent="    ", break_on_hyphens=False)
    return line.replace("\u00a0", " ")
