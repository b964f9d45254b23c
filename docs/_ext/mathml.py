"""Mathematics as MathML, which browsers draw by themselves: nothing is fetched at view time."""

from __future__ import annotations

import re
from html import escape

from docutils.nodes import SkipNode
from latex2mathml.converter import convert


def _visit(display: str):
    def visit(translator, node):
        text = node.astext()
        tag = re.search(r"\\tag\{(.*?)\}", text)  # the number of an equation; MathML has none
        math = convert(re.sub(r"\\tag\{.*?\}", "", text), display=display)
        if display == "block":
            number = f'<span class="eqno">({escape(tag[1])})</span>' if tag else ""
            math = f'<div class="math">{number}{math}</div>'
        translator.body.append(math)
        raise SkipNode

    return visit


def setup(app):
    app.add_html_math_renderer("mathml", (_visit("inline"), None), (_visit("block"), None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
