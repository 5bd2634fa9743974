"""Importing the optional packages of the extra `study`."""

import importlib
from types import ModuleType


def optional(module: str) -> ModuleType:
    """Imports a package of the extra `study`, or says how to get it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        # A package that is there but broken inside has its own message to give.
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"expected {package} to be installed, got no such package; "
            "pip install 'jdistill[study]'",
            name=error.name,
        ) from None


def check_packages() -> None:
    """Checks that figures and reports can be made, which is better known before a long run.

    Raises:
        ModuleNotFoundError: matplotlib or jinja2 is missing; it says how to get them.

    Example:
        >>> check_packages()
    """
    for module in ("matplotlib", "jinja2"):
        optional(module)
