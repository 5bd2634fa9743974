"""The notebooks: source and stored notebook agree, and run from top to bottom in a fresh kernel."""

import pathlib
import re
import subprocess
import sys
import tomllib
import types

import jax
import pytest

nbformat = pytest.importorskip("nbformat")
for needed in ("nbclient", "jupyter_client", "jupytext"):
    pytest.importorskip(needed)

from colab import make_notebooks  # noqa: E402
from jdistill import runtime  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ["attack_your_model", "break_distillation", "quickstart", "temperature_sweep"]
REPOSITORY = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]

each = pytest.mark.parametrize(
    # Each may run on a worker of its own.
    "name",
    [pytest.param(name, marks=pytest.mark.xdist_group(f"notebook {name}")) for name in NAMES],
)


def stored(name):
    return nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)


def source(name):
    return make_notebooks.notebook_of(ROOT / "colab" / f"{name}.py")


def code(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook):
    return "".join(o.text for o in outputs(notebook) if o.get("name") == "stdout")


def test_every_notebook_is_here():
    assert [path.stem for path in make_notebooks.SOURCES] == NAMES
    assert sorted(path.stem for path in (ROOT / "colab").glob("*.ipynb")) == NAMES


@each
def test_the_notebook_has_the_cells_of_its_source(name):
    def parts(notebook):
        return [(c.id, c.cell_type, c.source, c.metadata) for c in notebook.cells]

    notebook = stored(name)
    nbformat.validate(notebook)
    assert parts(notebook) == parts(source(name)), f"make notebooks NOTEBOOKS={name}"
    # The outputs are of these cells, and of a whole run.
    run = make_notebooks.run_of(source(name), smoke=False)
    assert notebook.metadata == {**source(name).metadata, "jdistill": run}


@each
def test_what_colab_needs_to_know_is_in_the_metadata(name):
    assert stored(name).metadata | {"jdistill": None} == {
        "jdistill": None,
        "accelerator": "TPU",
        "colab": {"gpuType": "V5E1", "provenance": []},
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


@each
def test_the_stored_outputs_are_those_of_a_whole_run(name):
    notebook = stored(name)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert not make_notebooks.problems(notebook)
    text = nbformat.writes(notebook)
    # Not those of this machine alone: no absolute path of any.
    assert not re.findall(r"[\"'\s(](?:/(?:home|root|tmp|work|Users|usr|var)/|[A-Z]:\\\\)", text)
    assert "\r" not in printed(notebook)
    assert not [o for o in outputs(notebook) if "widget" in str(o.get("data", {}).keys())]
    assert any("image/png" in output.get("data", {}) for output in outputs(notebook))
    assert "done   " in printed(notebook)
    assert len(printed(notebook)) > 1000


@each
def test_addresses_are_the_projects(name):
    notebook = stored(name)
    text = "\n".join(cell.source for cell in notebook.cells)
    owner = REPOSITORY.removeprefix("https://github.com/")
    badge = (
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/{owner}/blob/main/colab/{name}.ipynb)"
    )
    assert badge in notebook.cells[0].source
    assert f'REPOSITORY = "{REPOSITORY}"' in code(notebook)[0]
    addresses = re.findall(r"github\.com/([\w-]+/[\w-]+)", text)
    assert set(addresses) == {owner}
    for path in re.findall(rf"{re.escape(REPOSITORY)}/blob/main/([\w./-]+)", text):
        assert (ROOT / path).exists(), path


def test_all_begin_with_the_same_two_cells():
    first, *others = [code(stored(name))[:2] for name in NAMES]
    assert all(cells == first for cells in others)
    assert "runtime.check_machine(" in first[1]


