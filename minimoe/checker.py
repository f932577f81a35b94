"""Check a student's notebook: run it up to its last answer, and say of each exercise whether it is right.

A help, and no proof: who changes the package, or the cells before an exercise, can deceive it.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .exercises import DATA

if TYPE_CHECKING:
    from nbformat import NotebookNode

NOTEBOOKS = DATA.parent / "notebooks"  # the course's own, in a checkout
CHECK = re.compile(r"^print\((check_\w+)\(.+\)\)$", re.MULTILINE)  # an exercise's cell ends with such a line
LIMIT = 300  # seconds for a cell
STATES = ("right", "not yet", "not answered", "changed")


@dataclass(frozen=True)
class Outcome:
    """exercise: the name of its check. state: one of STATES. message: what the check says, or what to do."""

    exercise: str
    state: str
    message: str


@dataclass(frozen=True)
class Report:
    """What the checks say of one notebook. sha256: of the cells with the answers, as the student wrote them."""

    notebook: str
    outcomes: list[Outcome]
    sha256: str

    def __str__(self) -> str:
        right = sum(own.state == "right" for own in self.outcomes)
        rows = [f"  {own.exercise}: {own.state}. {own.message}" for own in self.outcomes]
        return "\n".join([f"{self.notebook}: {right} of {len(rows)} right", *rows])

    def row(self, name: str) -> dict:
        """What a lecturer collects: one line of JSON for each notebook."""
        states = {own.exercise: own.state for own in self.outcomes}
        return {"name": name, "notebook": self.notebook, "right": list(states.values()).count("right"), "of": len(states)} | {
            "exercises": states,
            "sha256": self.sha256,
        }


def check_notebook(path: Path, limit: int = LIMIT) -> Report:
    """Run a copy of a notebook of the course, in its folder, with a kernel of its own, and judge its exercises.

    The name of the file begins with the name of the course's notebook. The line that checks an answer is run as the course has
    it, whatever else its cell holds. limit: seconds for a cell. Raises OSError, or ValueError for a file that is no such copy.
    """
    notebook, checks = course_checks(path)
    sources = [cell.source for cell in read(path).cells if cell.cell_type == "code"]
    places = {own: _place(line, sources) for own, line in checks.items()}
    known = sorted({place for place in places.values() if place is not None})
    answered = {own: place for own, place in places.items() if place is not None and not _blank(sources[place])}
    found = _run(sources, {own: (place, checks[own]) for own, place in answered.items()}, path.parent, limit)
    for own, place in places.items():
        if place is None:
            found[own] = Outcome(own, "changed", f"Its cell must have the line {checks[own]}")
        found.setdefault(own, Outcome(own, "not answered", "Fill in the blank."))
    digest = hashlib.sha256("\n\n".join(sources[place] for place in known).encode())
    return Report(notebook, [found[own] for own in checks], digest.hexdigest())


def copies(path: Path) -> list[Path]:
    """The file itself; of a folder, the copies in it that have exercises. Raises ValueError for a folder without any."""
    if not path.is_dir():
        return [path]
    found = [own for own in sorted(path.glob("*.ipynb")) if _has_exercises(own)]
    if not found:
        raise ValueError(f"{path} holds no copy of a notebook with exercises")
    return found


def _has_exercises(path: Path) -> bool:
    try:
        return bool(course_checks(path))
    except ValueError:
        return False


def course_checks(path: Path) -> tuple[str, dict[str, str]]:
    """The course's notebook that this file is a copy of, and for each exercise of it the line that checks an answer."""
    names = [own for own in sorted(NOTEBOOKS.glob("*.ipynb")) if path.stem.startswith(own.stem)]
    if not names:
        raise ValueError(f"{path.name} does not have the name of a notebook of the course, such as 01_weight_types.ipynb")
    source = "\n".join(cell.source for cell in read(names[-1]).cells if cell.cell_type == "code")
    checks = {line[1]: line[0] for line in CHECK.finditer(source)}
    if not checks:
        raise ValueError(f"{names[-1].name} has no exercise with a check")
    return names[-1].stem, checks


