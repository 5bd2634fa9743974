"""The conventions that hold for the whole library, checked on its source and its signatures."""

import ast
import difflib
import functools
import importlib
import inspect
import itertools
import pathlib
import re
import subprocess
import sys

import pytest

import jdistill
from jdistill import attacks
from tests import api

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


PUBLIC = api.public()
FUNCTIONS = {name: value for name, value in PUBLIC.items() if api.is_function(value)}
CLASSES = {name: value for name, value in PUBLIC.items() if api.is_class(value)}
ATTACKS = {  # the others there are wrappers and settings for them
    name: function
    for name, function in FUNCTIONS.items()
    if name.startswith("attacks.")
    and inspect.signature(function).return_annotation is attacks.AttackResult
}


def test_the_functions_were_found():
    # An attack without an annotation would be one of these.
    tools = {"autoattack_names", "bpda", "cost", "expectation", "maximize", "softmax", "softmax_at"}
    others = {name for name in FUNCTIONS if name.startswith("attacks.")} - ATTACKS.keys()
    assert {name.rpartition(".")[2] for name in others} == tools | {"traits"}
    assert {"attacks.pgd", "losses.margin", "norms.project", "study.run"} <= FUNCTIONS.keys()
    assert {"typing.LogitsFn", "nets.ConvNet", "checkpoint.Checkpointer"} <= CLASSES.keys()
    assert len(FUNCTIONS) > 170
    assert len(CLASSES) > 60
    assert {module.partition(".")[0] for module in PUBLIC} == {
        module for module, level in LEVELS.items() if 0 <= level < 6 and module[0] != "_"
    }


def test_the_public_interface_is_the_one_written_down():
    """It changes on purpose alone: `python -m tests.api` writes it anew, for the diff to show."""
    kept, found = (text.splitlines() for text in (api.PATH.read_text(), api.text()))
    diff = list(difflib.unified_diff(kept, found, "tests/fixtures/api.txt", "the sources", n=3))
    assert not diff, "\n".join(["run `python -m tests.api` if this is meant:", *diff])


@pytest.mark.parametrize("module", api.modules().values(), ids=api.modules())
def test_all_that_is_public_is_in_all(module):
    def place(name):  # as isort has it
        return 0 if name.isupper() else 1 if name[0].isupper() else 2, name

    assert module.__all__ == sorted(module.__all__, key=place)
    assert len(set(module.__all__)) == len(module.__all__)
    assert not [name for name in module.__all__ if not hasattr(module, name)]
    here = {  # defined in the module or its files
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and (inspect.isclass(value) or callable(value))
        and f"{getattr(value, '__module__', '')}.".startswith(f"{module.__name__}.")
    }
    assert here - {*module.__all__} == set()


def test_the_package_has_its_modules():
    modules = {f"jdistill.{name}" for name in api.modules()}
    assert {f"jdistill.{module_of(path)}" for path in FILES} - modules == {
        f"jdistill.{module}" for module in LEVELS if module[0] == "_" or LEVELS[module] > 5
    }
    assert jdistill.__all__ == sorted(
        jdistill.__all__, key=lambda name: (not name[0].isupper(), name)
    )
    assert all(hasattr(jdistill, name) for name in jdistill.__all__)


def owner_and_parameters():
    """Each public function and method with the parameters that a caller passes."""
    for name, function in FUNCTIONS.items():
        yield name, function, list(inspect.signature(function).parameters.values())
    for name, value in CLASSES.items():
        for entry in api.members(api.node_of(value)):
            if isinstance(entry, ast.FunctionDef):
                method = inspect.getattr_static(value, entry.name)
                if isinstance(method, property):
                    method = method.fget
                method = getattr(method, "__func__", method)  # of a class method
                parameters = inspect.signature(method).parameters.values()
                yield f"{name}.{entry.name}", method, list(parameters)[1:]


CALLABLES = {name: (function, parameters) for name, function, parameters in owner_and_parameters()}


@pytest.mark.parametrize("name", CALLABLES)
def test_all_is_annotated(name):
    function, parameters = CALLABLES[name]
    assert [each.name for each in parameters if each.annotation is each.empty] == []
    assert inspect.signature(function).return_annotation is not inspect.Signature.empty


