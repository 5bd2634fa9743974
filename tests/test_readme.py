"""What README.md and the other texts say: the code runs, and what they point to exists."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
TEXTS = [
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "experiments/README.md"),
    *("docs/attacks.md", "docs/honest-evaluation.md", "docs/performance.md"),
]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language):
    """The README's fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def run(code, folder):
    """The code in a process of its own, as a reader would run it."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,  # against a hang; the slowest takes half a minute on a machine at rest
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quick_start_is_short():
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 15
    assert max(map(len, lines)) <= 100


@pytest.mark.slow
def test_quick_start_shows_the_contrast(tmp_path):
    def numbers(text):
        form = r"^T=(\d+): ([\d.]+)% right; FGSM fools (\d+)%, C&W (\d+)%$"
        return [[float(part) for part in row] for row in re.findall(form, text, re.MULTILINE)]

    quick_start, verdict = blocks("python")[:2]
    printed = run(quick_start + verdict, tmp_path)
    found = numbers(printed)
    (plain_t, plain_accuracy, plain_fgsm, plain_cw), (t, accuracy, fgsm, cw) = found
    assert (plain_t, t) == (1, 20)
    assert min(plain_accuracy, accuracy) >= 95
    assert fgsm < plain_fgsm / 2
    assert min(plain_cw, cw) >= 99
    # Another machine rounds otherwise, so the README's numbers are held to within some examples.
    shown = numbers(blocks("text")[0])
    for row, shown_row in zip(found, shown, strict=True):
        assert row == pytest.approx(shown_row, abs=15)
    label, text = printed.splitlines()[-1].split(": ", 1)
    shown_label, shown_text = blocks("text")[1].replace("\n", " ").split(": ", 1)
    assert label == shown_label == "masked"
    assert {"zero_gradients", "temperature_probe", "loss_gap"} <= set(re.findall(r"\w+", text))
    shares = [re.findall(r"([\d.]+) %", each) for each in (text, shown_text)]
    for share, shown_share in zip(*shares, strict=True):
        assert float(share) == pytest.approx(float(shown_share), abs=15)


def test_own_model_runs(tmp_path):
    code = blocks("python")[2]
    assert run(code, tmp_path).count("[") >= 9  # three arrays for each of three networks


@pytest.mark.slow
def test_a_sweep_runs(tmp_path):
    (code,) = blocks("python")[3:]
    printed = run(code, tmp_path)
    assert printed == "[False False False False False False] (6, 10)\n"


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    anchors = {
        re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    for target in targets:
        if target.startswith("https://"):
            continue
        if target.startswith("#"):
            assert target[1:] in anchors, target
        else:
            assert ((ROOT / name).parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("name", TEXTS)
def test_named_files_exist(name):
    """Files of the repository named in `backticks` are there."""
    text = (ROOT / name).read_text(encoding="utf-8")
    pattern = r"`((?:jdistill|experiments|tests|docs|colab|\.ci|\.github)/[\w./\-]*)`"
    for path in re.findall(pattern, text):
        assert (ROOT / path).exists(), path


def test_image_is_a_picture():
    (path,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert (ROOT / path).read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (experiments\.\w+)", README))))
def test_commands_exist(module):
    assert (ROOT / (module.replace(".", "/") + ".py")).exists()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"^make (\w+)", README, re.MULTILINE))))
def test_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def commands(program):
    """The lines that call a program of the experiments, without their comments."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    return [line.split("#")[0] for line in lines if f"experiments.{program} " in line]


def named_options(line):
    return {option.replace("-", "_") for option in re.findall(r"--([a-z][a-z\-]*)", line)}


def test_options_exist():
    from experiments import defend
    from experiments.recipes import Recipe

    fields = {*Recipe.__dataclass_fields__, *defend.Options.__dataclass_fields__, "help"}
    named = set().union(*map(named_options, commands("defend")))
    assert named
    assert named <= fields


def test_attack_commands_are_understood():
    from experiments import attack

    lines = commands("attack")
    assert len(lines) >= 4
    for line in lines:
        arguments = line.split("experiments.attack")[1].split()
        if "--help" not in arguments:
            attack.parse(arguments)  # an unknown option or value is an error


def test_license_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "APPENDIX: How to apply the Apache License to your work." in text
    assert text.endswith("limitations under the License.\n")
