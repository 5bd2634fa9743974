"""The wheel holds the library alone, typed, and the pins name no index and no path."""

import os
import pathlib
import re
import subprocess
import sys
import zipfile

import pytest

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


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-floor.txt"])
def test_pins_are_plain_exact_versions(name):
    lines = (ROOT / name).read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 20
    for pin in pins:
        assert re.fullmatch(r"[A-Za-z0-9_.\-]+==[A-Za-z0-9_.+!]+", pin), pin


def test_floor_pins_are_the_declared_floor():
    declared = (ROOT / "pyproject.toml").read_text()
    pins = dict(
        line.lower().split("==")
        for line in (ROOT / "requirements-floor.txt").read_text().splitlines()
        if "==" in line
    )
    for name, version in re.findall(r'"([a-z_\-]+)>=([0-9.]+)"', declared):
        assert pins[name] == version, name


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="one process has all tests")
def test_tests_of_a_file_share_a_worker(request):
    # Otherwise each worker makes and compiles what the file's tests share.
    assert request.node.nodeid.endswith("@test_packaging.py")
