"""Names, numbers as people read them, and the table for the terminal."""

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence

from jdistill import _validate
from jdistill.report._networks import Attacked, AttackKey, Network, Stat, attack_keys, networks
from jdistill.report._table import Row

_NORMS = {"linf": "l∞", "l2": "l2", "l1": "l1", "l0": "l0"}


def attack_name(key: AttackKey) -> str:
    """The attack as readers know it; its own name where the rows have no title."""
    return key.facts.title or key.attack.replace("_", " ")


def norm_name(norm: str) -> str:
    """The norm as readers know it."""
    return _NORMS.get(norm, norm)


def budget(key: AttackKey) -> str:
    """The perturbation that the attack was allowed: "l∞ ≤ 0.1", or "smallest l2" without."""
    if key.has_no_norm:
        return "any size"
    if key.eps is None:
        return f"smallest {norm_name(key.norm)}"
    return f"{norm_name(key.norm)} ≤ {eps_text(key.eps)}"


def attack_label(key: AttackKey) -> str:
    """Name and budget: what identifies an attack beside others of the same report.

    >>> attack_label(AttackKey("new_attack", "linf", 8 / 255))
    'new attack (l∞ ≤ 8/255)'
    """
    return f"{attack_name(key)} ({budget(key)})"


def eps_text(eps: float) -> str:
    """A budget in few digits, as a fraction of 255 where that is what was meant.

    >>> eps_text(0.1), eps_text(8 / 255), eps_text(1.0), eps_text(0.031)
    ('0.1', '8/255', '1', '0.031')
    """
    levels = eps * 255
    if len(f"{eps:.5g}") > 6 and 0 < levels < 255 and abs(levels - round(levels)) < 1e-3:
        return f"{round(levels)}/255"
    return f"{eps:.4g}"


def percent(share: float, digits: int = 1) -> str:
    """A share as percent; "0" and "100" only when it is exactly that.

    >>> percent(1.0), percent(0.9999), percent(0.0301), percent(0.0), percent(1e-6)
    ('100', '>99.9', '3.0', '0', '<0.1')
    """
    if not math.isfinite(share):
        return "–"
    if share in (0.0, 1.0):
        return f"{100 * share:.0f}"
    text, step = f"{100 * share:.{digits}f}", 10.0**-digits
    if float(text) == 0:
        return f"<{step:.{digits}f}"
    if float(text) == 100:
        return f">{100 - step:.{digits}f}"
    return text


def points(difference: float, digits: int = 1) -> str:
    """A difference of shares in percentage points, with its sign.

    >>> points(0.002), points(-0.258), points(0.0), points(0.00001)
    ('+0.2', '−25.8', '0', '+0.0')
    """
    if not math.isfinite(difference):
        return "–"
    sign = "" if difference == 0 else "+" if difference > 0 else "−"
    return f"{sign}{abs(100 * difference):.{digits if difference else 0}f}"


def p_value(value: float) -> str:
    """A p-value as papers print it.

    >>> p_value(0.4), p_value(0.0231), p_value(2e-7)
    ('p = 0.4', 'p = 0.023', 'p < 0.001')
    """
    return "p < 0.001" if value < 0.001 else f"p = {value:.2g}"


def number(value: float, digits: int = 3) -> str:
    """A number in few significant digits, without an exponent where it stays readable.

    >>> number(482.3), number(1.8249), number(12345.6), number(0.00001234), number(-38.25)
    ('482', '1.82', '12,300', '1.23e-05', '-38.2')
    """
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if value == 0 or 1e-3 <= size < 1e7:
        decimals = digits if value == 0 else digits - 1 - math.floor(math.log10(size))
        rounded = round(value, decimals)
        return f"{rounded:,.{max(decimals, 0)}f}" if value else "0"
    return f"{value:.{digits - 1}e}"


def decimals(value: float) -> str:
    """A number with two decimals, for columns that are read against each other.

    >>> decimals(1.8249), decimals(-38.2)
    ('1.82', '-38.20')
    """
    return f"{value:.2f}" if math.isfinite(value) else "–"


