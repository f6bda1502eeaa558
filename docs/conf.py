"""The documentation site: ``sphinx-build -W docs SITE``. Nothing is downloaded, and no notebook runs."""

import re
import tomllib
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

project = "skippipe-plugin"
author = "The skippipe-plugin developers"
copyright = author
version = release = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "sphinx_copybutton"]
exclude_patterns = ["examples/lightning_logs"]

html_theme = "furo"
html_title = "skippipe-plugin"

# Markdown. Headings get the anchors that they have on the web, so that links work in both places.
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # tests/docs/test_notebooks.py runs them
copybutton_prompt_text = "$ "

# The reference, from the docstrings. Every reference to a name of ours must resolve; others have no inventory offline.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
nitpicky = True
autodoc_inherit_docstrings = False  # so that Lightning's hooks are not listed
nitpick_ignore_regex = [
    ("py:.*", r"(?!skippipe_plugin\.).*"),
    ("py:class", r"skippipe_plugin(\.\w+){3,}"),  # of modules that are no pages, in signatures
]

# Documents outside of this folder, and the pages that they are here.
PAGES = {"benchmarks/README.md": "/results.md", "README.md": "/concepts.md"}


def setup(app: Sphinx) -> None:
    """Connect what is ours."""
    app.connect("source-read", lead_to_pages)
    leave_attributes_alone(app)


def lead_to_pages(app: Sphinx, name: str, source: list[str]) -> None:
    """Let links that are right in the repository lead to pages of the site."""
    for document, page in PAGES.items():
        source[0] = re.sub(rf"\]\((\.\./)+{re.escape(document)}", f"]({page}", source[0])
    # Sphinx follows the link docs/examples to its end, and finds the notebooks outside of this folder.
    source[0] = re.sub(r"\[([^]]+)\]\(/(examples/\w+)\.ipynb\)", r"{doc}`\1 </\2>`", source[0])


def leave_attributes_alone(app: Sphinx) -> None:
    """Keep napoleon from reading ``By stage: ...`` in the text below an attribute as a type."""
    kept: dict[str, list[str]] = {}

    def keep(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
        if what in ("attribute", "property", "data"):
            kept[name] = list(lines)

    def give_back(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
        if name in kept:
            lines[:] = kept.pop(name)

    app.connect("autodoc-process-docstring", keep, priority=1)
    app.connect("autodoc-process-docstring", give_back, priority=999)
