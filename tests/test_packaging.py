"""The wheel holds the library alone, typed, and the pins name no index and no path."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("jdistill-*.whl"))


def test_wheel_holds_jdistill_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"jdistill"}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "jdistill").rglob("*.py")}
    assert modules <= set(names)
    assert "jdistill/py.typed" in names
    assert "jdistill/report/report.html.j2" in names
    scripts = next(name for name in names if name.endswith("/entry_points.txt"))
    assert "jdistill = jdistill.commands:main" in zipfile.ZipFile(wheel).read(scripts).decode()
    assert not [name for name in names if "__pycache__" in name]


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
    text = archive.read(metadata).decode()
    assert "Requires-Python: >=3.11" in text
    assert "License-Expression: Apache-2.0" in text
    assert "Provides-Extra: study" in text


PINS = ["requirements.txt", "requirements-floor.txt", "requirements-newest.txt"]


def pinned(name):
    """The versions of a file, by the packages' normalized names."""
    lines = (ROOT / name).read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in pairs}


@pytest.mark.parametrize("name", PINS)
def test_pins_are_plain_exact_versions(name):
    lines = (ROOT / name).read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 20
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9_.\-]+==[A-Za-z0-9_.+!]+", pin), pin
    assert len(pinned(name)) == len(pins)  # none twice


@pytest.mark.parametrize("name", PINS)
def test_pins_are_what_the_project_declares(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["study"]]
    pins = pinned(name)
    for requirement in map(Requirement, declared):
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement
        if name == "requirements-floor.txt":
            least = [each.version for each in requirement.specifier if each.operator == ">="]
            assert least in ([], [str(version)]), requirement


# googlecolab/backend-info, pip-freeze.tpu.txt, 2026-08-19: those of its packages that are here.
COLAB = """
array_record==0.8.3 chex==0.1.90 etils==1.14.0 flax==0.11.2 jax==0.7.2 jaxlib==0.7.2
matplotlib==3.10.0 numpy==2.1.3 optax==0.2.8 orbax-checkpoint==0.12.4 scikit-learn==1.6.1
tensorflow-datasets==4.9.10
"""


def test_the_oldest_versions_are_those_of_colab():
    lines = (ROOT / "requirements-floor.txt").read_text().splitlines()
    assert set(COLAB.split()) <= set(lines)


def test_no_package_is_older_on_a_newer_lane():
    oldest, middle, newest = (pinned(name) for name in (PINS[1], PINS[0], PINS[2]))
    for older, newer in ((oldest, middle), (middle, newest)):
        for package in older.keys() & newer.keys():
            assert older[package] <= newer[package], package
    assert newest["jax"] == newest["jaxlib"] >= Version("0.12")


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process has all tests")
def test_tests_of_a_file_share_a_worker(request):
    # Otherwise each worker makes and compiles what the file's tests share.
    assert request.node.nodeid.endswith("@test_packaging.py")
