"""Defensive distillation through teacher assistants, and an honest account of the result."""

__version__ = "0.1.0"
