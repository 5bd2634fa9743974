"""Makes the notebooks: each `colab/NAME.py` is executed and written as `colab/NAME.ipynb`.

    python colab/make_notebooks.py                   all of them, which takes minutes
    python colab/make_notebooks.py quickstart        one
    python colab/make_notebooks.py --smoke           at the least sizes, and nothing is written

The `.py` is the source (jupytext's percent format), the `.ipynb` what readers open, with its
outputs. A notebook runs in a fresh kernel of this interpreter, on the CPU, in a folder of its own.
"""

import argparse
import gc
import hashlib
import os
import pathlib
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jupyter_client
import jupytext
import nbclient
import nbformat
from jupyter_client import kernelspec

FOLDER = pathlib.Path(__file__).parent
SOURCES = tuple(path for path in sorted(FOLDER.glob("*.py")) if path != pathlib.Path(__file__))
MOST_BYTES = 600_000  # of a notebook, which sites show in full and repositories keep for good


class ThisInterpreter(jupyter_client.AsyncKernelManager):
    """A kernel that is this interpreter, whatever kernels a machine has registered."""

    @property
    def kernel_spec(self) -> kernelspec.KernelSpec:
        """The command that starts it."""
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return kernelspec.KernelSpec(argv=command, display_name="Python 3", language="python")


def notebook_of(source: pathlib.Path) -> Any:
    """The notebook of a `.py` without outputs; its cells are numbered, so that ids are stable."""
    notebook = jupytext.read(source, fmt="py:percent")
    notebook.metadata.pop("jupytext", None)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def run_of(notebook: Any, *, smoke: bool) -> dict[str, Any]:
    """Source of a notebook's outputs: a hash of its cells' code, and whether it ran at least sizes."""
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    digest = hashlib.blake2b("\0".join(code).encode(), digest_size=8).hexdigest()
    return {"code": digest, "smoke": smoke}


def execute(notebook: Any, folder: pathlib.Path, environment: Mapping[str, str]) -> pathlib.Path:
    """Run the cells in place, in a kernel of their own; nothing comes from the user's home.

    Args:
        notebook: its outputs are replaced.
        folder: for what Jupyter, IPython, and matplotlib keep; the cells run in `work` of it.
        environment: variables beside those of this process.

    Returns:
        The folder that the cells ran in.
    """
    work = folder / "work"
    work.mkdir(exist_ok=True)
    variables = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "IPYTHONDIR": str(folder / "ipython"),
        "MPLCONFIGDIR": str(folder / "matplotlib"),
        "JUPYTER_RUNTIME_DIR": str(folder / "jupyter"),
        **environment,
    }
    # Where it takes more than five seconds, matplotlib says on stderr that it lists the fonts.
    listing = [sys.executable, "-c", "import matplotlib.font_manager"]
    subprocess.run(listing, env=variables, check=True, capture_output=True)
    kept = os.environ.get("JUPYTER_RUNTIME_DIR")
    os.environ["JUPYTER_RUNTIME_DIR"] = variables["JUPYTER_RUNTIME_DIR"]
    client = nbclient.NotebookClient(
        notebook,
        kernel_manager_class=ThisInterpreter,
        timeout=3600,  # a cell, against a hang
        record_timing=False,
        resources={"metadata": {"path": str(work)}},
    )
    try:
        with warnings.catch_warnings():
            # Jupyter's own affairs: sockets left to the garbage collector, calls that age.
            warnings.simplefilter("ignore", ResourceWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            client.execute(env=variables)
            del client
            gc.collect()  # while the sockets' warnings are still ignored
    finally:
        if kept is None:
            del os.environ["JUPYTER_RUNTIME_DIR"]
        else:
            os.environ["JUPYTER_RUNTIME_DIR"] = kept
    for cell in notebook.cells:
        if "outputs" in cell:
            cell.outputs = joined(cell.outputs)
    return work


def joined(outputs: Sequence[Any]) -> list[Any]:
    """The outputs of a cell, with all that it printed in one piece, as it looks in the end."""
    found: list[Any] = []
    for output in outputs:
        if found and output.get("name") and output.get("name") == found[-1].get("name"):
            found[-1].text += output.text  # only what is printed has the name of a stream
        else:
            found.append(output)
    for output in found:
        if output.output_type == "stream":
            output.text = collapsed(output.text)
    return [each for each in found if each.output_type != "stream" or each.text.strip()]


def collapsed(text: str) -> str:
    """The text as a terminal shows it in the end: a carriage return goes back to the line's start."""
    lines = []
    for line in text.split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return "\n".join(lines).rstrip("\n") + "\n"


def problems(notebook: Any) -> list[str]:
    """Faults of a notebook: errors, warnings, paths of the machine it ran on, too many bytes."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error" or output.get("name") == "stderr":
                found.append(f"{cell.id}: {output.get('text') or output.get('evalue')}")
    text = nbformat.writes(notebook)
    places = (str(FOLDER.parent), tempfile.gettempdir(), str(pathlib.Path.home()) + "/")
    found += [f"it names {place}" for place in places if place in text]
    if len(text) > MOST_BYTES:
        found.append(f"it has {len(text):,} bytes, more than {MOST_BYTES:,}")
    return found


def make(source: pathlib.Path, *, smoke: bool) -> list[str]:
    """Execute a notebook and write it; returns what is wrong with it."""
    notebook = notebook_of(source)
    started = time.monotonic()
    # Cold, so that the time is that of a reader's first run.
    with tempfile.TemporaryDirectory() as folder:
        environment = {"JAX_COMPILATION_CACHE_DIR": f"{folder}/programs"}
        environment["JDISTILL_SMOKE"] = "1" if smoke else "0"
        execute(notebook, pathlib.Path(folder), environment)
    seconds = time.monotonic() - started
    # What the kernel says of itself is not the notebook's.
    fresh = notebook_of(source)
    notebook.metadata = {**fresh.metadata, "jdistill": run_of(fresh, smoke=smoke)}
    found = problems(notebook)
    size = len(nbformat.writes(notebook))
    print(f"{source.stem}: {seconds:.0f} s, {size / 1000:.0f} kB", *found, sep="\n  ", flush=True)
    if not smoke:  # also where something is wrong with it, so that it can be looked at
        nbformat.validate(notebook)
        source.with_suffix(".ipynb").write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")
    return found


def main() -> None:
    """Make the notebooks that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *(path.stem for path in SOURCES)])
    parser.add_argument("--smoke", action="store_true", help="at the least sizes; writes nothing")
    options = parser.parse_args()
    chosen = [path for path in SOURCES if not options.names or path.stem in options.names]
    if any([make(path, smoke=options.smoke) for path in chosen]):
        sys.exit(1)


if __name__ == "__main__":
    main()
