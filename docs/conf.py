"""The site: `make site` builds it with warnings as errors.

A public name that no page of `docs/api` documents ends the build; a link that leads nowhere is a
warning.
"""

import importlib
import inspect
import json
import pathlib
import posixpath
import re
import sys
import tomllib
from typing import Any

import jax
import sphinx.errors
from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

import jdistill

DOCS = pathlib.Path(__file__).parent
ROOT = DOCS.parent
with (ROOT / "pyproject.toml").open("rb") as file:
    REPOSITORY = tomllib.load(file)["project"]["urls"]["Repository"]

project = "jdistill"
author = "The jdistill authors"
copyright = author
version = release = jdistill.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
# Pages of the repository that are pages of the site, too, by their names there.
COPIES = {
    "CHANGELOG.md": "copies/changelog.md",
    "CONTRIBUTING.md": "copies/contributing.md",
    "experiments/README.md": "copies/experiments.md",
    "experiments/tpu/README.md": "copies/tpu.md",
    **{
        str(path.relative_to(ROOT)): f"copies/{path.name}"
        for path in sorted((ROOT / "colab").glob("*.ipynb"))
    },
}
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_html_meta = {
    "description": "Defensive distillation through teacher assistants in JAX and Flax, and the "
    "evidence of what its robustness is worth."
}
nb_execution_mode = "off"  # the notebooks keep their outputs
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
autosummary_generate = True
autosummary_imported_members = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
default_role = "py:obj"  # a link where the name is one of the library's, else code
maximum_signature_line_length = 88
add_module_names = False
python_use_unqualified_type_names = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_title = f"jdistill {release}"
html_static_path = ["_static"]
html_favicon = "_static/icon.svg"
html_theme_options = {
    "source_repository": f"{REPOSITORY}/",
    "source_branch": "main",
    "source_directory": "docs/",
    "footer_icons": [],
}


def with_links_of_the_site(text: str, source: str, target: str) -> str:
    """The text of the repository's file `source` as the page `target`, whose links lead on.

    Links to pages of the site are made relative to it, those to other files of the repository lead
    to the repository.
    """

    def rewritten(match: re.Match[str]) -> str:
        label, link, anchor = match["label"], match["link"], match["anchor"] or ""
        if re.match(r"\w+:|#", link):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
        if path in COPIES:
            page = COPIES[path]
        elif path.startswith("docs/"):
            page = path.removeprefix("docs/")
        else:
            kind = "tree" if (ROOT / path).is_dir() else "blob"
            return f"{label}({REPOSITORY}/{kind}/main/{path}{anchor})"
        here = posixpath.dirname(target)
        return f"{label}({posixpath.relpath(page, here or '.')}{anchor})"

    pattern = r"(?P<label>\[(?:[^\[\]]|\[[^\]]*\])*\])\((?P<link>[^()\s#]+)(?P<anchor>#[^()\s]*)?\)"
    return re.sub(pattern, rewritten, text)


def folded(notebook: str) -> str:
    """The notebook with cells folded that Colab shows as a form."""
    content = json.loads(notebook)
    for cell in content["cells"]:
        if cell["metadata"].get("cellView") == "form":
            cell["metadata"]["tags"] = ["hide-input"]
    return json.dumps(content, indent=1, ensure_ascii=False)


def copy_pages(app: Sphinx) -> None:
    """Copies the pages of `COPIES` into the site's sources; drops pages of names that are gone."""
    del app
    names = public_names()
    for stub in (DOCS / "api" / "generated").glob("*.rst"):
        if stub.stem not in names:
            stub.unlink()
    for source, target in COPIES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        if source.endswith(".md"):
            text = with_links_of_the_site(text, source, target)
        else:
            text = folded(text)
        path = DOCS / target
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def link_sources(app: Sphinx, name: str, content: list[str]) -> None:
    """Makes the links of a page out of `docs` links of the site."""
    if app.env.doc2path(name).suffix == ".md" and not name.startswith("copies/"):
        content[0] = with_links_of_the_site(content[0], f"docs/{name}.md", f"{name}.md")


def public_names() -> set[str]:
    """Dotted names of all that is public: of the modules and what is in them."""
    modules = {
        f"jdistill.{name}" for name in jdistill.__all__ if inspect.ismodule(getattr(jdistill, name))
    }
    return modules | {
        f"{module}.{name}" for module in modules for name in importlib.import_module(module).__all__
    }


def check_reference(app: Sphinx, env: Any) -> None:
    """Fails where a public name has no entry in the API reference."""
    del app
    documented = env.domaindata["py"]["objects"].keys() | env.domaindata["py"]["modules"].keys()
    missing = public_names() - documented
    if missing:
        raise sphinx.errors.ExtensionError(
            f"expected every public name in docs/api, got none of {', '.join(sorted(missing))}; "
            "add them to the page of their module"
        )


def name_unions(
    app: Sphinx,
    what: str,
    name: str,
    thing: Any,
    options: Any,
    signature: str | None,
    returns: str | None,
) -> tuple[str, str] | None:
    """Says `ArrayLike` where autodoc spells out the union, and writes defaults as Python."""
    del app, what, name, thing, options
    if signature is None:
        return None
    unions = [
        r"(?:~?[\w.]+\.)?Array \| (?:~?[\w.]+\.)?ndarray(?: \| ~?[\w.]+)* \| complex",
        r"~?[\w.]*ArrayLike",
    ]
    found = [re.sub("|".join(unions), "ArrayLike", each or "") for each in (signature, returns)]
    defaults = re.sub(r"<(?:function|class) '?([\w.]+)[^>]*>", r"\1", found[0])
    return defaults.replace("<factory>", "..."), found[1]


def document_constants(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]
) -> None:
    """Gives a constant the `#:` comment of the private file that its package has it from."""
    del app, thing, options
    package, _, constant = name.rpartition(".")
    if what != "data":
        return
    for module in [each for each in sys.modules if each.startswith(f"{package}._")]:
        found = ModuleAnalyzer.for_module(module).find_attr_docs().get(("", constant))
        if found:
            lines[:] = found


def level_captions(
    app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: Any
) -> None:
    """Gives the captions of the navigation, which are headings, the level that these must have."""
    del app, page, template, doctree
    tree = context.get("furo_navigation_tree", "")
    context["furo_navigation_tree"] = tree.replace(
        'role="heading"', 'role="heading" aria-level="2"'
    )


def setup(app: Sphinx) -> None:
    """Connects the functions above to the build."""
    jax.config.update("jax_platforms", "cpu")
    app.connect("builder-inited", copy_pages, priority=100)  # before autosummary
    app.connect("source-read", link_sources)
    app.connect("autodoc-process-signature", name_unions)
    app.connect("autodoc-process-docstring", document_constants)
    app.connect("html-page-context", level_captions, priority=900)  # after the theme
    app.connect("env-check-consistency", check_reference)
