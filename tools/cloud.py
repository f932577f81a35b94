"""Write notebooks that run where minimoe is not installed (Colab, Kaggle, Binder): tools/cloud.py ADDRESS

ADDRESS is where the folder site/ will be published. site/cloud/ gets a copy of each notebook and an archive beside it: the
package, and of the data what this notebook names. The first cell of a copy downloads its archive, compares its SHA-256,
unpacks it, and installs what it needs.
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
PACKAGE = ("minimoe/*.py", "minimoe/*.js", "minimoe/*.css", "LICENSE", "README.md", "pyproject.toml")
DATA = ("data/*.csv", "data/sweeps/*.jsonl")
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
    """The archives and the notebooks. Raises ValueError for an address that is not one of the web."""
    if urlsplit(address).scheme not in ("http", "https"):
        raise ValueError(f"ADDRESS is where the site will be, such as https://example.org/minimoe; got {address!r}")
    address = address.rstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        copy = nbformat.read(path, as_version=4)
        code = code_of(copy)
        for cell in copy.cells:
            if cell.cell_type == "markdown":
                cell.source = LINK.sub(rf"]({address}/notebooks/\1.html", cell.source)
        packed = archive(held(code))
        source = first_cell(f"{address}/cloud/{path.stem}.tar.gz", packed, needed(code))
        copy.cells.insert(0, nbformat.v4.new_code_cell(source, id="install"))
        written += [folder / f"{path.stem}.tar.gz", folder / path.name]
        written[-2].write_bytes(packed)
        nbformat.write(copy, written[-1])
    return written


def code_of(notebook: nbformat.NotebookNode) -> str:
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def held(code: str) -> list[Path]:
    """The files that a notebook with this code needs: the package, and the data whose names it has as "name" or /name.csv."""
    package, data = ({path for pattern in patterns for path in ROOT.glob(pattern)} for patterns in (PACKAGE, DATA))
    return sorted(package | {path for path in data if re.search(rf'["/]{path.stem}[".]', code)})


def archive(files: list[Path]) -> bytes:
    """The files below one folder; the same bytes for the same files."""
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for path in files:
            content = path.read_bytes()
            entry = tarfile.TarInfo(f"{NAME}/{path.relative_to(ROOT).as_posix()}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def needed(code: str) -> list[str]:
    """The packages that a notebook with this code imports, with the tested versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    widgets = [package for package in extras["notebooks"] if "widget" in package]
    return [*project["dependencies"], *widgets, *(extras["hf"] if "transformers" in code else [])]


def first_cell(address: str, packed: bytes, packages: list[str]) -> str:
    digest = hashlib.sha256(packed).hexdigest()
    return FIRST.format(address=address, digest=digest, size=f"{len(packed) / 1e6:.1f}", needed=packages, name=NAME)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print("\n".join(str(path.relative_to(ROOT)) for path in write(ROOT / "site" / "cloud", sys.argv[1])))
