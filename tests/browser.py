"""A real browser for tests: Chromium (Debian's package, or the one that MINIMOE_CHROMIUM names).

Without one the tests are skipped, unless MINIMOE_REQUIRE_BROWSER is set, as it is in continuous integration.
"""

import os
import shutil
from contextlib import contextmanager

import pytest

CHROMIUM = os.environ.get("MINIMOE_CHROMIUM") or shutil.which("chromium")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
NEEDS_CHROMIUM = pytest.mark.skipif(
    not CHROMIUM and not os.environ.get("MINIMOE_REQUIRE_BROWSER"), reason="no Chromium: install Debian's package chromium"
)


@contextmanager
def chromium():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, "MINIMOE_REQUIRE_BROWSER is set, but there is no Chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def watched(page):
    """What the page has complained of: errors on its console, exceptions, requests that leave its own files."""
    found = []
    page.on("console", lambda message: message.type in ("error", "warning") and found.append(message.text))
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("request", lambda request: request.url.startswith(("file:", "data:", "blob:", "about:")) or found.append(request.url))
    return found
