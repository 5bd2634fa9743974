"""The tables of a report: numbers as people read them, each with its range in small print."""

from collections.abc import Callable, Sequence
from itertools import groupby

from jdistill.report import _comparison_words, _measure_figures, _text, _verdict_words
from jdistill.report._blocks import Cell, Group, Table
from jdistill.report._measure_figures import Line, Matrix
from jdistill.report._networks import Attacked, AttackKey, Network, Stat, attack_keys, stat, widest
from jdistill.report._table import Row
from jdistill.report._verdicts import Judged, is_of

_NONE = Cell("–")
Cells = tuple[Cell, ...]


def results(found: Sequence[Network]) -> Table:
    """Everything in `results.csv`, one line a network."""
    keys = attack_keys(found)
    # What was attacked, and how, before what explains it: a narrow screen shows the left first.
    heads = [("Test accuracy", "%"), ("Zero gradients", "% of examples")]
    for key in keys:
        heads.append((f"{_text.attack_name(key)} success", f"%, {_text.budget(key)}"))
        if key.eps is None:
            norm = _text.norm_name(key.norm)
            heads.append((f"{_text.attack_name(key)} mean", f"{norm}, over successes"))
            heads.append((f"{_text.attack_name(key)} median", f"{norm}, over successes"))
    heads += [
        ("Mean |logit|", ""),
        ("Sensitivity of logits", "mean |∂Σz/∂x|"),
        ("Sensitivity of softmax", "log10 mean |∂p/∂x|"),
    ]

    def line(network: Network) -> Cells:
        cells = [_percent(network.accuracy, 2), _percent(network.zero_gradients, 1)]
        for key in keys:
            cells += _attack(key, network.attacks.get(key))
        return (
            *cells,
            _value(network.mean_abs_logit),
            _value(network.sensitivity_logits),
            _value(network.log10_sensitivity_softmax, fixed=True),
        )

    return _by_temperature("Results by temperature", found, heads, line)


def verdicts(judged: Sequence[Judged]) -> Table:
    """The two numbers and the verdict of every judged network."""
    heads = [
        ("Verdict", ""),
        ("The usual attack", "% accuracy"),
        ("Everything tried", "% accuracy"),
        ("No attack", "% accuracy"),
        ("Examples", ""),
    ]

    def line(network: Network) -> Cells:
        item = next(item for item in judged if item.network is network)
        numbers = [_percent(number, 1) for number in (item.naive, item.worst_case, item.clean)]
        nonfinite = max(int(found["num_nonfinite"]) for found in item.verdicts)
        small = f"{nonfinite:,} with NaN or infinite logits" if nonfinite else ""
        label = Cell(_verdict_words.label(item))
        return (label, *numbers, Cell(f"{item.num_examples:,}", small))

    title = f"Verdicts within {judged[0].budget}"
    return _by_temperature(title, [item.network for item in judged], heads, line, left=2)


def checks(judged: Sequence[Judged]) -> Table:
    """The outcome of every check, one column a network."""
    titles: dict[str, str] = {}
    for item in judged:
        for found in item.verdicts[item.shown]["checks"]:
            titles.setdefault(str(found["name"]), str(found["title"]))
    lines = []
    for name, title in titles.items():
        cells = [Cell(title)]
        for item in judged:
            own = [c for c in item.verdicts[item.shown]["checks"] if c["name"] == name]
            cells.append(Cell(str(own[0]["outcome"])) if own else _NONE)
        lines.append(tuple(cells))
    heads = [("Check", ""), *_network_heads([item.network for item in judged])]
    return Table("Outcome of each check", tuple(heads), (Group("", tuple(lines)),))


def attacks(found: Row) -> Table:
    """The attacks behind one verdict, with their settings."""
    lines = []
    for attack in found["attacks"]:
        share = widest([attack["robust_accuracy"]], "value")
        lines.append((Cell(str(attack["name"])), Cell(str(attack["settings"])), _percent(share, 1)))
    heads = (("Attack", ""), ("Settings", ""), ("Accuracy left", "%, after it and all before it"))
    return Table("Attacks of the verdict", heads, (Group("", tuple(lines)),), left=2)


