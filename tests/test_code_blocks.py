"""Every block of code of the texts runs, or is parsed only and says why.

A page's blocks run in their order, in one process and one empty folder, as a reader would who
follows the page: Python in one namespace, shell commands in that folder. What follows "It prints"
is what they print; Python that begins with the name of a file is that file. A comment before a
block says otherwise:

    <!-- parsed: full scale -->     too long for a test, or needs what the machine lacks (`REASONS`)
    <!-- about: 25 -->              each number printed may be that far from the one shown
"""

import importlib.util
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import jax
import pytest
import tyro

from jdistill import commands
from jdistill.commands import _attack, _defend, _plan, _report, _verdict
from tests.pages import CODE, OTHERS, PAGES, ROOT, blocks, code

REASONS = ("full scale", "cloud", "installs", "in a checkout", "after a run at full scale")
# Those of which a run is over in some seconds, of small networks or none.
QUICK = {"docs/attacks.md", "docs/guides/bounds.md"}


def runs(page):
    """The blocks that a test runs."""
    return [block for block in code(page) if not block.comment]


PAGES_WITH_CODE = [page for page in PAGES if code(page)]
# The page's blocks, each after a line that tells their outputs apart, in one process.
RUNNER = """
import json, pathlib, re, subprocess, sys
names = {"__name__": "__main__"}
with open(sys.argv[1]) as file:
    program = json.load(file)
for number, (language, text, place) in enumerate(program):
    print(f"{sys.argv[2]} {number}", flush=True)
    if language == "python" and (file := re.match(r"# (\\w+\\.py)\\n", text)):
        pathlib.Path(file[1]).write_text(text)
    elif language == "python":
        exec(compile(text, place, "exec"), names)
    else:
        shell = ["bash", "-euo", "pipefail", "-c", text]
        subprocess.run(shell, check=True, stdin=subprocess.DEVNULL)
    sys.stdout.flush()
"""
MARK = "==== block"


def parse_plan(arguments):
    _, rest = tyro.cli(_plan.Options, args=arguments[1:], return_unknown_args=True)
    if not arguments[0].endswith(".py"):
        _defend.parse([arguments[0], *rest])


def parse_plain(options):
    """A parser of a command all of whose arguments are those of its options."""
    return lambda arguments: tyro.cli(
        options, args=arguments, config=(tyro.conf.OmitArgPrefixes,), console_outputs=False
    )


PARSERS = {
    "defend": lambda arguments: arguments[0].endswith(".py") or _defend.parse(arguments),
    "attack": _attack.parse,
    "plan": parse_plan,
    "report": parse_plain(_report.Options),
    "verdict": parse_plain(_verdict.Options),
}


def readme_claims(printed):
    """Distillation halves what FGSM finds, takes nothing from C&W, and is found out."""
    form = r"^T=(\d+): FGSM fools (\d+)%, C&W (\d+)%$"
    found = re.findall(form, printed, re.MULTILINE)
    (plain, fgsm, cw), (distilled, less, other) = ([int(part) for part in row] for row in found)
    assert (plain, distilled) == (1, 20)
    assert less < fgsm / 2
    assert min(cw, other) >= 99


def tutorial_claims(printed):
    """What the page says of the table's last three columns, and of the verdicts."""
    rows = [line.split() for line in printed.splitlines() if re.search(r"(?: +-?[\d.]+){3}$", line)]
    plain, *_, student = rows[0][-4:], rows[-1][-4:]
    (zero, _, pgd, margin), (zeros, _, less, other) = (map(float, row) for row in (plain, student))
    assert zero < 5
    assert zeros > 50
    assert less < pgd / 3
    assert min(margin, other) > 85
    assert len(re.findall(r"^T = 50, student .*: masked$", printed, re.MULTILINE)) == 2
    assert re.search(r"exactly zero or not finite for", printed)
    left = r"^(\w+): (\d+)% left by everything tried \((.*)\)$"
    (_, none, masked), (_, half, label) = re.findall(left, printed, re.MULTILINE)
    assert int(none) < 5
    assert masked == "masked"
    assert int(half) > 40
    assert label in ("no sign of masking", "weak attack")


CLAIMS = {"README.md": readme_claims, "docs/tutorial.md": tutorial_claims}


