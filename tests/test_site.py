"""The site builds without a warning, and its pages are fit for readers with a screen reader."""

import html.parser
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.pages import ROOT

pytest.importorskip("sphinx")
PAGES = ("index", "tutorial", "guides/verdict", "guides/your_model", "gallery", "api/attacks")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built anew of a copy of its sources with warnings as errors."""
    folder = tmp_path_factory.mktemp("site")
    for name in ("docs", "colab", "experiments"):
        ignored = shutil.ignore_patterns("_build", "generated", "copies", "results", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for path in (
        *ROOT.glob("*.md"),
        ROOT / "pyproject.toml",
        ROOT / "LICENSE",
        ROOT / "CITATION.cff",
    ):
        shutil.copy(path, folder)
    for name in ("jdistill", "tests"):  # what the texts link to
        (folder / name).symlink_to(ROOT / name)
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", "site"],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=900,  # against a hang
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "site"


class Outline(html.parser.HTMLParser):
    """Headings of a page's article in their order, its pictures, links, and language."""

    def __init__(self, text):
        super().__init__()
        self.headings, self.pictures, self.links, self.ids = [], [], [], set()
        self.language = self.description = None
        self._in_article = 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.ids.add(named.get("id"))
        if tag == "html":
            self.language = named.get("lang")
        if tag == "meta" and named.get("name") == "description":
            self.description = named.get("content")
        if tag == "article":
            self._in_article += 1
        if re.fullmatch(r"h[1-6]", tag) and self._in_article:
            self.headings.append(int(tag[1]))
        if tag == "img":
            self.pictures.append(named)
        if tag == "a" and "href" in named:
            self.links.append(named["href"])

    def handle_endtag(self, tag):
        if tag == "article":
            self._in_article -= 1


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_an_outline_a_language_and_texts_for_its_pictures(site, page):
    outline = Outline((site / f"{page}.html").read_text(encoding="utf-8"))
    assert outline.language == "en"
    assert outline.description
    assert outline.headings[0] == 1
    assert outline.headings.count(1) == 1
    steps = zip(outline.headings, outline.headings[1:], strict=False)
    assert all(after <= before + 1 for before, after in steps), outline.headings
    for picture in outline.pictures:
        assert len(picture.get("alt", "")) > 20, picture


@pytest.mark.slow
def test_links_within_the_site_lead_somewhere(site):
    pages = {
        path: Outline(path.read_text(encoding="utf-8"))
        for path in site.rglob("*.html")
        if "_modules" not in path.parts and "_downloads" not in path.parts
    }
    assert len(pages) > 200
    for path, outline in pages.items():
        for link in outline.links:
            if re.match(r"\w+:", link):
                continue
            target, _, anchor = link.partition("#")
            there = pathlib.Path(os.path.normpath(path.parent / target)) if target else path
            assert there.exists(), f"{path.relative_to(site)}: {link}"
            if anchor and there in pages:
                assert anchor in pages[there].ids, f"{path.relative_to(site)}: {link}"


@pytest.mark.slow
def test_a_public_name_without_a_page_fails_the_build(site):
    folder = site.parent
    page = folder / "docs/api/norms.md"
    text = page.read_text()
    page.write_text(text.replace("   project\n", ""))
    shutil.rmtree(folder / "docs/api/generated")
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-b", "dummy", "docs", "broken"],
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    page.write_text(text)
    assert done.returncode
    assert "got none of jdistill.norms.project; add" in done.stderr
