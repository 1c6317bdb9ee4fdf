"""Sphinx configuration of the site: `make docs` builds docs/ into build/docs, warnings are errors.

Nothing is fetched by a reader's browser: Furo brings no web fonts, formulas become MathML here,
diagrams are SVG files of the repository (docs/decisions/0015-sphinx-builds-the-docs.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from docutils import nodes
from latex2mathml.converter import convert

if TYPE_CHECKING:
    from sphinx.application import Sphinx

project = "zaya-train"
copyright = "the zaya-train authors, Apache-2.0"
extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
nitpicky = True
# Indented blocks and blocks without a language are output, trees, formulas: no language to colour.
highlight_language = "text"

html_theme = "furo"
html_title = "zaya-train"
html_copy_source = False
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}


def visit_math(translator: Any, node: nodes.math) -> None:
    """A formula inside a line."""
    translator.body.append(convert(node.astext()))
    raise nodes.SkipNode


def visit_math_block(translator: Any, node: nodes.math_block) -> None:
    """A displayed formula; wider ones scroll inside the page."""
    formula = convert(node.astext(), display="block")
    translator.body.append(
        f'<div class="math-block" style="overflow: auto hidden; padding: 0.4em 0">{formula}</div>'
    )
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Formulas are MathML, which browsers draw themselves; Sphinx's MathJax would need the net."""
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))


html_math_renderer = "mathml"
