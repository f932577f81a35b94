"""Write the deck of the 60-minute lecture to site/slides/: index.html for reveal.js, and lecture.pdf.

The deck is slides/lecture.ipynb with the figures that it holds (`make notebooks` runs it again). The PDF is printed by
Chromium (Debian's package, or the one that MINIMOE_CHROMIUM names). Press S for the notes of the speaker, Esc for an overview.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import nbformat
from nbconvert import SlidesExporter

from formulas import with_formulas
from minimoe import LRExplorer, read_sweep
from minimoe.pages import course_datasets, explorer_page
from website import ROOT, TEMPLATES

if TYPE_CHECKING:
    from playwright.sync_api import Browser

DECK = ROOT / "slides" / "lecture.ipynb"
CARRIER = importlib.util.find_spec("sphinx_revealjs")  # a package that brings reveal.js
if CARRIER is None:
    raise ModuleNotFoundError("the slides need reveal.js: pip install --no-deps sphinx-revealjs==3.2.1")
REVEAL = Path(CARRIER.submodule_search_locations[0]) / "_static" / "revealjs"
PARTS = ("dist/reveal.js", "dist/reveal.css", "plugin/notes/notes.js", "plugin/notes/speaker-view.html", "LICENSE")
THEME = "dist/theme/white.css"


def write(folder: Path) -> Path:
    """The deck as a page that needs nothing but the files beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    notebook = nbformat.read(DECK, as_version=4)
    template = str(TEMPLATES / "slides.html.j2")
    exporter = SlidesExporter(template_file=template, exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True)
    page, _ = exporter.from_notebook_node(notebook)
    (folder / "index.html").write_text(with_formulas(page), encoding="utf-8")
    sweeps = ROOT / "data" / "sweeps"
    data = course_datasets(sweeps)
    (folder / "explorer.html").write_text(explorer_page(data, "Drag your LR"), encoding="utf-8")
    (folder / "explorer.png").write_bytes(LRExplorer(read_sweep(sweeps / "transfer.jsonl")).image.value)  # for paper
    for part in PARTS:
        (folder / "reveal" / part).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(REVEAL / part, folder / "reveal" / part)
    theme = (REVEAL / THEME).read_text(encoding="utf-8")
    (folder / "reveal" / "theme.css").write_text(re.sub(r"@import [^;]*;", "", theme), encoding="utf-8")  # the system's fonts
    return folder / "index.html"


def print_pdf(page: Path, browser: Browser) -> Path:
    """The deck on paper, a page for each slide, with a still picture in place of its explorer."""
    tab = browser.new_page()
    tab.goto(f"{page.as_uri()}?print-pdf")
    tab.wait_for_function("Reveal.isReady() && document.querySelectorAll('.pdf-page').length > 1")
    written = page.parent / "lecture.pdf"
    tab.pdf(path=written, prefer_css_page_size=True, print_background=True)
    tab.close()
    return written


def main() -> None:
    page = write(ROOT / "site" / "slides")
    print(page.relative_to(ROOT))
    chromium = os.environ.get("MINIMOE_CHROMIUM") or shutil.which("chromium")
    if not chromium:
        print("no PDF: install Chromium (Debian's package), or name one by MINIMOE_CHROMIUM, and run this again")
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--headless", "--no-sandbox", "--disable-gpu"])
        print(print_pdf(page, browser).relative_to(ROOT))
        browser.close()


if __name__ == "__main__":
    main()
