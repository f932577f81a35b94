"""Keep the course.

tools/notebooks.py run [NAME ...]    run notebooks in place
tools/notebooks.py gallery           copy each one's main figure to docs/gallery, for the README
tools/notebooks.py student           write copies without outputs and answers to student/
"""

from __future__ import annotations

import base64
import re
import shutil
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
PROMPT = "*Your answer:*"
WIDGET = "application/vnd.jupyter.widget-view+json"


def run(path: Path) -> None:
    """Run the notebook top to bottom and save its outputs: no times, and of a widget the picture alone."""
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=600, record_timing=False, store_widget_state=False, coalesce_streams=True)
    client.execute(cwd=path.parent)
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)
    nbformat.write(notebook, path)


def main_figure(notebook: nbformat.NotebookNode) -> bytes | None:
    """The PNG of the first picture after the words "The main figure.", if there is one."""
    announced = False
    for cell in notebook.cells:
        announced = announced or "**The main figure.**" in cell.source
        pictures = [output.data["image/png"] for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        if announced and pictures:
            return base64.b64decode(pictures[0])
    return None


def write_gallery(folder: Path) -> list[Path]:
    """The main figure of every notebook that has one, as NAME.png."""
    folder.mkdir(exist_ok=True)
    written = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        picture = main_figure(nbformat.read(path, as_version=4))
        if picture is not None:
            written.append(folder / f"{path.stem}.png")
            written[-1].write_bytes(picture)
    return written


def student_copy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without outputs; hidden answers become a prompt, and cells tagged `solution` a line to fill in."""
    copy = nbformat.from_dict(notebook)
    for cell in copy.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"<details>.*?</details>", PROMPT, cell.source, flags=re.DOTALL)
        else:
            cell.outputs, cell.execution_count = [], None
            if "solution" in cell.metadata.get("tags", []):
                cell.source, cell.metadata["tags"] = "# your solution", []
    return copy


def write_student_copies(folder: Path) -> list[Path]:
    """A student copy of every notebook, in `folder`, which lies beside `notebooks/` so that links and data are found."""
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.ipynb"):
        stale.unlink()
    shutil.copy(ROOT / "notebooks" / "notation.md", folder)
    written = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        nbformat.write(student_copy(nbformat.read(path, as_version=4)), folder / path.name)
        written.append(folder / path.name)
    return written


def main(arguments: list[str]) -> None:
    if arguments[:1] in (["student"], ["gallery"]):
        student = arguments[0] == "student"
        written = write_student_copies(ROOT / "student") if student else write_gallery(ROOT / "docs" / "gallery")
        print("\n".join(str(path.relative_to(ROOT)) for path in written))
    elif arguments[:1] == ["run"]:
        names = arguments[1:] or [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
        for name in names:
            run(ROOT / "notebooks" / f"{name}.ipynb")
            print(f"{name}: run", flush=True)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
