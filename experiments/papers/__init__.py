"""The papers' tables, one item per table; `python -m experiments.reproduce` runs them."""