@pytest.fixture
def install(monkeypatch, tmp_path):
    """Runs the install cell where `missing` modules are not there; gives the calls of pip."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JDISTILL_SMOKE", raising=False)
    cell = code(stored("quickstart"))[0]

    def run(missing, repository=None):
        calls = []

        def called(command, check):
            assert check
            assert command[:5] == [sys.executable, "-m", "pip", "install", "--quiet"]
            assert command[5] == "-c"
            calls.append((command[7:], pathlib.Path(command[6]).read_text().splitlines()))

        monkeypatch.setattr(subprocess, "run", called)
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name: None if name in missing else types
        )
        text = cell if repository is None else cell.replace(REPOSITORY, repository)
        exec(compile(text, "install", "exec"), {"__name__": "__main__"})
        return calls

    return run


def test_nothing_is_installed_where_nothing_is_missing(install):
    assert install(()) == []


def test_the_library_is_installed_alone_and_beside_fixed_versions(install, tmp_path):
    ((command, constraints),) = install({"jdistill"}, "https://github.com/someone/jdistill")
    assert command == ["--no-deps", "jdistill @ git+https://github.com/someone/jdistill"]
    assert f"jax=={jax.__version__}" in constraints
    (tmp_path / "jdistill-0.1.0-py3-none-any.whl").touch()
    ((command, _),) = install({"jdistill"})
    assert command == ["--no-deps", "jdistill-0.1.0-py3-none-any.whl"]


def test_only_what_is_missing_is_installed_and_never_jax(install):
    ((command, constraints),) = install({"tyro", "PIL", "jax", "tensorflow"})
    assert command == ["pillow", "tyro"]
    assert f"jax=={jax.__version__}" in constraints


def test_without_wheel_and_address_one_sentence_says_what_to_do(install):
    with pytest.raises(RuntimeError, match=r"^expected a wheel .* got none; upload one .*above$"):
        install({"jdistill"}, "https://github.com/OWNER/jdistill")


def test_an_address_put_everywhere_is_used(install):
    """Also where all of `OWNER` is replaced, as CONTRIBUTING.md says."""
    cell = code(stored("quickstart"))[0]
    assert "OWNER" not in cell.replace("https://github.com/OWNER/jdistill", "")
    ((command, _),) = install({"jdistill"}, "https://github.com/acme/jdistill")
    assert command == ["--no-deps", "jdistill @ git+https://github.com/acme/jdistill"]


def test_of_copies_the_version_that_python_imports_is_kept(install, tmp_path, monkeypatch):
    for folder, name, version in (
        ("a", "Typing_Extensions", "9.1"),
        ("b", "typing-extensions", "1"),
    ):
        place = tmp_path / folder / f"{name}-{version}.dist-info"
        place.mkdir(parents=True)
        (place / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
    monkeypatch.setattr(sys, "path", [str(tmp_path / "a"), str(tmp_path / "b"), *sys.path])
    ((_, constraints),) = install({"tyro"})
    assert [line for line in constraints if "typing-ext" in line.lower()] == [
        "typing-extensions==9.1"
    ]


def test_what_is_needed_is_what_the_project_declares():
    namespace = {}
    lines = re.search(r"NEEDED = \{.*?\n\}", code(stored("quickstart"))[0], re.DOTALL)[0]
    exec(lines, namespace)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["study"]]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in declared}
    # Colab has JAX and NumPy; TFDS is only for the sets that `data.load` reads prepared.
    assert set(namespace["NEEDED"].values()) == names - {"jax", "numpy", "tensorflow-datasets"}


def test_a_bar_leaves_its_last_line():
    bar = "\r  0%|   | a\r 50%|#  | ab\rdone|###| c\n\nfound\n"
    assert make_notebooks.collapsed(bar) == "done|###| cb\n\nfound\n"
    stream = {"output_type": "stream", "name": "stdout"}
    pieces = [nbformat.NotebookNode(**stream, text=text) for text in ("\r 1|", "\r22|", "\n")]
    picture = nbformat.NotebookNode(output_type="display_data", data={}, metadata={})
    found = make_notebooks.joined([*pieces, picture, nbformat.NotebookNode(**stream, text="b")])
    assert [output.get("text") for output in found] == ["22|\n", None, "b\n"]


@pytest.fixture
def kernel(monkeypatch):
    shell = types.SimpleNamespace(kernel=object())
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))


def several_stages(bar):
    for stage, total in (("accuracy", 10), ("pgd", 4)):
        for done in range(1, total + 1):
            bar({"event": "evaluate", "stage": stage, "done": done, "total": total})
    bar.say("between")


def of_a_study(bar):
    for number in (1, 2):
        bar.begin(number, 2, prefix=f"T={number}, ")
        bar({"event": "evaluate", "stage": "clean", "done": 1, "total": 1})
    bar.say("between")


@pytest.mark.parametrize("events", [several_stages, of_a_study])
def test_in_a_notebook_a_bar_is_one_line_of_stdout(events, kernel, capsys):
    with runtime.progress() as bar:
        events(bar)
    out, err = capsys.readouterr()
    assert err == ""
    *before, last = make_notebooks.collapsed(out).splitlines()
    assert before == ["between"]
    assert re.fullmatch(r"done +100%\|█+\| \d\d:\d\d", last)


def stopped(bar):
    several_stages(bar)
    raise KeyboardInterrupt


def test_a_bar_that_was_stopped_does_not_say_done(kernel, capsys):
    with pytest.raises(KeyboardInterrupt), runtime.progress() as bar:
        stopped(bar)
    *before, last = make_notebooks.collapsed(capsys.readouterr().out).splitlines()
    assert before == ["between"]
    assert last.startswith("pgd ")


def test_what_must_not_be_kept_is_named():
    def with_output(**output):
        cell = nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output(**output)])
        return make_notebooks.problems(nbformat.v4.new_notebook(cells=[cell]))

    stream = {"output_type": "stream", "name": "stdout"}
    assert not with_output(**stream, text="runs/mine")
    assert with_output(**stream, text=f"at {ROOT}/runs")
    assert with_output(**stream, text="x" * make_notebooks.MOST_BYTES)
    assert with_output(output_type="stream", name="stderr", text="W0000 something")
    assert with_output(output_type="error", ename="E", evalue="no", traceback=[])


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Each notebook after a run at the least sizes, and its folder; made once."""
    runs = {}

    def run(name, *, again=False):
        if name not in runs or again:
            folder = runs[name][1] if again else tmp_path_factory.mktemp(name)
            notebook = source(name)
            make_notebooks.execute(
                notebook,
                folder,
                {
                    "JDISTILL_SMOKE": "1",
                    "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
                },
            )
            runs[name] = notebook, folder
        return runs[name]

    return run


