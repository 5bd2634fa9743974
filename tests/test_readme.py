"""What README.md and the other texts say of the repository: links, files, addresses, numbers."""

import csv
import importlib.metadata
import re
import tomllib

import pytest

from tests.pages import PAGES, ROOT, code

README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TEXTS = PAGES


def test_the_readme_is_short():
    assert README.count("\n") <= 150
    for block in code("README.md"):
        lines = [line for line in block.text.splitlines() if line.strip()]
        assert len(lines) <= 15
        assert max(map(len, lines)) <= 116


def anchors(text):
    """The headings of a text, as GitHub and the site name them."""
    return {
        re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "[](" not in text, "a link without a text is empty on GitHub"
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        page = ((ROOT / name).parent / path) if path else ROOT / name
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(page.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", TEXTS)
def test_named_files_exist(name):
    """Files of the repository named in `backticks` are there."""
    text = (ROOT / name).read_text(encoding="utf-8")
    pattern = r"`((?:jdistill|experiments|tests|docs|colab|\.ci|\.github)/[\w./\-]*)`"
    for path in re.findall(pattern, text):
        assert (ROOT / path).exists(), path


def test_the_picture_says_what_its_table_does():
    (path,) = re.findall(r"^!\[[^\]]+\]\(([^)]+)\)", README, re.MULTILINE)
    assert "<svg" in (ROOT / path).read_text()[:500]
    with (ROOT / "docs/example/results.csv").open() as file:
        rows = list(csv.DictReader(file))

    def value(temperature, generation, attack, column="success_rate"):
        (found,) = [
            float(row[column])
            for row in rows
            if (float(row["temperature"]), row["generation"], row["attack"])
            == (temperature, generation, attack)
        ]
        return 100 * found

    caption = " ".join(README.split())
    student, teacher = ((100, "2"), (1, "0"))
    fgsm, pgd, margin = ("fgsm", "pgd", "pgd_margin")
    assert f"{value(*student, fgsm):.1f}% and {value(*student, pgd):.0f}% of the ex" in caption
    assert f"on {value(*teacher, fgsm):.1f}% and {value(*teacher, pgd):.0f}% against" in caption
    assert f"on {value(*student, fgsm, 'zero_gradient_fraction'):.0f}% of the examples" in caption
    assert f"on {value(*student, margin):.0f}% (against {value(*teacher, margin):.0f}%)" in caption
    assert all(float(row["success_rate"]) == 1 for row in rows if "carlini" in row["attack"])


def test_the_address_is_one():
    """`[project.urls]` has the repository's address; whoever else names it names the same."""
    repository = PROJECT["urls"]["Repository"]
    owner = repository.removeprefix("https://github.com/").partition("/")[0]
    assert PROJECT["urls"]["Documentation"] == f"https://{owner}.github.io/jdistill"
    assert PROJECT["urls"]["Changelog"] == f"{repository}/blob/main/CHANGELOG.md"
    texts = [ROOT / name for name in TEXTS]
    texts += [
        ROOT / "CITATION.cff",
        *(ROOT / "colab").glob("*.ipynb"),
        *(ROOT / ".github").rglob("*.yml"),
    ]
    found = 0
    for path in texts:
        text = path.read_text(encoding="utf-8")
        for address in re.findall(r"github\.com/([\w.-]+/jdistill)\b", text):
            assert f"https://github.com/{address}" == repository, path
            found += 1
        for address in re.findall(r"research\.google\.com/github/([\w.-]+/[\w.-]+)/", text):
            assert f"https://github.com/{address}" == repository, path
        for address in re.findall(r"https://([\w-]+)\.github\.io/jdistill", text):
            assert address == owner, path
    assert found >= 5


def test_the_citation_is_of_this_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {importlib.metadata.version('jdistill')}\n" in text
    assert f"\nlicense: {PROJECT['license']}\n" in text


def test_license_is_whole():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "APPENDIX: How to apply the Apache License to your work." in text
    assert text.endswith("limitations under the License.\n")
