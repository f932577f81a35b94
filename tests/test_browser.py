"""Notebook 04 in JupyterLab, in a real browser: run it, move a slider by the keyboard, train a live sweep, save, reopen.

See browser.py for what it needs.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from browser import NEEDS_CHROMIUM, chromium
from minimoe.explorer import TO_DO

ROOT = Path(__file__).parent.parent
NOTEBOOK = "04_lr_transfer.ipynb"
# While cells run Lab moves the focus from cell to cell.
ALL_RUN = "window.jupyterapp.shell.currentWidget.content.widgets.every(c => c.model.type !== 'code' || c.model.executionCount)"
ERROR = re.compile("model not found|Error displaying widget")
# The indicator on the page says "idle" before there is a kernel, and who runs cells then is asked to select one.
KERNEL_CONNECTED = "window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.connectionStatus === 'connected'"

pytestmark = NEEDS_CHROMIUM


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """The folder of a JupyterLab that serves copies of notebook 04 and the shipped sweeps, and the notebook's address."""
    folder = tmp_path_factory.mktemp("course")
    shutil.copytree(ROOT / "data", folder / "data")
    (folder / "notebooks").mkdir()
    shutil.copy(ROOT / "notebooks" / NOTEBOOK, folder / "notebooks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = [
        "--no-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--IdentityProvider.token=test",
        "--LabApp.expose_app_in_browser=True",
        f"--ServerApp.root_dir={folder}",
    ]
    if os.geteuid() == 0:
        settings.append("--allow-root")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with open(folder / "lab.log", "wb") as log:
        server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *settings], stdout=log, stderr=log, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(f"{address}/api?token=test", server, folder / "lab.log")
        yield folder, f"{address}/doc/tree/notebooks/{NOTEBOOK}?reset&token=test"
    finally:
        server.terminate()
        server.wait(30)


def wait_for(address, server, log, seconds=90):
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except OSError:
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"JupyterLab did not start:\n{log.read_text()[-2000:]}") from None
            time.sleep(0.5)


@pytest.fixture(scope="module")
def page(lab):
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(120_000)
        open_notebook(page, lab)
        yield page


def open_notebook(page, lab):
    """Open it with a new kernel."""
    address, token = lab[1].split("/doc/")[0], {"Authorization": "token test"}
    for session in json.load(urllib.request.urlopen(urllib.request.Request(f"{address}/api/sessions", headers=token))):
        gone = urllib.request.Request(f"{address}/api/sessions/{session['id']}", headers=token, method="DELETE")
        urllib.request.urlopen(gone)
    page.goto(lab[1])
    page.wait_for_function(KERNEL_CONNECTED)


def explorer_cell(page):
    """The cell of the LR explorer: its controls are a widget, its picture and its regrets are ordinary outputs."""
    return page.locator(".jp-CodeCell").filter(has_text="explorer = LRExplorer(frame)")


def live_cell(page):
    """The cell of the live sweep: its controls are a widget, its status is an ordinary output."""
    return page.locator(".jp-CodeCell").filter(has_text="live = LiveSweep(explorer)")


def screenshot(page, name):
    if folder := os.environ.get("MINIMOE_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / name)


def test_slider_and_live_sweep(page):
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    cell = explorer_cell(page)
    explorer = cell.locator(".minimoe-lr")
    explorer.locator("svg .star").first.wait_for()
    page.wait_for_function(ALL_RUN)
    cell.scroll_into_view_if_needed()
    regrets, still = explorer.locator("table"), cell.locator(".jp-RenderedImage img")
    before, picture = regrets.text_content(), still.get_attribute("src")
    assert not still.is_visible(), "the still picture is for readers without a kernel"
    explorer.get_by_label("my LR").focus()
    page.keyboard.press("ArrowRight")
    after = regrets.text_content()
    numbers = [[float(x) for x in re.findall(r"\d\.\d{3}", text)] for text in (before, after)]
    assert len(numbers[0]) >= 8
    assert numbers[0] != numbers[1], "the regrets move with the slider"
    cell.locator(".jp-RenderedHTML table", has_text="2^-5.75").wait_for(state="attached")  # the kernel has heard
    assert still.get_attribute("src") != picture
    screenshot(page, "explorer.png")
    train = page.get_by_role("button", name="Train now")
    train.scroll_into_view_if_needed()
    train.click()
    page.get_by_text("done: 6 of 6 runs").wait_for()
    screenshot(page, "live.png")
    cell.scroll_into_view_if_needed()
    explorer.get_by_text("Dashed: 6 live rows").wait_for()
    assert explorer.locator(".curve.live").count() == 1
    screenshot(page, "dashed.png")


def reopened_cells(page):
    """The two cells of controls: each is scrolled to, and shows what it said last."""
    for cell, words in ((live_cell(page), "done: 6 of 6 runs"), (explorer_cell(page), "Dashed: 6 live rows")):
        cell.scroll_into_view_if_needed()
        cell.get_by_text(words).wait_for()
        yield cell


def assert_shown(page, picture):
    image = explorer_cell(page).locator(".jp-RenderedImage img")
    image.wait_for()
    assert image.get_attribute("src").strip() == picture.strip()
    assert image.bounding_box()["height"] > 200


def test_a_saved_notebook_reopens_with_its_last_picture(page, lab):
    """After the test above: saved as it is, its kernel gone, opened again."""
    picture = explorer_cell(page).locator(".jp-RenderedImage img").get_attribute("src")
    page.keyboard.press("Control+s")
    page.wait_for_function("!window.jupyterapp.shell.currentWidget.context.model.dirty")
    open_notebook(page, lab)
    for cell in reopened_cells(page):
        place = cell.locator(".jp-OutputArea-output", has_text=ERROR)
        place.wait_for(state="attached")  # Lab's line is there, and is not seen
        assert not ERROR.search(cell.inner_text())
        instead = place.evaluate_handle("place => getComputedStyle(place, '::after')")
        assert instead.evaluate("style => [style.content, style.visibility]") == [f'"{TO_DO}"', "visible"]
    screenshot(page, "reopened.png")
    assert_shown(page, picture)


def test_a_notebook_that_someone_else_saved_reopens_with_its_last_picture(page, lab):
    """After the test above: changed outside JupyterLab, which therefore does not trust its outputs."""
    picture = explorer_cell(page).locator(".jp-RenderedImage img").get_attribute("src")
    path = lab[0] / "notebooks" / NOTEBOOK
    saved = json.loads(path.read_text())
    saved["cells"][0]["source"] = "By someone else"
    path.write_text(json.dumps(saved))
    open_notebook(page, lab)
    page.get_by_role("paragraph").filter(has_text="By someone else").wait_for()
    for cell in reopened_cells(page):
        cell.get_by_text(TO_DO).wait_for()
        assert not ERROR.search(cell.text_content())
    screenshot(page, "untrusted.png")
    assert_shown(page, picture)