def comparisons(claims: Sequence[_comparison_words.Claim]) -> Table:
    """The paired comparisons of chain lengths, with what they support."""
    lines = []
    for claim in claims:
        row, against = claim.row, int(claim.row["baseline_generation"])
        tested = _text.p_value(float(row["p_value"]))[2:] if row["p_value"] is not None else "–"
        line = (
            Cell(
                _text.sentence(_text.line_name(claim.network.generation))[:-1],
                f"against {_text.line_name(against)}",
            ),
            Cell(_text.sentence(_comparison_words.quantity(row))[:-1]),
            Cell(_text.sentence(claim.conclusion)[:-1]),
            Cell(_text.points(float(row["difference"]), 2), _comparison_words.interval(row)),
            Cell(tested.removeprefix("= ")),
            Cell(_comparison_words.over(row, claim.network)),
        )
        lines.append((f"{claim.network.temperature:g}", line))
    heads = (
        *(("T", ""), ("Network", ""), ("Quantity", ""), ("What follows", "")),
        *(("Difference", "points, 95 % interval"), ("p", ""), ("Over", "")),
    )
    groups = tuple(
        Group(name, tuple(cells for _, cells in lines))
        for name, lines in groupby(lines, key=lambda line: line[0])
    )
    return Table("Comparisons of chain lengths", heads, groups, grouped=True, left=3)


def curve(title: str, lines: Sequence[Line], head: str) -> Table:
    """The points of one attack's curve, one column a network."""
    places = sorted({float(x) for line in lines for x in line.x})
    body = []
    for place in places:
        cells = [Cell(_text.eps_text(place) if head == "eps" else f"{place:,.6g}")]
        for line in lines:
            at = dict(zip((float(x) for x in line.x), line.stats, strict=True)).get(place)
            cells.append(_percent(at, 1) if at else _NONE)
        body.append(tuple(cells))
    heads = [(head, ""), *_network_heads([line.network for line in lines])]
    return Table(title, tuple(heads), (Group("", tuple(body)),))


def bins(found: Sequence[Network], rows: Sequence[Row]) -> Table:
    """The histogram of the softmax sensitivity of every network."""
    edges = _measure_figures.bins(rows)
    heads = [(_measure_figures.bin_name(edge), "%") for edge in edges]

    def line(network: Network) -> Cells:
        shares = _measure_figures.shares(network, rows, edges)
        return tuple(Cell(_text.percent(float(share))) for share in shares)

    own = [net for net in found if any(is_of(row, net) for row in rows)]
    return _by_temperature("Share of examples by log10 of the sensitivity", own, heads, line)


def calibration(found: Sequence[Network], rows: Sequence[Row]) -> Table:
    """Calibration beside accuracy."""
    heads = [
        ("Test accuracy", "%"),
        ("Mean confidence", "%"),
        ("ECE", "%"),
        ("NLL", "nats"),
        ("Brier score", ""),
    ]

    def line(network: Network) -> Cells:
        own = [row for row in rows if is_of(row, network)]
        return (
            _percent(network.accuracy, 2),
            _percent(stat(own, "mean_confidence"), 2),
            _percent(stat(own, "ece"), 2),
            _value(stat(own, "nll")),
            _value(stat(own, "brier")),
        )

    own = [net for net in found if any(is_of(row, net) for row in rows)]
    return _by_temperature("Calibration", own, heads, line)


def distances(found: Sequence[Network], rows: Sequence[Row]) -> Table:
    """ρ_adv in each norm: the success rate, and mean and median over the successes."""
    own = [net for net in found if any(is_of(row, net) for row in rows)]
    keys = {
        _measure_figures.distance_key(row) for row in rows if any(is_of(row, net) for net in own)
    }
    keys_in_order = sorted(keys, key=lambda key: (key.norm, key.attack))
    heads = []
    for key in keys_in_order:
        norm, name = _text.norm_name(key.norm), _text.attack_name(key)
        heads += [(f"{norm} mean", name), (f"{norm} median", name), (f"{norm} success", "%")]

    def line(network: Network) -> Cells:
        cells = []
        for key in keys_in_order:
            for name in ("mean", "median", "success_rate"):
                value = _measure_figures.distance_stats(network, rows, key, name)
                share = name == "success_rate"
                cells.append(_percent(value, 1) if share else _value(value))
        return tuple(cells)

    return _by_temperature("Distance to the adversarial examples found", own, heads, line)


