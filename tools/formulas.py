"""Formulas as MathML, which browsers draw by themselves: no script, no network."""

from __future__ import annotations

import html
import re

from latex2mathml.converter import convert

CODE = r"<(?P<tag>code|pre|script|style)\b.*?</(?P=tag)>"  # where a dollar is a dollar; a formula has no tag inside
FORMULA = re.compile(rf"{CODE}|(?P<mark>\$\$?)(?P<tex>[^$<]+?)(?P=mark)", re.DOTALL)
PLUS_MINUS = "&#x000B1;"


def with_formulas(page: str) -> str:
    """The HTML with MathML in place of `$...$` and `$$...$$`, outside code."""
    return FORMULA.sub(lambda found: mathml(html.unescape(found["tex"]), found["mark"]) if found["tex"] else found[0], page)


def mathml(tex: str, mark: str = "$") -> str:
    """One formula: inline between single dollars, a block of its own between double ones."""
    words = re.sub(r"\\text\{[^}]*\}", lambda text: text[0].replace(r"\_", "_"), tex.strip())  # the converter shows the backslash
    formula = convert(words, display="inline" if mark == "$" else "block")
    formula = formula.replace(f"<mi>{PLUS_MINUS}</mi>", f"<mo>{PLUS_MINUS}</mo>")  # the converter's is a letter, without spaces
    return formula if mark == "$" else f'<span class="formula">{formula}</span>'  # which scrolls on a narrow screen
