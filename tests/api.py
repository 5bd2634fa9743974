"""The public interface as text, read off the sources: `python -m tests.api` writes it anew.

`tests/test_api.py` compares it with `tests/fixtures/api.txt`, so that no name, argument, default,
or result changes unseen.
"""

import ast
import importlib
import inspect
import pathlib
import textwrap
import types
from typing import Any

import jdistill

PATH = pathlib.Path(__file__).parent / "fixtures/api.txt"
_HEAD = "# The public interface of jdistill. `python -m tests.api` writes this file anew.\n"


def modules() -> dict[str, types.ModuleType]:
    """Public modules by name."""
    found = {}
    for name in jdistill.__all__:
        if (pathlib.Path(jdistill.__file__).parent / name).is_dir() or name in ("norms", "typing"):
            found[name] = importlib.import_module(f"jdistill.{name}")
    return found


def public() -> dict[str, Any]:
    """All that is public, by the name of its module and its own."""
    return {
        f"{module_name}.{name}": getattr(module, name)
        for module_name, module in modules().items()
        for name in module.__all__
    }


def is_class(value: Any) -> bool:
    """Whether the library defines the value as a class; aliases of types are none."""
    return inspect.isclass(value) and value.__module__.startswith("jdistill.")


def is_function(value: Any) -> bool:
    """Whether the value is a function, with a derivative of its own or without."""
    return inspect.isfunction(inspect.unwrap(value)) and not inspect.isclass(value)


def node_of(value: Any) -> Any:
    """The definition of a function or class in its source."""
    return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(value)))).body[0]


def members(node: ast.ClassDef) -> list[Any]:
    """What a class defines in public: its fields, methods, and properties."""
    found = []
    for entry in node.body:
        if isinstance(entry, ast.AnnAssign):
            name = ast.unparse(entry.target)
        elif isinstance(entry, ast.FunctionDef):
            name = entry.name
        else:
            continue
        if not name.startswith("_") or name in ("__call__", "__init__"):
            found.append(entry)
    return found


def _function(node: ast.FunctionDef, indent: str = "") -> list[str]:
    arguments = node.args
    lines = []
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    for number, (each, default) in enumerate(zip(positional, defaults, strict=True), start=1):
        if each.arg not in ("self", "cls"):
            lines.append(_argument(each, default))
        if number == len(arguments.posonlyargs):
            lines.append("/")
    if arguments.vararg:
        lines.append("*" + _argument(arguments.vararg, None))
    elif arguments.kwonlyargs:
        lines.append("*")
    lines += map(_argument, arguments.kwonlyargs, arguments.kw_defaults)
    if arguments.kwarg:
        lines.append("**" + _argument(arguments.kwarg, None))
    kinds = {ast.unparse(each) for each in node.decorator_list}
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    if "property" in kinds:
        return [f"{indent}{node.name}{result}"]
    if not lines:
        return [f"{indent}def {node.name}(){result}"]
    return [
        f"{indent}def {node.name}(",
        *(f"{indent}    {line}," for line in lines),
        f"{indent}){result}",
    ]


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    return argument.arg + kind + ("" if default is None else f" = {ast.unparse(default)}")


def _class(node: ast.ClassDef) -> list[str]:
    lines = [f"class {node.name}({', '.join(map(ast.unparse, node.bases))})".replace("()", "")]
    for entry in members(node):
        if isinstance(entry, ast.AnnAssign):
            default = "" if entry.value is None else f" = {ast.unparse(entry.value)}"
            kind = ast.unparse(entry.annotation)
            lines.append(f"    {ast.unparse(entry.target)}: {kind}{default}")
        else:
            lines += _function(entry, "    ")
    return lines


def text() -> str:
    """The whole interface: modules, and in each what it has, by name."""
    parts = [_HEAD]
    module_name = None
    for name, value in public().items():
        module, _, own = name.rpartition(".")
        if module != module_name:
            parts.append(f"\n\n== jdistill.{module} ==\n")
            module_name = module
        if is_class(value):
            lines = _class(node_of(value))
        elif is_function(value):
            lines = _function(node_of(value))
        else:  # a constant, or an alias of a type
            lines = [own]
        parts.append("\n" + "\n".join(lines) + "\n")
    return "".join(parts)


if __name__ == "__main__":
    PATH.write_text(text())