# Those with several options by position: arrays that go together; what is called as JAX's or
# Flax's function of that name; two names, and two places, that need no words.
SEVERAL_BY_POSITION = {
    "data.batches": "labels targets",
    "nets.conv_general_dilated": "lhs_dilation rhs_dilation dimension_numbers feature_group_count "
    "batch_group_count precision preferred_element_type",
    "nets.max_pool": "window_shape strides padding",
    "runtime.initialize": "coordinator_address num_processes process_id",
    "attacks.autoattack_names": "version norm",
    "parallel.compile_step": "mode devices",
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_given_by_name(name):
    """Of the arguments that have a default, one at most can be given by its position."""
    options = [
        each.name
        for each in inspect.signature(FUNCTIONS[name]).parameters.values()
        if each.kind is each.POSITIONAL_OR_KEYWORD and each.default is not each.empty
    ]
    if name in SEVERAL_BY_POSITION:
        assert options == SEVERAL_BY_POSITION[name].split()
    else:
        assert len(options) < 2


def sections(doc):
    """The sections of a docstring in Google's style, by name, and what is before them."""
    parts = re.split(r"^([A-Z][a-z]+):\n(?=    )", doc, flags=re.MULTILINE)
    names = parts[1::2]
    assert len(set(names)) == len(names)
    order = ["Args", "Attributes", "Returns", "Yields", "Raises", "Example", "References"]
    assert names == [name for name in order if name in names], "another section, or another order"
    texts = dict(zip(names, parts[2::2], strict=True))
    lines = "\n".join(texts.values()).splitlines()
    assert not [line for line in lines if line and not line.startswith("    ")], "text after one"
    return {"": parts[0], **texts}


def described(section):
    """The names that a section describes."""
    return set(re.findall(r"^    (\*{0,2}\w+):", section, flags=re.MULTILINE))


def check_summary(doc):
    assert doc
    summary = doc.split("\n\n")[0]
    assert summary.endswith(".")
    assert summary.count("\n") == 0, "a summary is one line"
    assert summary.split()[0] not in ("How", "What", "Where", "Whether", "Which"), "name the thing"


def raises(node):
    """Whether the function raises in its own lines, or checks an argument there."""
    return any(
        isinstance(each, ast.Raise)
        or (isinstance(each, ast.Attribute) and ast.unparse(each.value) == "_validate")
        for each in ast.walk(node)
    )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_say_what_goes_in_and_out(name):
    function = FUNCTIONS[name]
    doc = inspect.getdoc(function)
    check_summary(doc)
    parts = sections(doc)
    signature = inspect.signature(function)
    if signature.parameters:
        stars = {inspect.Parameter.VAR_KEYWORD: "**", inspect.Parameter.VAR_POSITIONAL: "*"}
        arguments = {stars.get(p.kind, "") + p.name for p in signature.parameters.values()}
        assert described(parts.get("Args", "")) == arguments
    if signature.return_annotation not in (None, "None"):
        assert {"Returns", "Yields"} & parts.keys(), "no Returns"
    if raises(api.node_of(function)):
        assert "Raises" in parts, "no Raises"
    assert ">>> " in parts.get("Example", ""), "no Example"


def fields(value):
    """The names of a class's public fields."""
    return {
        ast.unparse(entry.target)
        for entry in api.members(api.node_of(value))
        if isinstance(entry, ast.AnnAssign)
    }


def fields_with_texts(value):
    """The fields that have a text of their own below them, which a command shows as its help."""
    body = api.node_of(value).body
    return {
        ast.unparse(entry.target)
        for entry, below in itertools.pairwise(body)
        if isinstance(entry, ast.AnnAssign)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }


RETURNED = set().union(  # classes that functions or other classes give, and nobody else makes
    *(
        re.findall(r"[A-Z]\w+", ast.unparse(node.returns))
        for node in map(api.node_of, FUNCTIONS.values())
        if node.returns
    ),
    *(
        re.findall(r"[A-Z]\w+", ast.unparse(entry.annotation))
        for value in CLASSES.values()
        for entry in api.members(api.node_of(value))
        if isinstance(entry, ast.AnnAssign)
    ),
)

MADE_BY_USERS = {"AttackPlan", "Batch", "Dataset", "Split", "Stage", "Study"}  # as well


@pytest.mark.parametrize("name", CLASSES)
def test_docstrings_of_classes_say_what_they_hold(name):
    value = CLASSES[name]
    doc = inspect.getdoc(value)
    check_summary(doc)
    parts = sections(doc)
    if getattr(value, "_is_protocol", False):  # what is called, and what comes back
        parameters = {*inspect.signature(value.__call__).parameters} - {"self"}
        assert described(parts.get("Args", "")) == parameters
        assert "Returns" in parts or inspect.signature(value.__call__).return_annotation is None
    elif fields(value):
        without_text = fields(value) - fields_with_texts(value)
        assert described(parts.get("Attributes", "")) == without_text
    else:
        assert "Args" in parts
    if name.rpartition(".")[2] not in RETURNED:
        assert ">>> " in parts.get("Example", ""), "no Example"


@pytest.mark.parametrize("name", [name for name in CALLABLES if name not in FUNCTIONS])
def test_docstrings_of_methods_say_what_goes_in(name):
    method, parameters = CALLABLES[name]
    own = name.rpartition(".")[2]
    if own in ("__call__", "__init__"):
        return  # the class says it
    doc = inspect.getdoc(method)
    check_summary(doc)
    parts = sections(doc)
    if "Args" in parts or len(parameters) > 1:
        assert described(parts.get("Args", "")) == {each.name for each in parameters}
    if raises(api.node_of(method)):
        assert "Raises" in parts, "no Raises"


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
