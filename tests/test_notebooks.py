"""The notebooks run from top to bottom in a fresh kernel, and are stored clean."""

import gc
import os
import pathlib
import re
import subprocess
import sys
import warnings

import jax
import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
jupyter_client = pytest.importorskip("jupyter_client")
kernelspec = pytest.importorskip("jupyter_client.kernelspec")

FOLDER = pathlib.Path(__file__).parents[1] / "colab"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

all_notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


class ThisInterpreter(jupyter_client.AsyncKernelManager):
    """A kernel that is the interpreter of the tests, whatever kernels a machine has registered."""

    @property
    def kernel_spec(self):
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return kernelspec.KernelSpec(argv=command, display_name="tests", language="python")


def read(path):
    return nbformat.read(path, as_version=4)


def execute(notebook, folder):
    """Run the cells in a kernel of its own, with one device and nothing from the user's home."""
    environment = {
        **os.environ,
        "JDISTILL_SMOKE": "1",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "IPYTHONDIR": str(folder / ".ipython"),
        "MPLCONFIGDIR": str(folder / ".matplotlib"),
    }
    # Where it takes more than five seconds, matplotlib says on stderr that it lists the fonts.
    listing = [sys.executable, "-c", "import matplotlib.font_manager"]
    subprocess.run(listing, env=environment, check=True, capture_output=True)
    work = folder / "work"
    work.mkdir()
    client = nbclient.NotebookClient(
        notebook,
        kernel_manager_class=ThisInterpreter,
        timeout=600,  # a cell, against a hang
        resources={"metadata": {"path": str(work)}},
    )
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / ".jupyter"))
        # Jupyter's own affairs: sockets left to the garbage collector, calls that age.
        warnings.simplefilter("ignore", ResourceWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        client.execute(env=environment)
        del client
        gc.collect()  # while the sockets' warnings are still ignored
    return work


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook):
    streams = [output for output in outputs(notebook) if output.output_type == "stream"]
    return "".join(output.text for output in streams if output.name == "stdout")


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """Each notebook after a run, made once."""
    runs = {}

    def run(path):
        if path not in runs:
            notebook = read(path)
            runs[path] = notebook, execute(notebook, tmp_path_factory.mktemp(path.stem))
        return runs[path]

    return run


@pytest.mark.slow
@all_notebooks
def test_notebook_runs(path, executed):
    notebook, _ = executed(path)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.execution_count, cell.id
    assert not [output for output in outputs(notebook) if output.output_type == "error"]
    errors = [o.text for o in outputs(notebook) if o.get("name") == "stderr"]
    assert not errors, errors


@pytest.mark.slow
def test_quickstart_shows_a_table_two_plots_and_a_verdict(executed):
    notebook, work = executed(FOLDER / "quickstart.ipynb")
    text = printed(notebook)
    rows = re.findall(r"^ +(1|20)  (teacher|assistant 1|student) .*%", text, re.MULTILINE)
    assert rows == [
        (t, name) for t in ("1", "20") for name in ("teacher", "assistant 1", "student")
    ]
    images = [output for output in outputs(notebook) if "image/png" in output.get("data", {})]
    assert len(images) == 2
    assert (work / "pictures.png").exists()
    assert re.search(r"FGSM succeeds on \d+% of the images", text)


@all_notebooks
def test_notebook_is_stored_clean(path):
    notebook = read(path)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert set(notebook.metadata) <= {"colab", "kernelspec", "language_info"}
    assert notebook.metadata.language_info == {"name": "python"}
    for cell in notebook.cells:
        assert not cell.metadata
        if cell.cell_type == "code":
            assert not cell.outputs
            assert cell.execution_count is None
            compile(cell.source, cell.id, "exec")


@all_notebooks
def test_notebook_names_the_repository_once(path):
    """One constant holds the address; the badge, which cannot read it, agrees with it."""
    notebook = read(path)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    (address,) = re.findall(
        r'^REPOSITORY = "https://github\.com/([^"]+)"  # placeholder', code, re.M
    )
    assert code.count("github.com") == 1
    (badge,) = re.findall(r"colab\.research\.google\.com/github/(\S+?)/blob/", path.read_text())
    assert badge == address


@all_notebooks
def test_install_cell_upgrades_nothing(path):
    notebook = read(path)
    (install,) = [cell.source for cell in notebook.cells if "pip" in cell.source]
    assert not re.search(r"--upgrade|-U\b|--force-reinstall|--pre\b|>=|~=", install)
    assert '"--no-deps", f"jdistill @ git+{REPOSITORY}"' in install
    assert "if not SMOKE:" in install
