"""Sphinx settings: MyST pages, the API from docstrings, executed tutorials, the furo theme. Builds offline too."""

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
# From the gallery, Sphinx reads only the pages, not the scripts, the notebooks or the timings next to them.
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
# Types and shapes are described under Args; signatures show only names and defaults.
autodoc_typehints = "none"
napoleon_numpy_docstring = False
# Returns is a sentence, which may contain a colon; it is not a type to link to.
napoleon_use_rtype = False

# The copy button takes input lines without their prompts; output of a tutorial has no button.
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
    "sharpness.py",
    "heat_equation.py",
    "meta_learning.py",
    "influence.py",
    "hyperparameters.py",
    "lyapunov_exponents.py",
    "checkpointing.py",
]
sphinx_gallery_conf = {
    "examples_dirs": "../examples/tutorials",
    "gallery_dirs": "tutorials",
    # Run every script in every build, even an unchanged one: the library may have changed.
    # `-D plot_gallery=0` builds the pages without running the scripts.
    "filename_pattern": "",
    "run_stale_examples": True,
    # The order on the page; a script that is not listed is an error.
    "within_subsection_order": ExplicitOrder(TUTORIALS),
    "image_srcset": ["2x"],
    # Show only what a cell prints, not the repr of its last expression (a figure, for example).
    "capture_repr": (),
    "remove_config_comments": True,
    "write_computation_times": False,
    "download_all_examples": False,
    "show_signature": False,
}

logger = logging.getLogger(__name__)


def draw_figures(app: Sphinx) -> None:
    """Draw the figures of the pages again in every build, so that they show what the code does now."""
    folder = Path(app.srcdir) / "_static" / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    for script in sorted(Path(app.srcdir, "figures").glob("*.py")):
        runpy.run_path(str(script))["draw"](folder)


def unreached_is_news(record: standard_logging.LogRecord) -> bool:
    """Log an inventory that cannot be fetched as information: the warning has no type, so it cannot be suppressed."""
    if str(record.msg).startswith("failed to reach any of the inventories"):
        record.levelno, record.levelname = standard_logging.INFO, "INFO"
    return True


def is_of_unreached_inventory(app: Sphinx, _: Domain | None, node: Element) -> bool | None:
    """Whether an unknown name may be in an inventory that was not fetched; it then stays plain text."""
    package = node.get("reftarget", "").partition(".")[0]
    name = "python" if package in sys.stdlib_module_names else package
    known = InventoryAdapter(app.env).named_inventory
    return True if name in app.config.intersphinx_mapping and name not in known else None


def check_local_links(app: Sphinx, exception: Exception | None) -> None:
    """Warn about every link in the pages whose file or anchor does not exist."""
    if exception is None and app.builder.format == "html":
        for page, link in broken_links(Path(app.outdir)):
            logger.warning("%s: the link %r leads nowhere", page, link, type="local_links")


def setup(app: Sphinx) -> None:
    standard_logging.getLogger("sphinx.sphinx.ext.intersphinx").addFilter(unreached_is_news)
    app.connect("builder-inited", draw_figures)
    app.connect("warn-missing-reference", is_of_unreached_inventory)
    # After the gallery has added its links to the pages.
    app.connect("build-finished", check_local_links, priority=900)
