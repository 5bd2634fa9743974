"""The report as one HTML file that needs nothing beside it, and as Markdown."""

import base64
import importlib.resources
import struct
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from jdistill import _validate
from jdistill._files import PathLike, as_path, write_whole
from jdistill.report import _content, _markdown, _text
from jdistill.report._blocks import Page
from jdistill.report._figures import write_figures
from jdistill.report._measures import complete, read_measures
from jdistill.report._networks import networks, subjects
from jdistill.report._optional import check_packages, optional
from jdistill.report._pictures import load_pictures, write_picture_grid
from jdistill.report._settings import read_json
from jdistill.report._table import Row, checked, read_results, write_results


def write_report(
    workdir: PathLike,
    rows: Iterable[Row] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    pictures: Mapping[Any, Mapping[str, Any] | PathLike] | None = None,
    measures: Mapping[str, Iterable[Row]] | None = None,
) -> dict[str, epath.Path]:
    """Writes `results.csv`, `figures/*.png`, `report.html` and `report.md` into a workdir.

    Args:
        workdir: The folder; it is made. What is already there is replaced file by file.
        rows: As for `write_results`; None reads the workdir's `results.csv`.
        config: The settings of the experiment; None reads `config.json` if there is one.
        run: Versions, devices and times; None reads `run.json` if there is one.
        pictures: By temperature (or by a label of your own), what `write_picture_grid` takes:
            the path of an .npz, or its arrays.
        measures: What else was measured; None reads what the workdir has of it, as
            `read_measures` does. It is not written: `write_table` and `write_verdicts` do that.

    Returns:
        The path of everything written: `results`, `report`, `markdown`, and each figure by its
        name (`accuracy`, …, `pictures_T20`).

    Raises:
        FileNotFoundError: `rows` is None and the workdir has no `results.csv`.
        ModuleNotFoundError: matplotlib or jinja2 is missing.
        ValueError: As `write_results`, `read_measures` and `write_picture_grid`; there is no row;
            or something was measured of a network that has no row.
    """
    folder = as_path(workdir)
    _mappings(config=config, run=run, pictures=pictures, measures=measures)
    # Before anything is written, so that a missing package or a bad picture leaves no half report.
    check_packages()
    raw = read_results(folder / "results.csv") if rows is None else checked("results", rows)
    table = subjects(raw)
    more = complete(read_measures(folder) if measures is None else measures, networks(table))
    arrays = {key: load_pictures(value) for key, value in _content.in_order(pictures or {})}
    config = read_json(folder / "config.json") if config is None else config
    run = read_json(folder / "run.json") if run is None else run
    written = {}
    if rows is not None:
        written["results"] = write_results(folder / "results.csv", raw)
    figures = write_figures(table, folder / "figures", more)
    grids = {}
    for key, value in arrays.items():
        name = f"pictures_{_picture_name(key)}"
        path = folder / "figures" / f"{name}.png"
        grids[key] = written[name] = write_picture_grid(value, path)
    content = _content.page(
        table,
        more,
        config=config,
        run=run,
        figures=figures,
        pictures=grids,
        has_weights=(folder / "checkpoints").exists(),
    )
    page = _rendered(content)
    markdown = _markdown.rendered(content, folder)
    return {
        "results": folder / "results.csv",
        "report": write_whole(folder / "report.html", page.encode()),
        "markdown": write_whole(folder / "report.md", markdown.encode()),
        **figures,
        **written,
    }


def write_html(
    path: PathLike,
    *,
    rows: Iterable[Row],
    measures: Mapping[str, Iterable[Row]] | None = None,
    config: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    figures: Mapping[str, PathLike] | None = None,
    pictures: Mapping[Any, PathLike] | None = None,
) -> epath.Path:
    """Writes the report as one HTML file: no script, nothing loaded from elsewhere.

    It opens with the answer in words (see `answer`) and one figure. The verdict and the table
    follow, what else was measured, the pictures, the evidence of the verdict, the checklist, what
    each quantity means, what was run, and what the report does not show.

    Args:
        path: The file to write.
        rows: As for `write_results`.
        measures: What else was measured, as `read_measures` gives it.
        config: The settings of the experiment; nested mappings are listed as `outer.inner`.
        run: Versions, devices, times and whatever else is needed to run it again, likewise.
        figures: PNG files by the names that `write_figures` gives.
        pictures: PNG files by temperature, as `write_picture_grid` draws them.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: jinja2 is missing.
        ValueError: As `write_results` and `write_report`; or there is no row.
    """
    target = as_path(path)
    _mappings(config=config, run=run, figures=figures, pictures=pictures, measures=measures)
    content = _content.page(
        subjects(checked("results", rows)),
        measures,
        config=config or {},
        run=run or {},
        figures={name: as_path(figure) for name, figure in (figures or {}).items()},
        pictures={key: as_path(grid) for key, grid in (pictures or {}).items()},
        has_weights=(target.parent / "checkpoints").exists(),
    )
    return write_whole(target, _rendered(content).encode())


def _mappings(**named: Any) -> None:
    """Each is a mapping, or None."""
    _validate.mapping(**{name: value for name, value in named.items() if value is not None})


def _rendered(content: Page) -> str:
    jinja2 = optional("jinja2")
    source = importlib.resources.files("jdistill.report").joinpath("report.html.j2")
    # autoescape: data set names, settings and devices are text from outside.
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["unbroken"] = _text.line_break_safe
    template = environment.from_string(source.read_text(encoding="utf-8"))
    return str(template.render(page=content, embed=_embed))


def _embed(path: epath.Path) -> dict[str, Any]:
    """A PNG file as a data address, and its size, which lets a browser lay out before it draws."""
    data = path.read_bytes()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(
            f"expected a PNG file, got {path} which is none; draw it with "
            "jdistill.report.write_figures or write_picture_grid"
        )
    width, height = struct.unpack(">II", data[16:24])
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"source": source, "width": width, "height": height}


def _picture_name(key: Any) -> str:
    """A file name for a picture grid: the temperature, or the letters of a label."""
    if isinstance(key, str):
        return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in key)
    return f"T{float(key):g}"