def count(amount: int, noun: str) -> str:
    """A count with its noun.

    >>> count(1, "assistant"), count(10000, "example"), count(0, "assistant")
    ('1 assistant', '10,000 examples', 'no assistant')
    """
    return f"no {noun}" if amount == 0 else f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def of(amount: int, noun: str) -> str:
    """A count that a share refers to; the noun alone where the count was not recorded.

    >>> of(1000, "example"), of(0, "example")
    ('1,000 examples', 'the examples')
    """
    return count(amount, noun) if amount else f"the {noun}s"


def join(items: Sequence[str]) -> str:
    """Items as a sentence lists them.

    >>> join(["a"]), join(["a", "b"]), join(["a", "b", "c"])
    ('a', 'a and b', 'a, b and c')
    """
    return " and ".join(filter(None, [", ".join(items[:-1]), *items[-1:]]))


def attack_names(hits: Sequence[Attacked]) -> list[str]:
    """The attacks of some results, each once."""
    return list(dict.fromkeys(attack_name(hit.key) for hit in hits))


def teacher_name(network: Network, *, full: bool = False) -> str:
    """The teacher that students are compared with, as a sentence names it."""
    name = f"the teacher at T = {network.temperature:g}"
    if full and network.temperature == 1:
        name += ", an ordinarily trained network"
    return name


def range_of(stat: Stat) -> str:
    """Where the number may lie: over the seeds, or over the examples of one."""
    if not stat.low < stat.high:
        return ""
    ends = f"{percent(stat.low, 2)} to {percent(stat.high, 2)} %"
    if stat.seeds > 1:
        return f" (mean of {stat.seeds} seeds, {ends})"
    return f" (95 % interval {ends})"


def chain_name(generation: int) -> str:
    """A network by the length of its chain.

    >>> chain_name(0), chain_name(1), chain_name(3)
    ('the teacher', 'the student without an assistant', 'the student with 2 assistants')
    """
    if generation == 0:
        return "the teacher"
    if generation == 1:
        return "the student without an assistant"
    return f"the student with {count(generation - 1, 'assistant')}"


def line_name(generation: int) -> str:
    """A chain length, as a legend names it."""
    if generation == 0:
        return "teacher"
    return f"student, {count(generation - 1, 'assistant')}"


def network_name(network: Network) -> str:
    """A network as a sentence names it: its chain, and the temperature it was trained at."""
    return f"{chain_name(network.generation)} at T = {network.temperature:g}"


def line_break_safe(text: str) -> str:
    """Text with no line break between a number and its sign."""
    for words in (" %", "T = ", " = ", " ≤ ", "p < "):
        text = text.replace(words, words.replace(" ", "\N{NO-BREAK SPACE}"))
    return text


def sentence(text: str) -> str:
    """A text as a sentence: a capital in front, a full stop behind.

    >>> sentence("no gradient"), sentence("Done.")
    ('No gradient.', 'Done.')
    """
    text = text.strip()
    stop = "" if text.endswith((".", "!", "?")) else "."
    return f"{text[:1].upper()}{text[1:]}{stop}"


# --- The table for the terminal ------------------------------------------------------------------

_LEGEND = (
    "log10 S: log10 of mean |d softmax / d input| at T = 1. zero grad.: examples whose loss at "
    "T = 1 has an input gradient of exactly 0. mean, median: distance, over successes alone."
)


def summary(rows: Iterable[Row], *, width: int = 108) -> str:
    """The results as a plain-text table for a terminal.

    One line per temperature and generation: test accuracy, mean |logit|, log10 of the softmax
    sensitivity, the share of examples whose input gradient is exactly zero, the success rate of
    every attack and, for minimum-norm attacks, the mean and median distance of their successes.
    With several seeds each entry is their mean, ± how far the furthest seed lies from it.

    Args:
        rows: As for `write_results`.
        width: Columns of the terminal. A table that is wider continues below itself.

    Returns:
        Lines of text, without a final newline.

    Raises:
        ValueError: As `write_results`; or there is no row.
    """
    _validate.count(width=width)
    found = networks(rows)
    parts = []
    for dataset in sorted({network.dataset for network in found}):
        parts.append(_summary_of([net for net in found if net.dataset == dataset], width))
    return "\n\n".join(parts)


