"""Formulas as MathML, made when the site is built: no script, no network."""

import html
import re

from latex2mathml.converter import convert

# What pymdownx.arithmatex leaves of $...$ and $$...$$.
_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.S)
_DISPLAY = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.S)


def on_page_content(content: str, **_: object) -> str:
    """MkDocs calls this with the HTML of each page."""
    content = _INLINE.sub(lambda found: _mathml(found[1], 'inline'), content)
    return _DISPLAY.sub(lambda found: _mathml(found[1], 'block'), content)


def _mathml(formula: str, display: str) -> str:
    return convert(html.unescape(formula.strip()), display=display)
