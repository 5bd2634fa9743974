"""DeiT on few examples: transformers alone, from convolutional teachers, and from transformers."""

from typing import Any

from experiments.papers.measures import Line, Row, difference, per_seed, shown

# ImageNet top-1 of DeiT-Ti, from RegNetY-16GF; without a teacher, and by chain.
PUBLISHED = {
    "no teacher": "72.2",
    "soft": "72.2",
    "hard": "74.3",
    "hard, token": "74.5",
}
_QUANTITIES = {
    "test_accuracy": ("test accuracy (%)", 2),
    "autoattack": ("under AutoAttack (%)", 1),
}


def table(rows: list[Row]) -> list[Any]:
    """Each chain's student, and how far it is from the transformer without a teacher."""
    first, *_ = chains = list(dict.fromkeys(row["chain"] for row in rows))
    lines: list[Line] = [
        [
            "student",
            *(head for title, _ in _QUANTITIES.values() for head in (title, f"− {first}")),
            "verdict",
            "published, DeiT-Ti on ImageNet (%)",
        ]
    ]
    for chain in chains:
        own = [row for row in rows if row["chain"] == chain]
        cells = []
        for name, (_, digits) in _QUANTITIES.items():
            values, base = (
                per_seed((row for row in rows if row["chain"] == each), name, 100.0)
                for each in (chain, first)
            )
            cells.append(shown([100 * row[name] for row in own], digits, share=True))
            cells.append("" if chain == first else difference(values, base, digits))
        verdicts = [row["verdict"] for row in own if row["verdict"]]
        lines.append([chain, *cells, verdicts[0] if verdicts else "–", PUBLISHED.get(chain, "–")])
    return [lines]
