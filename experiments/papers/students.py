"""Students of several chains side by side: TAKD, the ladder of sizes, standardized logits.

TAKD (Mirzadeh et al. 2020): a small student alone, from a large teacher, and through an assistant.
The ladder puts such shrinking chains beside equal ones at each temperature of defensive
distillation. The students of standardized logits learn from a loss that does not see the logits'
scale, which is what masks gradients after defensive distillation.
"""

from typing import Any

from experiments.papers.measures import (
    Line,
    Row,
    Source,
    difference,
    named,
    per_seed,
    shown,
)

# CIFAR-10 accuracy, of the tuner's best by test accuracy.
PLAIN = {"no distillation": "70.16", "distillation": "72.57", "assistant": "73.51"}
RESNET = {"no distillation": "88.52", "distillation": "88.65", "assistant": "88.98"}
RESNET26 = {"no distillation": "86.02", "distillation": "86.66", "assistant": "88.01"}

_QUANTITIES = {
    "test_accuracy": ("test accuracy (%)", 2, 100.0),
    "mean_abs_logit": ("mean abs. logit", 1, 1.0),
    "zero_gradient_fraction": ("zero gradients (%)", 1, 100.0),
    "fgsm": ("accuracy under FGSM (%)", 1, 100.0),
    "autoattack": ("under AutoAttack (%)", 1, 100.0),
}


def accuracies(source: Source) -> list[Row]:
    """Test accuracy of each chain's student, by seed."""
    clean = {
        (network.chain, *named(network._asdict()).values()): found.accuracy[0].value
        for network, found in source.clean()
    }
    return [
        {"chain": name, "temperature": T, "seed": seed, "test_accuracy": accuracy}
        for name, place in source.study.students().items()
        for (chain, T, seed, generation), accuracy in clean.items()
        if (chain, generation) == place
    ]


def students(source: Source) -> list[Row]:
    """Rows of each chain's student, by temperature and seed, out of the study's own results."""
    results, verdicts = source.rows("results"), source.rows("verdicts")
    rows: list[Row] = []
    for name, (chain, generation) in source.study.students().items():
        found: dict[Any, Row] = {}
        for row in results:
            if ((row.get("chain") or ""), row["generation"]) != (chain, generation):
                continue
            place = row["temperature"], row["seed"]
            own = {column: row[column] for column in _QUANTITIES if column in row}
            found.setdefault(
                place, {"chain": name, "temperature": place[0], "seed": place[1], **own}
            )
            found[place][row["attack"]] = 1.0 - row["success_rate"]
        for row in verdicts:
            place = row["temperature"], row["seed"]
            if ((row.get("chain") or ""), row["generation"]) == (chain, generation):
                found[place]["verdict"] = row["verdict"].label
        rows += [{"verdict": "", **found[place]} for place in sorted(found)]
    return rows


def takd_table(rows: list[Row], published: dict[str, str]) -> list[Any]:
    """Accuracy of the student by chain, and the differences of the order that TAKD claims."""
    values = {
        chain: [100 * row["test_accuracy"] for row in rows if row["chain"] == chain]
        for chain in dict.fromkeys(row["chain"] for row in rows)
    }
    lines = [["student", "test accuracy (%)", "against the line above", "published, CIFAR-10"]]
    before = None
    for chain, own in values.items():
        against = difference(own, values[before], 2) if before else ""
        lines.append([chain, shown(own, 2, share=True), against, published.get(chain, "–")])
        before = chain
    return [lines]


def plain_table(rows: list[Row]) -> list[Any]:
    """Beside the plain CNNs 10, 4, 2."""
    return takd_table(rows, PLAIN)


def resnet_table(rows: list[Row]) -> list[Any]:
    """Beside ResNets 110, 20, 8."""
    return takd_table(rows, RESNET)


def resnet26_table(rows: list[Row]) -> list[Any]:
    """Beside ResNets 26, 14, 8."""
    return takd_table(rows, RESNET26)


def grid_table(rows: list[Row]) -> list[Any]:
    """Every quantity of every chain's student by temperature, and what an assistant changes."""
    chains = list(dict.fromkeys(row["chain"] for row in rows))
    lines: list[Line] = [
        ["T", "student", *(title for title, _, _ in _QUANTITIES.values()), "verdict"]
    ]
    for T in sorted({row["temperature"] for row in rows}):
        for chain in chains:
            own = [row for row in rows if (row["temperature"], row["chain"]) == (T, chain)]
            labels = [row["verdict"] for row in own if row["verdict"]]
            cells = [
                shown([scale * row[name] for row in own], digits, share=scale == 100)
                for name, (_, digits, scale) in _QUANTITIES.items()
            ]
            lines.append([f"{T:g}", chain, *cells, labels[0] if labels else "–"])
    return [lines, _effects(rows, chains)]


def _effects(rows: list[Row], chains: list[str]) -> list[Line]:
    """Differences between chains over all temperatures, paired by seed."""
    names = ("test_accuracy", "autoattack", "zero_gradient_fraction")
    lines = [["over all T", *(f"{_QUANTITIES[name][0]}" for name in names)]]
    for pair in zip(chains[1:], chains, strict=False):
        cells = []
        for name in names:
            _, digits, scale = _QUANTITIES[name]
            one, base = (
                per_seed((row for row in rows if row["chain"] == chain), name, scale)
                for chain in pair
            )
            cells.append(difference(one, base, digits))
        lines.append([" − ".join(pair), *cells])
    return lines
