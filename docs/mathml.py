"""Formulas as MathML, which browsers display without scripts and without network access."""

from __future__ import annotations

import re
from html import escape
from typing import TYPE_CHECKING

from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

if TYPE_CHECKING:
    from docutils.nodes import math, math_block
    from sphinx.application import Sphinx
    from sphinx.writers.html5 import HTML5Translator

logger = logging.getLogger(__name__)


def converted(node: math | math_block, *, as_block: bool) -> str:
    """The formula in MathML; if docutils cannot parse it, its source, with a warning."""
    source = node.astext()
    # LaTeX needs underscores in a name to be escaped; docutils takes the name literally.
    unescaped = re.sub(r"\\operatorname\{[^}]*\}", lambda name: name[0].replace(r"\_", "_"), source)
    try:
        return tex2mathml(unescaped, as_block=as_block)
    except MathError as error:
        logger.warning("no MathML for %r: %s", source, error, location=node)
        return f"<code>{escape(source)}</code>"


def visit_inline(self: HTML5Translator, node: math) -> None:
    """Write an inline formula, and skip its source."""
    self.body.append(converted(node, as_block=False))
    node.clear()


def visit_display(self: HTML5Translator, node: math_block) -> None:
    """Write a formula on its own line, which scrolls if it is too long."""
    self.body.append(f'<div class="formula">{converted(node, as_block=True)}</div>')
    node.clear()


def depart(self: HTML5Translator, node: math | math_block) -> None:
    """Do nothing: the visit has written everything."""


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer with Sphinx, under the name that conf.py selects."""
    app.add_html_math_renderer("mathml", (visit_inline, depart), (visit_display, depart))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
