"""The results as a table for the terminal."""

import textwrap
from collections.abc import Callable, Iterable

from jdistill import _validate
from jdistill._words import count, decimals, eps_text, number, percent
from jdistill.report._networks import Network, Stat, attack_keys, networks
from jdistill.report._table import Row

_LEGEND = (
    "log10 S: log10 of mean |d softmax / d input| at T = 1. zero grad.: examples whose loss at "
    "T = 1 has an input gradient of exactly 0. mean, median: distance, over successes alone."
)


def summary(rows: Iterable[Row], *, width: int = 108) -> str:
    """The results as a plain-text table for a terminal.

    One line per temperature and generation: test accuracy, mean ``|logit|``, log10 of the softmax
    sensitivity, the share of examples whose input gradient is exactly zero, the success rate of
    every attack and, for minimum-norm attacks, the mean and median distance of their successes.
    With several seeds each entry is their mean, ± how far the furthest seed lies from it.

    Args:
        rows: of results.
        width: columns of the terminal. A table that is wider continues below itself.

    Returns:
        Lines of text, without a final newline.

    Raises:
        ValueError: a bad row; or there is no row.

    Example:
        >>> import functools
        >>> import jax.numpy as jnp, numpy as np
        >>> from jdistill import attacks, evaluate, nets, report
        >>> net = nets.callable_logits_fn(lambda w, x: x @ w, jnp.eye(2))
        >>> fgsm = functools.partial(attacks.fgsm, eps=0.6)
        >>> x, y = np.eye(2, dtype=np.float32), np.arange(2)
        >>> result = evaluate.evaluate(net, x, y, attacks={"fgsm": fgsm})
        >>> rows = report.tables([(result, [report.NetworkName("toy")])])["results"]
        >>> print(summary(rows))
        toy: 2 test examples, 1 seed
        <BLANKLINE>
                      test     mean  softmax     zero        FGSM
        T  network  acc. %  |logit|  log10 S  grad. %  linf 0.6 %
        -  -------  ------  -------  -------  -------  ----------
        1  teacher     100    0.500    −0.71        0         100
        ...
    """
    _validate.count(width=width)
    found = networks(rows)
    parts = []
    for dataset in dict.fromkeys(network.subject for network in found):
        parts.append(_summary_of([net for net in found if net.subject == dataset], width))
    return "\n\n".join(parts)


def _summary_of(found: list[Network], width: int) -> str:
    digits = 2 if max(int(net.num_test.mean) for net in found) >= 1000 else 1
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
        name = key.name
        success = [_percent_cell(hit.success if hit else None) for hit in made]
        groups.append([[name, limit, *success]])
        if key.eps is None:
            means = [hit.mean_distance if hit else None for hit in made]
            medians = [hit.median_distance if hit else None for hit in made]
            for label, stats in (("mean", means), ("median", medians)):
                cells = [_cell(stat, decimals) for stat in stats]
                groups[-1].append([name, f"{label} {key.norm}", *cells])
    seeds = sorted({seed for net in found for seed in net.seeds})
    title = (
        f"{found[0].subject}: {count(max(int(net.num_test.mean) for net in found), 'test example')}"
    )
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
    return _cell(stat, lambda share: percent(share, digits).rstrip("%"), scale=100)


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