@pytest.mark.parametrize("page", PAGES)
def test_languages_and_comments_are_known(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    fences = re.findall(r"^```.*$", text, re.MULTILINE)
    assert not len(fences) % 2, "a block is not closed"
    # What these would hide from the tests.
    assert not re.findall(r"^ +```(?:python|sh)|^ *~~~", text, re.MULTILINE)
    assert not re.findall(r"prints:?\n+(?:<!--.*\n)?```text", re.sub("It prints\n", "", text))
    for block in blocks(page):
        assert block.language in CODE | OTHERS, f"{page}:{block.line}: {block.language}"
        if block.comment and block.language in CODE:
            kind, _, reason = block.comment.partition(": ")
            assert (kind, reason in REASONS) == ("parsed", True), f"{page}:{block.line}"


@pytest.mark.parametrize(
    "page",
    [
        page if page in QUICK else pytest.param(page, marks=pytest.mark.slow)
        for page in PAGES_WITH_CODE
        if runs(page)
    ],
)
def test_blocks_run(page, tmp_path):
    program = [(block.language, block.text, f"{page}:{block.line}") for block in runs(page)]
    (tmp_path / "blocks.json").write_text(json.dumps(program))
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        "PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUNNER, str(tmp_path / "blocks.json"), MARK],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,  # against a hang
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    printed = re.split(rf"^{MARK} \d+\n", done.stdout, flags=re.MULTILINE)[1:]
    assert len(printed) == len(program)
    if page in CLAIMS:
        CLAIMS[page]("".join(printed))
    for block, found in zip(runs(page), printed, strict=True):
        if block.printed is not None:
            assert_prints(found, block.printed, block.tolerance, f"{page}:{block.line}")


def assert_prints(found, shown, tolerance, place):
    """What a block printed is what the page shows: the words exactly, the numbers nearly."""
    number = r"[-−]?\d+(?:\.\d+)?"
    if not tolerance:
        assert found == shown, place
    blank = re.compile(rf"\s*{number}")
    assert blank.sub("#", found) == blank.sub("#", shown), f"{place}: {found}"
    pairs = zip(re.findall(number, found), re.findall(number, shown), strict=True)
    for one, other in pairs:
        one, other = (float(each.replace("−", "-")) for each in (one, other))
        assert abs(one - other) <= tolerance, f"{place}: {found}"


def test_numbers_may_be_near_and_words_not():
    assert_prints("a  3.5 b\n", "a 4 b\n", 1, "here")
    for found in ("a 6 b\n", "c 4 b\n", "a 4 4 b\n"):
        with pytest.raises(AssertionError):
            assert_prints(found, "a 4 b\n", 1, "here")
    with pytest.raises(AssertionError):
        assert_prints("a 4.1\n", "a 4\n", 0, "here")


@pytest.mark.parametrize("page", PAGES_WITH_CODE)
def test_blocks_are_parsed(page):
    """Also those that no test runs: Python compiles, and programs understand their arguments."""
    for block in code(page):
        place = f"{page}:{block.line}"
        if block.language == "python":
            compile(block.text, place, "exec")
            continue
        checked = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
        assert not checked.returncode, f"{place}: {checked.stderr}"
        for line in lines_of(block.text):
            check_command(line, place)


def lines_of(text):
    """The commands of a block as words, without comments and what they pipe to."""
    joined = re.sub(r"\\\n", " ", text)
    for line in re.split(r"\n| && ", joined):
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=\S*|\$|nohup|time", words[0]):
            words.pop(0)
        for end in ("|", ">", "2>&1", "&"):
            if end in words:
                words = words[: words.index(end)]
        if words:
            yield words


def check_command(words, place):
    """A program of the project exists, and the command `jdistill` knows the options."""
    if words[0] == "jdistill":
        name, arguments = words[1], words[2:]
        assert set(PARSERS) == set(commands._COMMANDS)
        if "--help" not in arguments:
            PARSERS[name](arguments)  # an unknown option or value is an error
    elif words[0] == "make":
        makefile = (ROOT / "Makefile").read_text()
        for target in (word for word in words[1:] if not re.search(r"=|^-", word)):
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"{place}: {words}"
    elif words[0].endswith("python") and words[1].endswith(".py"):
        assert (ROOT / words[1]).exists(), f"{place}: {words}"
    elif words[:2] == ["python", "-m"] and words[2].startswith("experiments"):
        assert importlib.util.find_spec(words[2]), f"{place}: {words}"
