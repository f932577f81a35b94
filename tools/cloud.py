"""Write notebooks that run where minimoe is not installed (Colab, Kaggle, Binder): tools/cloud.py ADDRESS

ADDRESS is where the folder site/ will be published. site/cloud/ gets one archive (package and data) and a copy of each
notebook. The first cell of a copy downloads the archive, compares its SHA-256, unpacks it, and installs what it needs.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import sys
import tarfile
import tomllib
from pathlib import Path
from urllib.parse import urlsplit

import nbformat

import minimoe

ROOT = Path(__file__).parent.parent
NAME = f"minimoe-{minimoe.__version__}"
HELD = ("minimoe/*.py", "minimoe/*.js", "minimoe/*.css", "data/**/*", "LICENSE", "README.md", "pyproject.toml")
LINK = re.compile(r"\]\((?!\w+:)([\w./-]+)\.(?:ipynb|md)")  # to another file of the course
FIRST = """# minimoe for this notebook: a download of about {size} MB. Where minimoe is installed, this cell does nothing.
import hashlib, importlib.util, io, os, subprocess, sys, tarfile, urllib.request

if importlib.util.find_spec("minimoe") is None:
    address, digest = "{address}", "{digest}"
    with urllib.request.urlopen(address, timeout=60) as answer:
        archive = answer.read()
    if hashlib.sha256(archive).hexdigest() != digest:
        raise RuntimeError(f"{{address}} is not the archive that this notebook belongs to: get a new copy of the notebook")
    tarfile.open(fileobj=io.BytesIO(archive)).extractall(".", filter="data")
    needed = {needed}
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *needed], check=True)
    folder = os.path.abspath("{name}")
    sys.path.insert(0, folder)
    os.environ["PYTHONPATH"] = folder  # for processes that a sweep starts
print("minimoe", importlib.import_module("minimoe").__version__)"""


def write(folder: Path, address: str) -> list[Path]:
    """The archive and the notebooks. Raises ValueError for an address that is not one of the web."""
    if urlsplit(address).scheme not in ("http", "https"):
        raise ValueError(f"ADDRESS is where the site will be, such as https://example.org/minimoe; got {address!r}")
    address = address.rstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    packed = archive()
    written = [folder / f"{NAME}.tar.gz"]
    written[0].write_bytes(packed)
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        copy = nbformat.read(path, as_version=4)
        for cell in copy.cells:
            if cell.cell_type == "markdown":
                cell.source = LINK.sub(rf"]({address}/notebooks/\1.html", cell.source)
        source = first_cell(f"{address}/cloud/{NAME}.tar.gz", packed, needed(path.read_text(encoding="utf-8")))
        copy.cells.insert(0, nbformat.v4.new_code_cell(source, id="install"))
        written.append(folder / path.name)
        nbformat.write(copy, written[-1])
    return written


def held() -> list[Path]:
    """The files of the archive: the package, and of the data what a notebook names."""
    named = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "notebooks").glob("*.ipynb"))
    found = {path for pattern in HELD for path in ROOT.glob(pattern) if path.is_file()}
    return sorted(path for path in found if ROOT / "data" not in path.parents or path.stem in named)


def archive() -> bytes:
    """What a notebook needs, below one folder; the same bytes for the same files."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for path in held():
            content = path.read_bytes()
            entry = tarfile.TarInfo(f"{NAME}/{path.relative_to(ROOT).as_posix()}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def needed(notebook: str) -> list[str]:
    """The packages that a notebook imports, with the tested versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    widgets = [package for package in extras["notebooks"] if "widget" in package]
    return [*project["dependencies"], *widgets, *(extras["hf"] if "transformers" in notebook else [])]


def first_cell(address: str, packed: bytes, packages: list[str]) -> str:
    digest = hashlib.sha256(packed).hexdigest()
    return FIRST.format(address=address, digest=digest, size=round(len(packed) / 1e6), needed=packages, name=NAME)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print("\n".join(str(path.relative_to(ROOT)) for path in write(ROOT / "site" / "cloud", sys.argv[1])))
