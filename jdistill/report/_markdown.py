"""The report as Markdown: the same blocks as the HTML, with the figures beside it."""

import re
from collections.abc import Iterable, Sequence

from etils import epath

from jdistill.report._blocks import (
    Block,
    Cards,
    Cell,
    Folded,
    Heading,
    Items,
    Page,
    Pairs,
    Picture,
    Table,
    Terms,
    Words,
)


def rendered(page: Page, folder: epath.Path) -> str:
    """The report as Markdown text.

    Args:
        page: What stands in it.
        folder: Where the file will lie; pictures are named from there.
    """
    parts = [f"# {_plain(page.title)}", _plain(page.lead), "## What was found"]
    parts += [_plain(paragraph) for paragraph in page.answer]
    parts += [_block(picture, folder) for picture in page.hero]
    for section in page.sections:
        parts.append(f"## {_plain(section.title)}")
        parts += [_block(block, folder) for block in section.blocks]
    parts.append("Written by jdistill. The numbers are in the CSV files beside this one.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(block: Block, folder: epath.Path) -> str:
    match block:
        case Words(paragraphs):
            return "\n\n".join(_plain(text) for text in paragraphs)
        case Heading(text):
            return f"### {_plain(text)}"
        case Table():
            return _table(block)
        case Pairs(_, lines):
            rows = [(Cell(name), Cell(value)) for name, value in lines]
            return _grid([("name", ""), ("value", "")], rows, 2) if rows else "Not recorded."
        case Picture():
            text = f"![{_plain(block.alt)}]({_address(block.path, folder)})"
            return f"{text}\n\n**{_plain(block.title)}.** {_plain(block.caption)}".rstrip()
        case Cards(cards):
            return "\n".join(
                _item(f"**{_plain(card.title)}** ({card.badge}): {_plain(card.text)}", card.notes)
                for card in cards
            )
        case Items(texts):
            return "\n".join(f"* {_plain(text)}" for text in texts)
        case Terms(terms):
            return "\n".join(f"* **{_plain(term)}**: {_plain(text)}" for term, text in terms)
        case Folded(title, blocks):
            inner = [_block(part, folder) for part in blocks]
            return "\n\n".join([f"### {_plain(title)}", *inner])


def _item(text: str, notes: Iterable[tuple[str, str]]) -> str:
    return "\n".join(
        [f"* {text.rstrip()}", *(f"  * {_plain(name)}: {_plain(note)}" for name, note in notes)]
    )


def _table(table: Table) -> str:
    rows = []
    for group in table.groups:
        for number, line in enumerate(group.lines):
            first = (Cell(group.name if number == 0 else ""),) if table.grouped else ()
            rows.append((*first, *line))
    return _grid(table.heads, rows, table.left + table.grouped)


def _grid(heads: Sequence[tuple[str, str]], rows: Iterable[Sequence[Cell]], left: int) -> str:
    marks = [":--" if number < left else "--:" for number in range(len(heads))]
    titles = [f"{name} ({unit})" if unit else name for name, unit in heads]
    lines = [titles, marks]
    lines += [
        [f"{cell.text} ({cell.small})" if cell.small else cell.text for cell in row] for row in rows
    ]
    return "\n".join(f"| {' | '.join(_plain(cell) for cell in line)} |" for line in lines)


def _address(path: epath.Path, folder: epath.Path) -> str:
    return path.relative_to(folder).as_posix().replace(" ", "%20")


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: names and settings come from outside."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", " ".join(str(text).split()))
