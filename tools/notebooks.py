"""Keep the course.

tools/notebooks.py run [NAME ...]    run notebooks, and the deck of slides, in place
tools/notebooks.py gallery           copy each one's main figure to docs/gallery, for the README
tools/notebooks.py student           write copies without outputs, answers and claims to student/
"""

from __future__ import annotations

import ast
import base64
import io
import re
import shutil
import sys
from collections.abc import Collection
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parent.parent
PROMPT = "*Your answer:*"
NOTICE = "**What do you notice?** *Two or three sentences:*"
SUMMARY = "**Summary.** *Yours, in two or three sentences:*"
STUDENTS_NEVER_SEE = {"answer", "claim", "exercise", "solution"}  # tags that a student's copy does not carry
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
            small = Image.open(io.BytesIO(picture)).convert("RGB").quantize(256)  # a third of the bytes, and it looks the same
            small.save(written[-1], optimize=True)
    return written


def student_copy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook without outputs and without anything that gives an answer away.

    Of the code: a cell tagged `solution` becomes a line to fill in; one tagged `exercise` keeps its names and docstrings, with
    blanks for what they are; one tagged `claim` goes; every assert goes. Of the text: hidden answers, what there is to notice,
    the summary, and cells tagged `answer` become prompts.
    """
    copy = nbformat.from_dict(notebook)
    kept = []
    for cell in copy.cells:
        tags = set(cell.metadata.get("tags", []))
        cell.source = _asked(cell.source, tags) if cell.cell_type == "markdown" else _blank(cell.source, tags)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
        if tags := tags - STUDENTS_NEVER_SEE:
            cell.metadata["tags"] = sorted(tags)
        else:
            cell.metadata.pop("tags", None)
        if cell.source:
            kept.append(cell)
    copy.cells = kept
    return copy


def _asked(text: str, tags: set[str]) -> str:
    """The text with prompts in place of answers."""
    if "answer" in tags:
        return PROMPT
    text = re.sub(r"<details>.*?</details>", PROMPT, text, flags=re.DOTALL)
    text = re.sub(r"\*\*What to notice\*\*\n(?:(?:- |  ).*(?:\n|$))+", f"{NOTICE}\n", text)
    return re.sub(r"\*\*Summary\.\*\*.*?(?=\n\n|$)", SUMMARY, text, flags=re.DOTALL).rstrip("\n")


def _blank(source: str, tags: set[str]) -> str:
    """The code with blanks in place of answers; nothing of a cell that only claims."""
    if "solution" in tags:
        return "# your solution"
    if "claim" in tags:
        return ""
    if "exercise" in tags:
        return _with_blanks(source)
    if "assert " not in source:
        return source
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line for line in lines if line is not None).strip("\n")


def _with_blanks(source: str) -> str:
    """The code with `...` for the body of each function (but for its docstring), for each value that a name gets, and for
    each value of a dict."""
    lines = source.splitlines()
    for node in reversed(ast.parse(source).body):
        if isinstance(node, ast.FunctionDef):
            documented = ast.get_docstring(node) is not None
            first = node.body[1 if documented and len(node.body) > 1 else 0]
            lines[first.lineno - 1 : node.end_lineno] = ["    ...  # your answer"]
        elif isinstance(node, ast.Assign):
            names = " = ".join(ast.unparse(target) for target in node.targets)
            keys = [ast.unparse(key) for key in node.value.keys] if isinstance(node.value, ast.Dict) else []
            blank = f"{{{', '.join(f'{key}: ...' for key in keys)}}}" if keys else "..."
            lines[node.lineno - 1 : node.end_lineno] = [f"{names} = {blank}  # your answer"]
    return "\n".join(lines)


def write_student_copies(folder: Path, names: Collection[str] = ()) -> list[Path]:
    """A student copy of each of these notebooks, or of all, in `folder`, which lies beside `notebooks/` so that links and data
    are found."""
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.ipynb"):
        stale.unlink()
    shutil.copy(ROOT / "notebooks" / "notation.md", folder)
    written = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        if names and path.stem not in names:
            continue
        nbformat.write(student_copy(nbformat.read(path, as_version=4)), folder / path.name)
        written.append(folder / path.name)
    return written


def main(arguments: list[str]) -> None:
    if arguments[:1] in (["student"], ["gallery"]):
        student = arguments[0] == "student"
        written = write_student_copies(ROOT / "student") if student else write_gallery(ROOT / "docs" / "gallery")
        print("\n".join(str(path.relative_to(ROOT)) for path in written))
    elif arguments[:1] == ["run"]:
        paths = {path.stem: path for folder in ("notebooks", "slides") for path in sorted((ROOT / folder).glob("*.ipynb"))}
        for name in arguments[1:] or paths:
            run(paths[name])
            print(f"{name}: run", flush=True)
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