def _summary_of(found: list[Network], width: int) -> str:
    digits = 2 if max(net.num_test for net in found) >= 1000 else 1
    # Columns that belong together stay together when the table has to be broken.
    head = [
        ["", "T", *(f"{net.temperature:g}" for net in found)],
        ["", "network", *(net.role for net in found)],
    ]
    softmax = [_cell(net.log10_sensitivity_softmax, decimals) for net in found]
    groups = [
        [["test", "acc. %", *(_percent_cell(net.accuracy, digits) for net in found)]],
        [["mean", "|logit|", *(_cell(net.mean_abs_logit, number) for net in found)]],
        [["softmax", "log10 S", *softmax]],
        [["zero", "grad. %", *(_percent_cell(net.zero_gradients) for net in found)]],
    ]
    for key in attack_keys(found):
        made = [net.attacks.get(key) for net in found]
        limit = "success %" if key.eps is None else f"{key.norm} {eps_text(key.eps)} %"
        name = attack_name(key)
        success = [_percent_cell(hit.success if hit else None) for hit in made]
        groups.append([[name, limit, *success]])
        if key.eps is None:
            means = [hit.mean_distance if hit else None for hit in made]
            medians = [hit.median_distance if hit else None for hit in made]
            for label, stats in (("mean", means), ("median", medians)):
                cells = [_cell(stat, decimals) for stat in stats]
                groups[-1].append([name, f"{label} {key.norm}", *cells])
    seeds = sorted({seed for net in found for seed in net.seeds})
    title = f"{found[0].dataset}: {count(max(net.num_test for net in found), 'test example')}"
    title += f", {count(len(seeds), 'seed')}"
    if len(seeds) > 1:
        title += " (mean ± the seed furthest from it)"
    starts = [
        index == 0 or net.temperature != found[index - 1].temperature
        for index, net in enumerate(found)
    ]
    lines = [title]
    for block in _blocks(head, groups, width):
        lines += ["", *_draw(block, starts)]
    lines += ["", *textwrap.wrap(_LEGEND, width)]
    return "\n".join(lines)


def _cell(stat: Stat | None, form: Callable[[float], str], scale: float = 1) -> str:
    if stat is None or not stat.known:
        return "-"
    text = form(stat.mean)
    if stat.seeds == 1:
        return text
    places = len(text.partition(".")[2]) if "e" not in text else 2
    return f"{text} ±{scale * stat.spread:,.{places}f}"


def _percent_cell(stat: Stat | None, digits: int = 1) -> str:
    return _cell(stat, lambda share: percent(share, digits), scale=100)


def _blocks(
    head: list[list[str]], groups: list[list[list[str]]], width: int
) -> list[list[list[str]]]:
    """The columns in blocks no wider than the terminal, each led by temperature and network."""
    blocks = [[*head]]
    for group in groups:
        if len(_rule([*blocks[-1], *group])) > width and len(blocks[-1]) > len(head):
            blocks.append([*head])
        blocks[-1] += group
    return blocks


def _rule(columns: list[list[str]]) -> str:
    return "  ".join("-" * max(map(len, column)) for column in columns)


def _draw(columns: list[list[str]], starts: list[bool]) -> list[str]:
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for index in range(len(columns[0])):
        cells = [column[index] for column in columns]
        body = index - 2
        if body >= 0 and not starts[body]:
            cells[0] = ""  # the temperature stands once, on the first of its lines
        lines.append(
            "  ".join(
                cell.ljust(size) if position == 1 else cell.rjust(size)
                for position, (cell, size) in enumerate(zip(cells, widths, strict=True))
            ).rstrip()
        )
    return [*lines[:2], _rule(columns), *lines[2:]]
