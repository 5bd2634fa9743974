"""Seconds of the library beside what else there is: `python -m experiments.bench --help`."""
