"""Write the course as static pages to site/: no installation, no network, no kernel.

The site mirrors the repository: a page is a file of the repository in another form (`docs/teaching.md` becomes
`docs/teaching.html`), so relative links stay right. The site holds what its pages link to, and nothing else. A link to a file
that does not exist is an error.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
from pathlib import Path, PurePosixPath

import nbformat
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_for_filename

from formulas import with_formulas
from minimoe import PARAMETRIZATIONS, Parametrization
from minimoe.pages import course_datasets, digests, explorer_fragment
from minimoe.parametrization import CELLS
from minimoe.tables import ROUTER_RULES

ROOT = Path(__file__).parent.parent
TEMPLATES = Path(__file__).parent / "templates"
MADE = ("index.html", "explorer.html", "tables.html", "slides/index.html")  # no file of the repository; slides.py makes the last
MENU = {
    "Explorer": "explorer.html",
    "Course": "README.md#the-course",
    "Tables": "tables.html",
    "Findings": "docs/findings.md",
    "Teaching": "docs/teaching.md",
    "Slides": "slides/index.html",
    "Papers": "docs/bibliography.md",
    "Code": "minimoe/model.py",
}
LINK = re.compile(r'\b(?P<attribute>href|src)="(?P<path>[^"#]*)(?P<place>#[^"]*)?"')
ELSEWHERE = re.compile(r"[a-z]+:|$", re.IGNORECASE)  # another site, data, or a place of the same page
HEADING = re.compile(r'<h([1-6]) id="[^"]*">(.*?)<a class="anchor-link"[^>]*>.*?</a></h\1>', re.DOTALL)
COARSE = {"attention": "hidden", "experts_up": "hidden", "experts_down": "hidden"}  # roles as tables.py writes them


class Site:
    """A folder of pages. `wanted`: the repository's files that pages link to, in the order of the links."""

    def __init__(self, folder: Path):
        self.folder, self.wanted = folder, {}
        self.templates = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True)
        notebook = str(TEMPLATES / "notebook.html.j2")
        self.notebooks = HTMLExporter(template_name="classic", template_file=notebook, exclude_anchor_links=False)

    def write(self) -> None:
        """Write all pages: those made for the site, then what they link to, then what that links to."""
        self.folder.mkdir(parents=True, exist_ok=True)
        style = (TEMPLATES / "site.css").read_text(encoding="utf-8") + HtmlFormatter().get_style_defs(".highlight")
        (self.folder / "site.css").write_text(style, encoding="utf-8")
        data = course_datasets(ROOT / "data" / "sweeps")
        readme = (ROOT / "README.md").read_text(encoding="utf-8")
        parts = {
            "explorer": explorer_fragment({"width": data["width"]}, {"tables": ["sp", "mup"]}),
            "course": formatted(section(readme, "The course")),
        }
        self.page("index.html", "minimoe: muP for Mixture-of-Experts", self.filled("start.html.j2", **parts))
        self.page("explorer.html", "Drag your learning rate", self.filled("explorer.html.j2", explorer=explorer_fragment(data)))
        tables = {"tables": PARAMETRIZATIONS, "routers": ROUTER_RULES, "cells": CELLS[:3], "line": rule_line}
        self.page("tables.html", "The tables", self.filled("tables.html.j2", **tables))
        done = set()
        while left := [path for path in self.wanted if path not in done]:
            for path in left:
                self.make(PurePosixPath(path))
                done.add(path)

    def make(self, path: PurePosixPath) -> None:
        """One file of the repository, as a page if it can be read as one, otherwise as it is."""
        source = ROOT / path
        match path.suffix:
            case ".md":
                self.page(path, path.stem, formatted(source.read_text(encoding="utf-8")))
            case ".ipynb":
                body, _ = self.notebooks.from_notebook_node(nbformat.read(source, as_version=4))
                self.page(path, path.stem, with_formulas(with_ids(body)))
            case ".py":
                body = f"<h1>{path}</h1>" + code(source.read_text(encoding="utf-8"), path.name)
                self.page(path, str(path), body)
            case _ if source.is_dir():
                self.page(path / "index.html", str(path), self.filled("folder.html.j2", folder=path, files=first_lines(source)))
            case _:
                (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, self.folder / path)

    def filled(self, template: str, **parts) -> str:
        return self.templates.get_template(template).render(**parts)

    def page(self, path: str | PurePosixPath, title: str, body: str) -> None:
        """Write the page of a file of the repository, with the site's menu and working links."""
        path = PurePosixPath(path)
        depth = len(path.parts) - 1
        parts = {"title": title, "body": body, "root": "../" * depth, "menu": MENU}
        text = LINK.sub(lambda link: self.followed(link, path), self.filled("page.html.j2", **parts))
        text = text.replace("SCRIPTS", " ".join(digests(text, "script")) or "'none'", 1)
        target = self.folder / page_of(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")

    def followed(self, link: re.Match, page: PurePosixPath) -> str:
        """The link of this page with the target's page in place of the file; the target is made, too."""
        if ELSEWHERE.match(link["path"]):
            return link[0]
        target = PurePosixPath(os.path.normpath(page.parent / link["path"]))
        if str(target) not in (*MADE, "site.css"):
            if not (ROOT / target).exists():
                raise ValueError(f"{page} links to {link['path']}, which does not exist")
            self.wanted.setdefault(str(target))
        return f'{link["attribute"]}="{os.path.relpath(page_of(target), page.parent)}{link["place"] or ""}"'


def page_of(path: PurePosixPath) -> PurePosixPath:
    """Where the site has a file of the repository."""
    if (ROOT / path).is_dir():
        return path / "index.html"
    if path.suffix == ".py":
        return path.with_name(f"{path.name}.html")
    return path.with_suffix(".html") if path.suffix in (".md", ".ipynb") else path


def formatted(text: str) -> str:
    """Markdown as HTML, with MathML for formulas."""
    return with_formulas(with_ids(markdown2html(text)))


def with_ids(page: str) -> str:
    """The HTML with an id for each heading that is its words in lower case, joined by hyphens, as links to sections expect."""

    def heading(found: re.Match) -> str:
        level, words = found.groups()
        plain = re.sub(r"<[^>]+>|[^\w\- ]", "", words).strip().lower().replace(" ", "-")
        return f'<h{level} id="{plain}">{words}</h{level}>'

    return HEADING.sub(heading, page)


def section(text: str, heading: str) -> str:
    """What a page of Markdown says below a heading of the second level. Raises ValueError if there is no such heading."""
    _, found, rest = text.partition(f"\n## {heading}\n")
    if not found:
        raise ValueError(f"no section {heading!r}")
    return rest.partition("\n## ")[0]


def code(text: str, name: str) -> str:
    """Highlighted code; line 27 has the id L27."""
    shown = highlight(text, get_lexer_for_filename(name), HtmlFormatter(linenos="inline", linespans="L"))
    return shown.replace('id="L-', 'id="L')


def first_lines(folder: Path) -> list[tuple[str, str]]:
    """Each Python file of a folder, with the first line of its docstring."""
    named = ((file.name, ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))) for file in sorted(folder.glob("*.py")))
    return [(name, (words or "").partition("\n")[0]) for name, words in named]


def rule_line(table: Parametrization, role: str) -> int:
    """The line of tables.py where the role's rule stands; of an edited table, the line of the edit."""
    lines = (ROOT / "minimoe" / "tables.py").read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines, 1) if f'"{table.name}"' in line)
    own = enumerate(lines[start : start + len(table.roles)], start + 1)
    return next((number for number, line in own if f"{COARSE.get(role, role)}=Rule(" in line), start)


if __name__ == "__main__":
    Site(ROOT / "site").write()
    print("site/index.html")
