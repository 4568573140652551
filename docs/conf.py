"""Sphinx: MyST pages, the API from docstrings, tutorials that run, the furo theme. Builds without a network."""

from __future__ import annotations

import importlib.metadata
import logging as standard_logging
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sphinx.ext.intersphinx import InventoryAdapter
from sphinx.util import logging
from sphinx_gallery.sorting import ExplicitOrder

sys.path.insert(0, str(Path(__file__).parent))
from local_links import broken_links

if TYPE_CHECKING:
    from docutils.nodes import Element
    from sphinx.application import Sphinx
    from sphinx.domains import Domain

project = "autodiff"
author = "the autodiff contributors"
copyright = "2026, the autodiff contributors"
version = release = importlib.metadata.version("autodiff")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
    "mathml",
]
# Of the gallery, Sphinx reads the pages; beside them lie the scripts, the notebooks and what was measured.
exclude_patterns = ["_build", "tutorials/*.py", "tutorials/*.ipynb", "sg_execution_times.rst"]
root_doc = "index"

html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_title = "autodiff"
html_math_renderer = "mathml"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
# Types are said in words under Args, with shapes; signatures keep names and defaults.
autodoc_typehints = "none"
napoleon_numpy_docstring = False
# What is returned is said in a sentence, which may have a colon; it is no type to link to.
napoleon_use_rtype = False

# Copied are the lines of input without their prompts; what a tutorial printed has no button.
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
copybutton_selector = "div:not(.sphx-glr-script-out) > div.highlight > pre"

intersphinx_mapping = {
    "numpy": ("https://numpy.org/doc/stable/", None),
    "optree": ("https://optree.readthedocs.io/en/latest/", None),
    "python": ("https://docs.python.org/3/", None),
    "torch": ("https://docs.pytorch.org/docs/stable/", None),
}
intersphinx_timeout = 10

TUTORIALS = [
    "per_sample_hessians_of_a_classifier.py",
    "newton.py",
    "hessian_spectrum.py",
    "heat_equation.py",
    "meta_learning.py",
    "influence.py",
    "lyapunov_exponents.py",
    "checkpointing.py",
]
sphinx_gallery_conf = {
    "examples_dirs": "../examples/tutorials",
    "gallery_dirs": "tutorials",
    # Every script is run in every build, whether it has changed or not: the library has.
    # `-D plot_gallery=0` builds the pages without running them.
    "filename_pattern": "",
    "run_stale_examples": True,
    # In the order in which they are read; a script that is not listed is an error.
    "within_subsection_order": ExplicitOrder(TUTORIALS),
    "image_srcset": ["2x"],
    # What the last line of a cell gives is shown only where it prints itself: no reprs of figures.
    "capture_repr": (),
    "remove_config_comments": True,
    "write_computation_times": False,
    "download_all_examples": False,
    "show_signature": False,
}

logger = logging.getLogger(__name__)


def draw_figures(app: Sphinx) -> None:
    """Draw the pages' figures, anew in every build: they show what the code does now."""
    folder = Path(app.srcdir) / "_static" / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    for script in sorted(Path(app.srcdir, "figures").glob("*.py")):
        runpy.run_path(str(script))["draw"](folder)


def unreached_is_news(record: standard_logging.LogRecord) -> bool:
    """Make an inventory that cannot be fetched a message instead of a warning, which has no type to suppress."""
    if str(record.msg).startswith("failed to reach any of the inventories"):
        record.levelno, record.levelname = standard_logging.INFO, "INFO"
    return True


def is_of_unreached_inventory(app: Sphinx, _: Domain | None, node: Element) -> bool | None:
    """Whether a name that was not found may be in an inventory that was not fetched; then it stays plain text."""
    package = node.get("reftarget", "").partition(".")[0]
    name = "python" if package in sys.stdlib_module_names else package
    known = InventoryAdapter(app.env).named_inventory
    return True if name in app.config.intersphinx_mapping and name not in known else None


def check_local_links(app: Sphinx, exception: Exception | None) -> None:
    """Warn of every link in the pages that leads to no file, or to no anchor in it."""
    if exception is None and app.builder.format == "html":
        for page, link in broken_links(Path(app.outdir)):
            logger.warning("%s: the link %r leads nowhere", page, link, type="local_links")


def setup(app: Sphinx) -> None:
    standard_logging.getLogger("sphinx.sphinx.ext.intersphinx").addFilter(unreached_is_news)
    app.connect("builder-inited", draw_figures)
    app.connect("warn-missing-reference", is_of_unreached_inventory)
    # After the gallery has put its links into the pages.
    app.connect("build-finished", check_local_links, priority=900)