# What a run of each prints, whatever the numbers.
PRINTED = {
    "attack_your_model": r"worst case +\S+% +\S+% +\S+%\n(.|\n)*function/report\.html",
    "break_distillation": r"PGD on the margin +\S+% +\S+%\n(.|\n)*The distilled network\n",
    "quickstart": r"20 +teacher(.|\n)*T = 20, student behind an assistant(.|\n)*Estimate: ",
    "temperature_sweep": r" 20 +1 (.|\n)*rho_adv \(l2\), with an (.|\n)*/report\.html",
}
NUM_PICTURES = dict(zip(NAMES, (1, 3, 2, 2), strict=True))


@pytest.mark.slow
@pytest.mark.floor
@each
def test_notebook_runs(name, executed):
    notebook, _ = executed(name)
    assert not make_notebooks.problems(notebook)
    assert re.search(PRINTED[name], printed(notebook)), printed(notebook)
    pictures = [o for o in outputs(notebook) if "image/png" in o.get("data", {})]
    assert len(pictures) == NUM_PICTURES[name]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(NAMES[0], marks=pytest.mark.xdist_group(f"notebook {NAMES[0]}"))],
)
def test_a_second_run_trains_nothing_and_finds_the_same(name, executed):
    first, folder = executed(name)

    def files():
        kept = [*folder.rglob("checkpoints/**/*"), *folder.rglob("shards/**/*.npz")]
        return {path: path.stat().st_mtime_ns for path in kept if path.is_file()}

    before = files()
    assert len(before) > 10
    second, _ = executed(name, again=True)
    assert files() == before
    table = r"correct(.|\n)*?worst case.*"
    assert re.search(table, printed(first))[0] == re.search(table, printed(second))[0]
