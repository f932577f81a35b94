"""The checker of student copies: what it says of right, wrong, blank, changed and endless answers."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest

import notebooks
from minimoe.__main__ import main
from minimoe.checker import check_notebook, course_checks

COURSE = Path(__file__).parent.parent / "notebooks"
FIRST, LAST = "01_weight_types", "05_router_rules"


@pytest.fixture
def copy(tmp_path):
    """A student's copy of notebook 01, as a function of what stands in the cell of its exercise."""

    def written(answer=None, check="print(check_sign_step(sign_step))", name=f"{FIRST}-ada"):
        notebook = notebooks.student_copy(nbformat.read(COURSE / f"{FIRST}.ipynb", as_version=4))
        cell = next(cell for cell in notebook.cells if "print(check_sign_step" in cell.source)
        if answer is not None:
            cell.source = f"{answer}\n\n\n{check}"
        nbformat.write(notebook, tmp_path / f"{name}.ipynb")
        return tmp_path / f"{name}.ipynb"

    return written


def only(report):
    (outcome,) = report.outcomes
    return outcome.state, outcome.message


RIGHT = "def sign_step(W, gradient, lr):\n    return W - lr * gradient.sign()"


def test_a_right_answer_a_wrong_one_and_a_blank(copy):
    right = check_notebook(copy(RIGHT))
    assert only(right) == ("right", "the first step of Adam has the size of the LR, whatever the gradient's.")
    assert str(right).startswith(f"{FIRST}: 1 of 1 right\n  check_sign_step: right.")
    wrong = check_notebook(copy(RIGHT.replace("-", "+")))
    assert only(wrong) == ("not yet", "the loss goes up: a step goes against the gradient")
    assert wrong.sha256 != right.sha256
    assert only(check_notebook(copy())) == ("not answered", "Fill in the blank.")
    assert only(check_notebook(copy("def sign_step(W, gradient, lr):\n    pass")))[0] == "not answered"


def test_an_answer_that_breaks_and_one_that_never_ends(copy):
    assert only(check_notebook(copy("def sign_step(W:")))[1].startswith("SyntaxError: ")
    state, message = only(check_notebook(copy("while True:\n    sign_step = None"), limit=10))
    assert (state, message) == ("not yet", "A cell ran longer than 10 s.")


def test_a_changed_check_is_said(copy):
    changed = check_notebook(copy(RIGHT, "print('Right: yes')"))
    assert only(changed) == ("changed", "Its cell must have the line print(check_sign_step(sign_step))")
    own = 'check_sign_step = lambda _answer: "Right: mine"\n'
    assert only(check_notebook(copy(RIGHT.replace("-", "+"), f"{own}print(check_sign_step(sign_step))")))[0] == "not yet"


def test_every_exercise_of_the_course_is_right_in_the_original(tmp_path):
    """Not 08 and 09, which take long; tests/test_notebooks.py runs them."""
    for name in (FIRST, "02_one_file_moe", LAST):
        shutil.copy(COURSE / f"{name}.ipynb", tmp_path)
        report = check_notebook(tmp_path / f"{name}.ipynb")
        assert {outcome.state for outcome in report.outcomes} == {"right"}, name
    assert len(course_checks(COURSE / "03_coordinate_checks.ipynb")[1]) == 2


def test_the_command_prints_a_report_and_collects_lines(copy, tmp_path, capsys):
    copy(RIGHT)
    (tmp_path / "other.ipynb").write_text("no notebook of the course")
    assert main(["check", str(tmp_path), "--name", "Ada", "--json", str(tmp_path / "all.jsonl")]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert row["name"] == "Ada"
    assert (row["notebook"], row["right"], row["of"]) == (FIRST, 1, 1)
    assert row["exercises"] == {"check_sign_step": "right"}
    assert re.fullmatch("[0-9a-f]{64}", row["sha256"])
    assert json.loads((tmp_path / "all.jsonl").read_text()) == row


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("essay.ipynb", "{}", "does not have the name of a notebook of the course"),
        (f"{FIRST}.ipynb", "{", "is not a whole notebook"),
        (f"{FIRST}.ipynb", None, "No such file"),
        ("06_expert_count.ipynb", "{}", "has no exercise with a check"),
    ],
)
def test_files_that_cannot_be_checked(name, text, message, tmp_path, capsys):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["check", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_copies(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    assert "holds no copy of a notebook with exercises" in capsys.readouterr().err
