"""What a lecturer hands out: the lab's sheets and copies, and notebooks that install what they need."""

import functools
import http.server
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import threading
from pathlib import Path

import nbformat
import pytest

import cloud
import handout
import website
from browser import NEEDS_CHROMIUM, chromium

RUBRIC = (website.ROOT / "docs" / "rubric.md").read_text()


def test_the_points_of_the_sheet_are_those_of_the_rubric():
    sheet = (website.ROOT / "docs" / "lab_sheet.md").read_text()
    rows = [line.split("|") for line in RUBRIC.splitlines() if line.startswith("|")][2:]
    assert sum(int(row[2]) for row in rows) == 20
    assert sheet.count("**Blank** (2 points)") == 4
    assert sheet.count("**Prediction** (1 point)") == 4
    assert sheet.count("(2 points): <span") == 2
    assert "**Mysteries** (4 points" in sheet


@NEEDS_CHROMIUM
def test_the_handout_has_the_labs_copies_and_sheets_that_print_on_three_pages(tmp_path):
    written = handout.write(tmp_path)
    assert [path.stem for path in written] == [*handout.LAB, "lab_sheet", "rubric"]
    assert all(not cell.get("outputs") for path in written[:4] for cell in nbformat.read(path, as_version=4).cells)
    with chromium() as browser:
        page = browser.new_page()
        page.goto((tmp_path / "lab_sheet.html").as_uri())
        assert page.locator("img").evaluate("image => image.naturalWidth") > 500
        assert page.locator("math").count() > 3
        page.pdf(path=tmp_path / "sheet.pdf", prefer_css_page_size=True)
    pages = re.findall(rb"/Type\s*/Page\b(?!s)", (tmp_path / "sheet.pdf").read_bytes())
    assert 1 < len(pages) <= 3


@pytest.fixture
def published(tmp_path):
    """The address of a local server that publishes a site, and the site's folder."""
    site = tmp_path / "site"
    site.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=site)
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", site
        server.shutdown()


def in_a_clean_environment(folder: Path, source: str) -> subprocess.CompletedProcess:
    """Run code with a Python that has the packages of this one, but not minimoe, in an empty folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    purelib = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    )
    (Path(purelib.stdout.strip()) / "packages.pth").write_text(sysconfig.get_path("purelib"))
    (folder / "empty").mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run([python, "-c", source], cwd=folder / "empty", capture_output=True, text=True, env=environment)


def test_the_first_cell_makes_a_notebook_run_where_minimoe_is_not_installed(published, tmp_path):
    address, site = published
    written = {path.name: path for path in cloud.write(site / "cloud", address)}
    notebook = nbformat.read(written["04_lr_transfer.ipynb"], as_version=4)
    assert f"({address}/notebooks/notation.html" in "".join(cell.source for cell in notebook.cells)
    imports = next(cell.source for cell in notebook.cells[1:] if cell.cell_type == "code").replace("%matplotlib inline", "")
    asked = "import minimoe\nprint(minimoe.__file__)\nprint(shipped('sweeps/transfer.jsonl'))"
    done = in_a_clean_environment(tmp_path, f"{notebook.cells[0].source}\n{imports}\n{asked}")
    assert done.returncode == 0, done.stderr
    *_, file, data = done.stdout.splitlines()
    assert Path(file) == tmp_path / "empty" / cloud.NAME / "minimoe" / "__init__.py"
    assert Path(data) == tmp_path / "empty" / cloud.NAME / "data" / "sweeps" / "transfer.jsonl"


def test_each_archive_is_small_and_has_the_data_of_its_notebook(tmp_path):
    written = {path.name: path for path in cloud.write(tmp_path, "https://example.org")}
    for path in sorted((website.ROOT / "notebooks").glob("*.ipynb")):
        packed = written[f"{path.stem}.tar.gz"]
        assert packed.stat().st_size < 5e6
        with tarfile.open(packed) as tar:
            held = {name.removeprefix(f"{cloud.NAME}/") for name in tar.getnames()}
        code = cloud.code_of(nbformat.read(path, as_version=4))
        named = {f"data/{name}" for name in re.findall(r'shipped\("([^"]+)"\)', code)}
        assert named <= held, path.stem
        assert "minimoe/model.py" in held
        assert cloud.archive(cloud.held(code)) == packed.read_bytes(), "the same bytes for the same files"
    assert "data/sweeps/balance.jsonl" in {str(path.relative_to(website.ROOT)) for path in cloud.held('for name in ("balance",)')}


def test_another_archive_than_the_notebooks_is_refused(published, tmp_path):
    address, site = published
    written = {path.name: path for path in cloud.write(site / "cloud", address)}
    written["01_weight_types.tar.gz"].write_bytes(b"something else")
    first = nbformat.read(written["01_weight_types.ipynb"], as_version=4).cells[0].source
    done = in_a_clean_environment(tmp_path, first)
    assert done.returncode != 0
    assert "is not the archive that this notebook belongs to" in done.stderr


def test_where_minimoe_is_installed_the_first_cell_does_nothing(capsys):
    exec(cloud.first_cell("http://nowhere.invalid", b"", []), {})
    assert capsys.readouterr().out == "minimoe 0.1.0\n"


def test_an_address_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="ADDRESS is where the site will be"):
        cloud.write(tmp_path, "here")
