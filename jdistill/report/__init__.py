"""Results as files: tables as CSV, PNG figures, and a report as one HTML page and as Markdown.

    report.from_evaluation(result, verdicts=[verdict], names=["mine"])    # all of it in one call

    rows = [...]                        # one dict per network and attack, see COLUMNS and FACTS
    print(report.summary(rows))                   # a table for the terminal
    report.write_table("runs/mnist/curves.csv", "curves", curves)        # and what else there is
    report.write_verdicts("runs/mnist/verdicts.json", verdicts)
    report.write_report("runs/mnist", rows, config=config, run=run, pictures={100: "T100.npz"})

`TABLES` has the columns of every kind of table. A workdir needs `results.csv`; what else it has
(`curves.csv`, `transfer.csv`, `sensitivity.csv`, `calibration.csv`, `distances.csv`,
`comparisons.csv`, `verdicts.json`) the report shows, and of the rest it says that it was not done.

Figures and HTML need matplotlib and jinja2: `pip install 'jdistill[study]'`. The rest does not.
"""

from jdistill.report._evaluation import NetworkName, from_evaluation, pictures, tables
from jdistill.report._figures import write_figures
from jdistill.report._html import write_html, write_report
from jdistill.report._measures import read_measures
from jdistill.report._optional import check_packages
from jdistill.report._pictures import write_picture_grid
from jdistill.report._table import (
    COLUMNS,
    FACTS,
    TABLES,
    read_results,
    read_table,
    write_results,
    write_table,
)
from jdistill.report._text import summary
from jdistill.report._verdicts import read_verdicts, write_verdicts
from jdistill.report._words import answer

__all__ = [
    "COLUMNS",
    "FACTS",
    "TABLES",
    "NetworkName",
    "answer",
    "check_packages",
    "from_evaluation",
    "pictures",
    "read_measures",
    "read_results",
    "read_table",
    "read_verdicts",
    "summary",
    "tables",
    "write_figures",
    "write_html",
    "write_picture_grid",
    "write_report",
    "write_results",
    "write_table",
    "write_verdicts",
]