def transfer(matrix: Matrix) -> Table:
    """How adversarial examples of one generation do on another."""
    names = [_text.line_name(generation) for generation in matrix.generations]
    lines = []
    for source, name in zip(matrix.generations, names, strict=True):
        cells = [Cell(name)]
        for target in matrix.generations:
            found = matrix.stats.get((source, target))
            cells.append(_percent(found, 1) if found else _NONE)
        lines.append(tuple(cells))
    title = f"T = {matrix.temperature:g}, {_text.attack_label(matrix.key)}"
    heads = (("Crafted on", "judged on:"), *((name, "% success") for name in names))
    return Table(f"Transfer, {title}", heads, (Group("", tuple(lines)),))


def budgets(found: Sequence[Network]) -> Table:
    """What each attack was allowed and what it spent."""
    lines = []
    for key in attack_keys(found):
        hits = [net.attacks[key] for net in found if key in net.attacks]
        queries = [hit.mean_queries.mean for hit in hits if hit.mean_queries.known]
        spent = "–"
        if queries:
            ends = [_text.number(end) for end in (min(queries), max(queries))]
            spent = ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
        counts = sorted({hit.num_attacked for hit in hits})
        examples = [f"{end:,}" for end in dict.fromkeys(counts[:1] + counts[-1:])]
        none = "none" if key.has_no_norm else "none: minimum norm"
        lines.append(
            (
                Cell(_text.attack_name(key), key.attack),
                Cell(_text.norm_name(key.norm)),
                Cell(none if key.eps is None else _text.eps_text(key.eps)),
                Cell(" to ".join(examples)),
                Cell(spent),
            )
        )
    heads = (
        *(("Attack", ""), ("Norm", ""), ("Budget eps", ""), ("Examples", "")),
        ("Mean queries an example", ""),
    )
    return Table("Attacks and their budgets", heads, (Group("", tuple(lines)),))


def _by_temperature(
    label: str,
    found: Sequence[Network],
    heads: Sequence[tuple[str, str]],
    line: Callable[[Network], Cells],
    left: int = 1,
) -> Table:
    """A table with a line a network, the networks of a temperature together."""
    groups = [
        Group(
            f"{temperature:g}",
            tuple((Cell(net.role.capitalize()), *line(net)) for net in own),
        )
        for temperature, own in groupby(found, key=lambda net: net.temperature)
    ]
    every = (("T", ""), ("Network", ""), *heads)
    return Table(label, every, tuple(groups), grouped=True, left=left)


def _network_heads(found: Sequence[Network]) -> list[tuple[str, str]]:
    return [(f"T = {net.temperature:g}", _text.line_name(net.generation)) for net in found]


def _attack(key: AttackKey, hit: Attacked | None) -> list[Cell]:
    if hit is None:
        return [_NONE] * (3 if key.eps is None else 1)
    cells = [_percent(hit.success, 1)]
    if key.eps is None:
        cells += [_value(hit.mean_distance, fixed=True), _value(hit.median_distance, fixed=True)]
    return cells


def _percent(value: Stat, digits: int) -> Cell:
    ends = [_text.percent(end, digits) for end in (value.low, value.high)]
    return Cell(_text.percent(value.mean, digits), _ends(value, ends))


def _value(value: Stat, *, fixed: bool = False) -> Cell:
    form = _text.decimals if fixed else _text.number
    return Cell(form(value.mean), _ends(value, [form(value.low), form(value.high)]))


def _ends(value: Stat, ends: Sequence[str]) -> str:
    return f"{ends[0]} to {ends[1]}" if value.low < value.high and ends[0] != ends[1] else ""
