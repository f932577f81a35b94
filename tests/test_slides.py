"""The deck in a real browser, from a file: every slide fits, has notes, and fetches nothing."""

import re

import nbformat
import pytest

import slides
from browser import NEEDS_CHROMIUM, watched

pytestmark = NEEDS_CHROMIUM
SIZE = {"width": 1280, "height": 800}


@pytest.fixture(scope="module")
def deck(tmp_path_factory):
    return slides.write(tmp_path_factory.mktemp("slides"))


@pytest.fixture(scope="module")
def page(deck, browser):
    page = browser.new_page(viewport=SIZE)
    complaints = watched(page)
    page.goto(deck.as_uri())
    page.wait_for_function("Reveal.isReady()")
    yield page
    assert not complaints


def test_every_slide_fits_and_has_notes_and_a_title(page):
    total = page.evaluate("Reveal.getTotalSlides()")
    assert total >= 20
    for number in range(total):
        page.evaluate(f"Reveal.slide({number}, 0, 99)")
        found = page.evaluate("""() => {
            const slide = Reveal.getCurrentSlide();
            const seen = [...slide.querySelectorAll("*")].filter(part => part.checkVisibility());
            const parts = seen.map(part => part.getBoundingClientRect());
            return [Math.min(...parts.flatMap(part => [part.left, part.top])), Math.max(...parts.map(part => part.right)),
                    Math.max(...parts.map(part => part.bottom)), slide.querySelector("aside.notes")?.textContent.trim(),
                    slide.querySelector("h1, h2")?.textContent];
        }""")
        least, right, bottom, notes, title = found
        assert least >= 0, title
        assert right <= SIZE["width"], title
        assert bottom <= SIZE["height"], title
        assert re.match(r"\d+ minutes?\b", notes), title


def test_the_speaker_sees_the_notes_of_a_slide_before_its_answer(page):
    """In the speaker's window, opened from a file: reveal.js hides notes that stand inside an answer."""
    number = page.evaluate("Reveal.getSlides().findIndex(slide => slide.querySelector('.fragment'))")
    page.evaluate("Reveal.slide(0)")
    with page.context.expect_page() as opened:
        page.keyboard.press("s")
    shown = opened.value.locator(".speaker-controls-notes .value")
    shown.get_by_text("One question for the hour").wait_for()
    page.evaluate(f"Reveal.slide({number}, 0, -1)")
    shown.get_by_text("notebook 01, section 1").wait_for()
    opened.value.close()
    assert page.locator(".fragment aside.notes").count() == 0


def test_the_minutes_of_the_notes_are_those_of_the_lecture(page):
    notes = page.locator("aside.notes").all_text_contents()
    assert sum(int(re.match(r"\s*(\d+)", own)[1]) for own in notes) == 60


def test_pictures_have_words_and_formulas_are_drawn(page):
    assert page.locator("img").count() > 8
    assert all(image.get_attribute("alt") for image in page.locator("img").all())
    assert page.locator("math").count() > 15
    assert "$" not in page.locator(".slides").inner_text()


def test_the_explorer_is_live_and_hears_its_own_keys(page):
    number = page.evaluate("Reveal.getSlides().findIndex(slide => slide.querySelector('iframe'))")
    page.evaluate(f"Reveal.slide({number})")
    explorer = page.frame_locator("iframe")
    explorer.get_by_label("my LR", exact=True).focus()
    before = explorer.locator(".mine").first.get_attribute("data-x")
    page.keyboard.press("ArrowLeft")
    assert float(explorer.locator(".mine").first.get_attribute("data-x")) == float(before) - 0.25
    assert page.evaluate("Reveal.getIndices().h") == number, "the deck stays on its slide"


def test_the_pdf_has_a_page_for_each_slide(page, deck, browser):
    printed = slides.print_pdf(deck, browser)
    pages = re.findall(rb"/Type\s*/Page\b(?!s)", printed.read_bytes())
    assert len(pages) == page.evaluate("Reveal.getTotalSlides()")


def test_every_cell_that_is_shown_holds_its_output():
    cells = [cell for cell in nbformat.read(slides.DECK, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.outputs for cell in cells if cell.metadata.slideshow.slide_type != "skip")
