"""Formulas as MathML, which browsers draw by themselves: no script, and no network, in the pages."""

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
    """The formula in MathML; where docutils cannot read it, its source and a warning."""
    source = node.astext()
    # LaTeX wants the underscores of a name escaped; docutils takes the name as it stands.
    unescaped = re.sub(r"\\operatorname\{[^}]*\}", lambda name: name[0].replace(r"\_", "_"), source)
    try:
        return tex2mathml(unescaped, as_block=as_block)
    except MathError as error:
        logger.warning("no MathML for %r: %s", source, error, location=node)
        return f"<code>{escape(source)}</code>"


def visit_inline(self: HTML5Translator, node: math) -> None:
    """Write a formula in a line, without its source behind it."""
    self.body.append(converted(node, as_block=False))
    node.clear()


def visit_display(self: HTML5Translator, node: math_block) -> None:
    """Write a formula on a line of its own, which scrolls where it is too long."""
    self.body.append(f'<div class="formula">{converted(node, as_block=True)}</div>')
    node.clear()


def depart(self: HTML5Translator, node: math | math_block) -> None:
    """Everything is written on the way in."""


def setup(app: Sphinx) -> dict[str, bool]:
    """Offer the renderer to Sphinx, under the name that conf.py chooses."""
    app.add_html_math_renderer("mathml", (visit_inline, depart), (visit_display, depart))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
