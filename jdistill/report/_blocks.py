"""What a report consists of, before it is HTML or Markdown.

Both are made from the same `Page`, so neither says what the other does not.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from etils import epath


class Cell(NamedTuple):
    """A cell of a table: its value, and in small print its range or its id."""

    text: str
    small: str = ""


class Group(NamedTuple):
    """Lines of a table that belong together; `name` spans them where the table is grouped."""

    name: str
    lines: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Words:
    """Paragraphs; a note is in small print."""

    kind: ClassVar[str] = "words"
    paragraphs: tuple[str, ...]
    note: bool = False


@dataclass(frozen=True)
class Heading:
    """A heading inside a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        label: What it shows, for a reader who hears it.
        heads: The name and the unit of each column.
        groups: Its lines. Where `grouped`, the first column is the groups' names.
        left: How many columns (after the groups') are names, and not numbers.
    """

    kind: ClassVar[str] = "table"
    label: str
    heads: tuple[tuple[str, str], ...]
    groups: tuple[Group, ...]
    grouped: bool = False
    left: int = 1


@dataclass(frozen=True)
class Pairs:
    """Names and values."""

    kind: ClassVar[str] = "pairs"
    label: str
    lines: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Picture:
    """A PNG file with its caption."""

    kind: ClassVar[str] = "picture"
    title: str
    caption: str
    alt: str
    path: epath.Path


class Card(NamedTuple):
    """A statement with an outcome: a check of the verdict, an item of the checklist.

    Attributes:
        title: What was asked.
        badge: What came out, in a word or two.
        tone: "good", "bad" or "open": how the badge looks.
        text: What was found.
        notes: The figures, the threshold, the source.
    """

    title: str
    badge: str
    tone: str
    text: str
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Cards:
    """A list of `Card`s."""

    kind: ClassVar[str] = "cards"
    items: tuple[Card, ...]


@dataclass(frozen=True)
class Items:
    """A list of sentences."""

    kind: ClassVar[str] = "items"
    items: tuple[str, ...]


@dataclass(frozen=True)
class Terms:
    """Terms and what they mean."""

    kind: ClassVar[str] = "terms"
    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Folded:
    """Blocks that a reader opens; on paper they are open, or left out."""

    kind: ClassVar[str] = "folded"
    title: str
    blocks: "tuple[Block, ...]"
    on_paper: bool = True


Block = Words | Heading | Table | Pairs | Picture | Cards | Items | Terms | Folded


class Section(NamedTuple):
    """A heading with what belongs under it; `anchor` is its address in the page."""

    title: str
    anchor: str
    blocks: tuple[Block, ...]


class Page(NamedTuple):
    """A report: what the first screen has, and the sections after it."""

    title: str
    lead: str
    answer: tuple[str, ...]
    hero: tuple[Picture, ...]
    sections: tuple[Section, ...]
