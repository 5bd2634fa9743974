"""Results as files: tables as CSV, figures as SVG, and a report as one HTML page.

In one call, or piece by piece::

    report.from_evaluation(result, verdicts=[verdict], names=["mine"])

    report.write_table("runs/mnist/curves.csv", "curves", rows)
    report.write_verdicts("runs/mnist/verdicts.json", verdicts)
    report.write_report("runs/mnist")
    print(report.summary(rows))                                # the results for the terminal

`TABLES` has the columns of every kind of table. A folder needs `results.csv`; what else it has
(`curves.csv`, `transfer.csv`, `sensitivity.csv`, `calibration.csv`, `agreement.csv`,
`deployment.csv`, `distances.csv`, `comparisons.csv`, `verdicts.json`) the report shows, and of the
rest it says that it was not done.

Figures and the page need matplotlib and jinja2: `pip install 'jdistill[study]'`.
"""

from jdistill.report._evaluation import NetworkName, from_evaluation, pictures, tables
from jdistill.report._optional import check_packages
from jdistill.report._page import read_tables, write_report
from jdistill.report._pictures import write_picture_grid
from jdistill.report._summary import summary
from jdistill.report._table import FACTS, TABLES, read_table, write_table
from jdistill.report._verdicts import read_verdicts, write_verdicts

__all__ = [
    "FACTS",
    "TABLES",
    "NetworkName",
    "check_packages",
    "from_evaluation",
    "pictures",
    "read_table",
    "read_tables",
    "read_verdicts",
    "summary",
    "tables",
    "write_picture_grid",
    "write_report",
    "write_table",
    "write_verdicts",
]
