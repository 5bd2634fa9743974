"""The pages of the repository, and the blocks of code in them."""

import pathlib
import re
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").rglob("*.md"),
        *(ROOT / "experiments").rglob("*.md"),
        *(ROOT / ".github").rglob("*.md"),
    ]
    if not {"_build", "copies", "generated", "results"} & set(path.parts)
)
CODE, OTHERS = {"python", "sh"}, {"", "text", "{eval-rst}", "{toctree}"}


class Block(NamedTuple):
    """A fenced block: its language, text, line, comment before it, and what it prints."""

    language: str
    text: str
    line: int
    comment: str
    printed: str | None
    tolerance: float


def blocks(page):
    """The blocks of a page, in their order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    pattern = r"(?:^<!-- (?P<comment>[^\n]*) -->\n)?^```(?P<language>[^\n]*)\n(?P<text>.*?)^```$"
    found = []
    for match in re.finditer(pattern, text, re.DOTALL | re.MULTILINE):
        language, comment = match["language"], match["comment"] or ""
        before = text[: match.start()].rstrip().rsplit("\n", 1)[-1]
        if language == "text" and before.endswith("It prints"):
            tolerance = float(comment.removeprefix("about: ") or 0)
            found[-1] = found[-1]._replace(printed=match["text"], tolerance=tolerance)
            continue
        line = text[: match.start("text")].count("\n") + 1
        found.append(Block(language, match["text"], line, comment, None, 0.0))
    return found


def code(page):
    """The blocks of code of a page."""
    return [block for block in blocks(page) if block.language in CODE]
