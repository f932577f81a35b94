"""The site as a reader gets it: every link leads somewhere, nothing is fetched, answers are folded, formulas are drawn."""

import html.parser
from urllib.parse import urlsplit

import pytest

import slides
import website
from browser import NEEDS_CHROMIUM, chromium, watched

LOADED = {"img": "src", "script": "src", "link": "href", "iframe": "src"}  # what a browser fetches by itself


class Page(html.parser.HTMLParser):
    """The tags of a page, with their attributes."""

    def __init__(self, text):
        super().__init__()
        self.tags = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def values(self, *names):
        return [attributes[name] for _, attributes in self.tags for name in names if name in attributes]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """path -> page of the whole site."""
    folder = tmp_path_factory.mktemp("site")
    website.Site(folder).write()
    slides.write(folder / "slides")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 15e6
    return {path: Page(path.read_text(encoding="utf-8")) for path in folder.rglob("*.html")}


@NEEDS_CHROMIUM
def test_a_reader_opens_the_site_from_a_file(pages):
    paths = [path for path in pages if path.name in ("index.html", "explorer.html", "01_weight_types.html", "tables.html")]
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 360, "height": 740})
        complaints = watched(page)
        for path in paths:
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= 360, (path, "wider than a phone")
            if path.parent.name != "slides" and path.name in ("index.html", "explorer.html") and path.parent.name != "minimoe":
                page.wait_for_selector(".minimoe-lr svg .star")
        assert not complaints


def test_the_site_has_every_notebook_and_document(pages):
    names = {path.name for path in pages}
    assert {f"{path.stem}.html" for path in (website.ROOT / "notebooks").glob("*.ipynb")} <= names
    assert {"index.html", "explorer.html", "tables.html", "findings.html", "teaching.html", "bibliography.html"} <= names


def test_every_link_leads_somewhere(pages):
    for path, page in pages.items():
        for link in page.values("href", "src"):
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / parts.path).resolve() if parts.path else path
            assert target.is_file(), (path.name, link)
            if parts.fragment:
                assert parts.fragment in pages[target].values("id", "name"), (path.name, link)


def test_nothing_is_fetched_from_elsewhere(pages):
    for path, page in pages.items():
        for tag, attributes in page.tags:
            address = attributes.get(LOADED.get(tag), "")
            assert urlsplit(address).scheme in ("", "data"), (path.name, address[:80])


def test_every_picture_says_what_it_shows(pages):
    for path, page in pages.items():
        for tag, attributes in page.tags:
            assert tag != "img" or attributes.get("alt"), (path.name, attributes["src"][:80])


def test_answers_are_folded_and_formulas_drawn(pages):
    (page,) = (page for path, page in pages.items() if path.name == "01_weight_types.html")
    assert ("summary", {}) in page.tags
    assert not any("open" in attributes for tag, attributes in page.tags if tag == "details")
    assert sum(tag == "math" for tag, _ in page.tags) > 50


def test_a_link_to_what_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"docs/x.md links to nowhere.md, which does not exist"):
        website.Site(tmp_path).page("docs/x.md", "x", '<a href="nowhere.md">x</a>')


def test_a_dollar_in_code_stays():
    text = website.formatted("`a $x$ b` and $x^2$, \\$5\n\n```\n$HOME$\n```\n")
    assert "a $x$ b" in text
    assert "$HOME$" in text
    assert text.count("<math") == 1


def test_formulas_are_what_the_latex_says():
    assert "<mo>&#x000B1;</mo>" in website.formatted(r"$0.39 \pm 0.10$"), "an operator, with spaces around it"
    assert "<mtext>fan_in</mtext>" in website.formatted(r"$\text{fan\_in}$"), "no backslash"
    assert 'display="inline"' in website.formatted("$x$")
    assert 'display="block"' in website.formatted("$$x$$")


def test_rule_lines_are_those_of_the_tables():
    lines = (website.ROOT / "minimoe" / "tables.py").read_text().splitlines()
    assert "hidden=Rule(" in lines[website.rule_line(website.PARAMETRIZATIONS["mup"], "experts_up") - 1]
    assert '"fork router"' in lines[website.rule_line(website.ROUTER_RULES["fork router"], "router") - 1]


def test_sections():
    assert website.section("x\n## A\nb\n## C\nd", "A") == "b"
    with pytest.raises(ValueError, match="no section 'B'"):
        website.section("x", "B")