def read(path: Path) -> NotebookNode:
    """The notebook in this file. Raises OSError, and ValueError for a file that is no notebook."""
    try:
        import nbclient  # noqa: F401  # needed below: better said now than after reading
        import nbformat
    except ImportError as error:
        raise ValueError("a check runs notebooks with Jupyter: pip install 'minimoe[notebooks]'") from error
    try:
        return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    except (ValueError, AttributeError, KeyError, TypeError, nbformat.ValidationError) as error:
        raise ValueError(f"{path} is not a whole notebook: save it again in JupyterLab, or begin with a new copy") from error


def _place(line: str, sources: list[str]) -> int | None:
    """The last cell that has the line."""
    return max((place for place, source in enumerate(sources) if line in source.splitlines()), default=None)


def _blank(source: str) -> bool:
    """Is `...` still in the place of an answer: the body of a function, or the value of a name?"""
    try:
        statements = ast.parse(source).body
    except SyntaxError:
        return False
    last = (node.body[-1] if isinstance(node, ast.FunctionDef) else node for node in statements)
    values = (node.value for node in last if isinstance(node, ast.Expr | ast.Assign))
    return any(isinstance(value, ast.Constant) and value.value is ... for value in values)


def _run(sources: list[str], checks: dict[str, tuple[int, str]], folder: Path, limit: int) -> dict[str, Outcome]:
    """Each check's line is taken out of its cell, and run after it in a cell of its own."""
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    cells, judged = [], {}
    for place, source in enumerate(sources[: 1 + max((place for place, _ in checks.values()), default=-1)]):
        own = {exercise: line for exercise, (where, line) in checks.items() if where == place}
        answer = new_code_cell("\n".join(line for line in source.splitlines() if line not in own.values()))
        cells.append(answer)
        for exercise, line in own.items():
            cells.append(new_code_cell(f"from minimoe.exercises import {exercise}\n{line}"))
            judged[exercise] = (answer, cells[-1])
    settings = {"timeout": limit, "allow_errors": True, "interrupt_on_timeout": True, "store_widget_state": False}
    if cells:
        NotebookClient(new_notebook(cells=cells), **settings).execute(cwd=str(folder or "."))
    return {exercise: _judged(exercise, *pair, limit) for exercise, pair in judged.items()}


def _judged(exercise: str, answer: NotebookNode, check: NotebookNode, limit: int) -> Outcome:
    """From what the two cells have printed, or the first error in them."""
    outputs = [*answer.outputs, *check.outputs]
    for error in (output for output in outputs if output.output_type == "error"):
        said = {"Wrong": error.evalue, "KeyboardInterrupt": f"A cell ran longer than {limit} s."}
        message = said.get(error.ename, f"{error.ename}: {error.evalue}")
        return Outcome(exercise, "not answered" if "fill in the blank" in message else "not yet", message)
    said = "".join(output.get("text", "") for output in check.outputs)
    return Outcome(exercise, "right", said.strip().removeprefix("Right: "))


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK", help="a student's copy, or a folder of copies")
    command.add_argument("--name", default="", help="of the student, for the line of results")
    command.add_argument("--json", type=Path, metavar="FILE", help="append the lines of results to this file, too")
    command.add_argument("--limit", type=int, default=LIMIT, help=f"seconds for a cell (default {LIMIT})")


def run(options: argparse.Namespace) -> None:
    """Check each notebook: a report to read, then the lines to collect."""
    lines = []
    for path in [own for given in options.notebooks for own in copies(given)]:
        report = check_notebook(path, options.limit)
        print(report, flush=True)
        lines.append(json.dumps(report.row(options.name)))
    print(*lines, sep="\n")
    if options.json:
        with options.json.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
