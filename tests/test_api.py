"""The conventions that hold for the whole library, checked on its source and its signatures."""

import ast
import functools
import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest

from jdistill import attacks, losses, metrics, nets, norms

ROOT = pathlib.Path(__file__).parents[1] / "jdistill"
# Modules import those of lower levels only; inside a level they do not know each other.
LEVELS = {
    "_validate": -2,
    "_jax": -1,
    "typing": 0,
    "_files": 0,
    "_words": 0,
    "_order": 0,
    "_fingerprint": 0,
    "_entries": 1,
    "losses": 1,
    "metrics": 1,
    "norms": 1,
    "nets": 1,
    "parallel": 1,
    "data": 1,
    "attacks": 2,
    "train": 2,
    "distill": 3,
    "robust": 3,
    "sweep": 3,
    "evaluate": 3,
    "diagnose": 3,
    "checkpoint": 4,
    "export": 4,
    "runtime": 4,
    "report": 4,
    "study": 5,
    "commands": 6,
    "__main__": 7,
}
CHAIN = {("sweep", "distill"), ("metrics", "nets")}
FILES = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


def module_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@functools.cache
def imports(path):
    """Dotted names of all that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imported_modules(path):
    return {
        name.split(".")[1] for name in imports(path) if name.startswith("jdistill.")
    } & LEVELS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    module = module_of(path)
    assert module in LEVELS, f"give {module} a level, here and in the design"
    for other in imported_modules(path) - {module}:
        assert LEVELS[other] < LEVELS[module] or (module, other) in CHAIN, (
            f"{module} (level {LEVELS[module]}) imports {other} (level {LEVELS[other]})"
        )


ONLY_IN = {
    "flax.linen": "nets",
    "flax.nnx": "nets",
    "orbax": "checkpoint",
    "tensorflow_datasets": "data",
    "matplotlib": "report",
}


@pytest.mark.parametrize("package", ONLY_IN)
def test_heavy_packages_have_one_place(package):
    users = {
        module_of(path)
        for path in FILES
        if any(name == package or name.startswith(package + ".") for name in imports(path))
    }
    assert users <= {ONLY_IN[package]}


@pytest.mark.parametrize("package", ["tensorflow", "torch"])
def test_foreign_frameworks_have_none(package):
    assert not [p for p in FILES if any(n.split(".")[0] == package for n in imports(p))]


def functions(module):
    names = getattr(module, "__all__", None) or [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    return {
        f"{module.__name__}.{name}": getattr(module, name)
        for name in names
        if inspect.isfunction(getattr(module, name))
    }


ATTACKS = {  # the others there are wrappers and settings for them
    name: function
    for name, function in functions(attacks).items()
    if inspect.signature(function).return_annotation is attacks.AttackResult
}
PUBLIC = (
    functions(attacks) | functions(losses) | functions(metrics) | functions(norms) | functions(nets)
)


def test_the_functions_were_found():
    # An attack without an annotation would be one of these.
    tools = {"autoattack_names", "bpda", "cost", "expectation", "maximize", "softmax_at", "traits"}
    assert {name.rpartition(".")[2] for name in functions(attacks).keys() - ATTACKS.keys()} == tools
    assert {"jdistill.attacks.pgd", "jdistill.losses.margin", "jdistill.norms.project"} <= set(
        PUBLIC
    )
    assert len(PUBLIC) > 25


@pytest.mark.parametrize("function", PUBLIC.values(), ids=PUBLIC)
def test_docstrings_say_what_goes_in_and_out(function):
    doc = inspect.getdoc(function)
    assert doc
    first = doc.splitlines()[0]
    assert first.endswith((".", ":"))
    assert ">>> " in doc
    for section in ("Args:", "Returns:", "Example:"):
        assert f"\n{section}\n" in doc, f"no {section}"
    described = doc[doc.index("\nArgs:\n") : doc.index("\nReturns:\n")]
    for name, parameter in inspect.signature(function).parameters.items():
        stars = {parameter.VAR_KEYWORD: r"**", parameter.VAR_POSITIONAL: "*"}
        name = stars.get(parameter.kind, "") + name
        assert f"\n    {name}:" in described, f"{name} is not described"


@pytest.mark.parametrize("function", ATTACKS.values(), ids=ATTACKS)
def test_attacks_have_one_signature(function):
    parameters = inspect.signature(function).parameters
    names = list(parameters)
    assert names[:4] == ["logits_fn", "key", "inputs", "labels"]
    for name in names[:4]:
        assert parameters[name].kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert parameters[name].default is inspect.Parameter.empty
    for name in names[4:]:
        assert parameters[name].kind == inspect.Parameter.KEYWORD_ONLY
    assert parameters["bounds"].default == (0.0, 1.0)
    assert parameters["targets"].default is None
    if "norm" in parameters:
        # DeepFool is known by the l2 form that its paper prints.
        assert parameters["norm"].default == {"deepfool": "l2"}.get(function.__name__, "linf")
    for name in names:
        assert parameters[name].annotation is not inspect.Parameter.empty
    assert inspect.signature(function).return_annotation is attacks.AttackResult


# The names of the attacks to import from there, what a version of AutoAttack calls its parts, and
# the attacks of a recipe.
MAY_NAME_ATTACKS = {
    ROOT / "attacks/__init__.py",
    ROOT / "attacks/_autoattack.py",
    *(ROOT / "study" / f"_{recipes}.py" for recipes in ("recipes", "deit", "edge")),
}


@pytest.mark.parametrize(
    "path", sorted({*FILES} - MAY_NAME_ATTACKS), ids=lambda path: str(path.relative_to(ROOT))
)
def test_no_table_names_attacks(path):
    """Whoever needs a fact about an attack asks `attacks.traits`."""
    names = {name.rpartition(".")[2] for name in ATTACKS}

    def named(entry):
        if isinstance(entry, ast.Attribute) and ast.unparse(entry.value) == "attacks":
            return entry.attr
        return entry.value if isinstance(entry, ast.Constant) else None

    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Dict):
            entries = [*node.keys, *node.values]
        elif isinstance(node, ast.Set | ast.Tuple | ast.List):
            entries = node.elts
        else:
            continue
        found = {named(entry) for entry in entries} & names
        assert len(found) < 2, f"line {node.lineno} names {found}; let attacks.traits say it"


def test_the_levels_are_those_of_the_package():
    present = {p.name.removesuffix(".py") for p in ROOT.iterdir() if p.suffix in ("", ".py")}
    assert {m for m in LEVELS if LEVELS[m] < 3} <= present
    for name in present & LEVELS.keys():
        importlib.import_module(f"jdistill.{name}")


@pytest.mark.floor
def test_importing_the_library_is_light():
    heavy = [
        "tensorflow",
        "tensorflow_datasets",
        "orbax",
        "matplotlib",
        "torch",
        "sklearn",
        "jinja2",
    ]
    script = f"""
import sys
import jdistill
from jdistill import attacks, nets, losses, metrics, norms
found = [name for name in {heavy} if name in sys.modules]
assert not found, found
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized(), "a backend was started"
print("light")
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        text=True,
        capture_output=True,
        cwd=ROOT.parent,
        timeout=120,
    )
    assert done.stdout.strip() == "light", done.stderr
