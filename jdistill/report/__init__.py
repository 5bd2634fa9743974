"""Results as files: `results.csv`, PNG figures and one self-contained `report.html`.

    rows = [...]                                  # one dict per network and attack, see COLUMNS
    print(report.summary(rows))                   # a table for the terminal
    report.write_report("runs/mnist", rows, config=config, run=run, pictures={100: "T100.npz"})

Figures and HTML need matplotlib and jinja2: `pip install 'jdistill[demo]'`. The rest does not.
"""

from jdistill.report._figures import write_figures
from jdistill.report._html import write_html, write_report
from jdistill.report._optional import check_packages
from jdistill.report._pictures import write_picture_grid
from jdistill.report._table import COLUMNS, read_results, write_results
from jdistill.report._text import summary
from jdistill.report._words import answer

__all__ = [
    "COLUMNS",
    "answer",
    "check_packages",
    "read_results",
    "summary",
    "write_figures",
    "write_html",
    "write_picture_grid",
    "write_report",
    "write_results",
]
