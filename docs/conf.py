"""Sphinx: MyST pages, the API from docstrings, the furo theme. Builds without a network."""

from __future__ import annotations

import importlib.metadata
import runpy
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "autodiff"
author = "the autodiff contributors"
copyright = "2026, the autodiff contributors"
version = release = importlib.metadata.version("autodiff")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]
root_doc = "index"

html_theme = "furo"
html_static_path = ["_static"]
html_title = "autodiff"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
# Types are said in words under Args, with shapes; signatures keep names and defaults.
autodoc_typehints = "none"
napoleon_numpy_docstring = False
# What is returned is said in a sentence, which may have a colon; it is no type to link to.
napoleon_use_rtype = False


def draw_figures(app: Sphinx) -> None:
    """Draw the pages' figures, anew in every build: they show what the code does now."""
    folder = Path(app.srcdir) / "_static" / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    for script in sorted(Path(app.srcdir, "figures").glob("*.py")):
        runpy.run_path(str(script))["draw"](folder)


def setup(app: Sphinx) -> None:
    app.connect("builder-inited", draw_figures)
