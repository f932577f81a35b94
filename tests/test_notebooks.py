"""The course: notebooks fit to hand out, claims that fail when the table is wrong, and student copies without answers.

That each notebook runs and prints what it shows is nbval's part (`pytest --nbval notebooks`, in `make test`).
"""

import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import notebooks as tools

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LECTURE = ROOT / "slides" / "lecture.ipynb"
COURSE = [path for path in NOTEBOOKS if path.name > "01"]
TAGS = {"nbval-ignore-output", "solution", "exercise", "claim", "answer"}
HEADER = ("You will", "Before", "Takes", "Data")


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(path):
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def named(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.stem)


def test_there_are_the_five_notebooks_of_part_one():
    assert [path.name[:2] for path in COURSE][:5] == ["01", "02", "03", "04", "05"]


@named([*NOTEBOOKS, LECTURE])
def test_outputs_counts_and_no_traces_of_a_machine(path):
    notebook, code = read(path), code_cells(path)
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(cell.outputs for cell in code)
    for cell in notebook.cells:
        assert set(cell.metadata.get("tags", [])) <= TAGS
        assert set(cell.metadata) <= {"tags", "alt", "slideshow"}  # no times of execution
        pictures = any("image/png" in output.get("data", {}) for output in cell.get("outputs", []))
        assert pictures == ("alt" in cell.metadata), "a picture says in words what it shows"
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", cell.source
    assert notebook.metadata.kernelspec.name == "python3"
    assert "widgets" not in notebook.metadata
    text = path.read_text()
    assert not re.search(r"/(home|root|work|tmp|Users)/", text)
    assert not re.search(r"20\d\d-\d\d-\d\dT\d\d:", text)
    assert len(text) < 1_500_000


@named(NOTEBOOKS)
def test_header_box_short_cells_and_words_under_every_figure(path):
    cells = read(path).cells
    header = cells[0].source
    assert re.search(r"\*\*Question: .+\?\*\*", header, flags=re.DOTALL)
    for row in HEADER:
        assert re.search(rf"^\| {row} \| .+ \|$", header, flags=re.MULTILINE), row
    assert re.search(r"\| Takes \|.*\b(minute|minutes)\b.*\|", header)
    for place, cell in enumerate(cells):
        if cell.cell_type != "code":
            continue
        assert len(cell.source.splitlines()) <= 28, cell.source
        if any("image/png" in output.get("data", {}) for output in cell.outputs):
            assert "**What to notice**" in cells[place + 1].source, cell.source


@named([*NOTEBOOKS, LECTURE])
def test_claims_are_asserted_and_what_is_ignored_trains_plots_or_prints_versions(path):
    code = code_cells(path)
    assert sum("assert " in cell.source for cell in code) >= 3
    trains = r"train\(|sweep\(|coordinate_check\(|check_module\(|logits_along\(|check\(\"mup"
    plots = r"allocation_map\(|learning_shares\(|promise_and_fall\("
    plots += r"|three_terms\(|verdict_map\("
    plots += r"|optima_curves\(|_curves\(|_chart\(|router_rules\(|plt\.show|explorer$|^live$|Explorer\("
    asks_what_was_trained = r"balanced\.model"
    may_differ = rf"{trains}|{plots}|{asks_what_was_trained}|__version__"
    for cell in code:
        if "nbval-ignore-output" in cell.metadata.get("tags", []):
            assert re.search(may_differ, cell.source, flags=re.MULTILINE), cell.source


@named(COURSE)
def test_a_lesson_predicts_practises_and_leads_on(path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    assert text.count("**Predict**") >= 2
    assert text.count("<details><summary>Answer") >= 2
    assert "## Exercises" in text
    assert "<details><summary>Solution" in text
    for part in ("**Summary.**", "**References.**", "[notation table](notation.md)", "**The main figure.**"):
        assert part in text
    for target in re.findall(r"\]\(([\w/.]+)\)", text):
        assert (path.parent / target).exists(), target


# What each lesson teaches, made wrong in the source: (the file, the line, what it becomes)
MUP_ROUTER = "router=Rule(init_var=1, multiplier=1 / fan_in, lr=1),"
SP_ROUTER = "router=Rule(init_var=1 / fan_in, multiplier=1, lr=1),"  # and SimpleP's
MUP_HEAD = "unembedding=Rule(init_var=1, multiplier=1 / fan_in, lr=1),"  # and SimpleP's
SP_HIDDEN = "hidden=Rule(init_var=1 / fan_in, multiplier=1, lr=1),"
AUTHORS_DOWN = 'cells = {"init_var": 1 / DOWN[down], "lr": 1 / DOWN[down], "multiplier": ROUTES[route]}'
BRANCHES = '"residual": Rule(multiplier=depth**-alpha),'
ROUTED = '"routed": Rule(multiplier=1 / (top_k * granularity)),'
ROUTE_SCALE = '"routed": Rule(multiplier=top_k * granularity),'
MSSP_CELL = '_mup_ii.replace("experts_down", "mssp II", init_var=_experts / fan_in),'
LAST_FACTOR = 'final_lr=rule.final_lr * (last if end == "own" else last / peak)'
FAST_EMBEDDING = '_SP.replace("embedding", "sp, embedding LR x n", lr=width),'
GROWING_DECAY = "weight_decay=rule.weight_decay * fan_in**power)"
TABLES, ARMS = "tables.py", "arms.py"
SABOTAGE = {
    "le": (TABLES, SP_ROUTER, SP_ROUTER.replace("lr=1", "lr=1 / fan_in")),  # the lecture
    "00": (TABLES, MUP_ROUTER, MUP_ROUTER.replace("1 / fan_in", "1")),
    "01": (TABLES, MUP_ROUTER, MUP_ROUTER.replace("lr=1", "lr=1 / fan_in")),
    "02": (TABLES, MUP_ROUTER, MUP_ROUTER.replace("multiplier=1 / fan_in", "multiplier=1")),
    "03": (TABLES, SP_ROUTER, SP_ROUTER.replace("lr=1", "lr=1 / fan_in")),
    "04": (TABLES, SP_HIDDEN, SP_HIDDEN.replace("lr=1", "lr=1 / fan_in")),
    "05": (TABLES, MUP_ROUTER, MUP_ROUTER.replace("lr=1", "lr=1 / fan_in")),
    "06": (TABLES, MUP_ROUTER, MUP_ROUTER.replace("multiplier=1 / fan_in", "multiplier=1")),
    "08": (TABLES, MUP_HEAD, MUP_HEAD.replace("multiplier=1 / fan_in", "multiplier=1")),
    "09": (TABLES, MUP_ROUTER, MUP_ROUTER.replace("lr=1", "lr=fan_in")),
    "10": (TABLES, BRANCHES, BRANCHES.replace("depth**-alpha", "1")),
    "11": (TABLES, ROUTED, ROUTED.replace("1 / (top_k * granularity)", "1")),
    "12": (TABLES, ROUTE_SCALE, ROUTE_SCALE.replace("top_k * granularity", "1")),
    "13": (TABLES, MSSP_CELL, MSSP_CELL.replace("init_var=_experts / fan_in", "init_var=1 / fan_in")),
    "14": (TABLES, LAST_FACTOR, "final_lr=rule.final_lr * last"),
    "15": (ARMS, FAST_EMBEDDING, FAST_EMBEDDING.replace("lr=width", "lr=1")),
    "16": (ARMS, GROWING_DECAY, GROWING_DECAY.replace("power", "-power")),
    "07": (ARMS, AUTHORS_DOWN, AUTHORS_DOWN.replace('"lr": 1 / DOWN[down]', '"lr": 1')),
}


@named([*NOTEBOOKS, LECTURE])
def test_a_sabotaged_table_fails_its_notebook(path, tmp_path, monkeypatch):
    """The package is copied with one cell of a table made wrong, and the notebook run on the copy."""
    file, right, wrong = SABOTAGE[path.name[:2]]
    shutil.copytree(ROOT / "minimoe", tmp_path / "minimoe", ignore=shutil.ignore_patterns("__pycache__"))
    source = tmp_path / "minimoe" / file
    text = source.read_text()
    assert right in text
    source.write_text(text.replace(right, wrong))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("MINIMOE_DATA", str(ROOT / "data"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(CellExecutionError) as failed:
        NotebookClient(read(path), timeout=300, kernel_name="python3").execute(cwd=path.parent)
    claims = ("AssertionError", "Wrong", "LineError")  # an assert, an exercise's check, a sweep of another table
    assert failed.value.ename in claims, failed.value


@named(NOTEBOOKS)
def test_a_student_copy_has_questions_and_no_answers(path):
    copy = tools.student_copy(read(path))
    text = "\n".join(cell.source for cell in copy.cells)
    for spoiler in ("<details>", "**What to notice**", "assert ", "**The answer"):
        assert spoiler not in text
    assert tools.PROMPT in text
    for cell in read(path).cells:
        if {"solution", "claim", "answer"} & set(cell.get("metadata", {}).get("tags", [])):
            assert cell.source not in text
    for cell in copy.cells:
        assert not cell.get("outputs")
        assert set(cell.metadata.get("tags", [])) <= {"nbval-ignore-output"}


@named(COURSE)
def test_a_lesson_lets_the_reader_write_something(path):
    text = "\n".join(cell.source for cell in tools.student_copy(read(path)).cells)
    assert "# your answer" in text
    assert "# your solution" in text


def test_blanks_keep_names_and_docstrings():
    head = 'def step(W, lr):  # of Adam\n    """W after."""\n'
    source = head + '    lr = 2 * lr\n    return W\n\n\nguess = {\n    "a": 1,\n}\nprint(step(1, guess))'
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["exercise"]})
    copy = tools.student_copy(nbformat.v4.new_notebook(cells=[cell]))
    blank = "    ...  # your answer\n\n\nguess = {'a': ...}  # your answer\nprint(step(1, guess))"
    assert copy.cells[0].source == head + blank


def test_prompts_take_the_place_of_what_there_is_to_notice_and_of_the_summary():
    text = "**What to notice**\n- one\n  and more\n- two\n\nThen (a).\n\n**Summary.** All\nof it.\n\n**References.** One."
    claim = nbformat.v4.new_code_cell("assert 1 == 1", metadata={"tags": ["claim"]})
    mixed = nbformat.v4.new_code_cell("x = 1\nassert (\n    x == 1\n)\nprint(x)")
    cells = [nbformat.v4.new_markdown_cell(text), claim, mixed]
    copy = tools.student_copy(nbformat.v4.new_notebook(cells=cells))
    assert [cell.source for cell in copy.cells] == [
        f"{tools.NOTICE}\n\nThen (a).\n\n{tools.SUMMARY}\n\n**References.** One.",
        "x = 1\nprint(x)",
    ]


def test_a_blank_student_copy_stops_at_its_first_exercise(tmp_path, monkeypatch):
    """Alone in a folder: the data are found, and what stops the notebook is the exercise's own message."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    copy = tools.student_copy(read(ROOT / "notebooks" / "04_lr_transfer.ipynb"))
    kept = [cell for cell in copy.cells if "sketch" not in cell.source and "Explorer(" not in cell.source]
    copy.cells = [cell for cell in kept if cell.cell_type == "markdown" or not cell.source.startswith("lr_curves(")]
    with pytest.raises(CellExecutionError, match="`tune` returns nothing: fill in the blank"):
        NotebookClient(copy, timeout=300, kernel_name="python3").execute(cwd=tmp_path)


def test_make_student_writes_every_copy(tmp_path):
    written = tools.write_student_copies(tmp_path)
    assert [path.name for path in written] == [path.name for path in NOTEBOOKS]
    for path in written:
        nbformat.validate(read(path))


def test_running_a_notebook_keeps_no_times_and_of_a_widget_the_picture(tmp_path):
    source = (
        "import ipywidgets, pandas as pd\nfrom minimoe.explorers import CoordinateExplorer\n"
        "same = dict(parametrization='t', seed=0, layer=0, tensor='router', role='router', kind='output', source='-', degree=1,"
        " place=0, rms=1.0, alignment=0.5, predicted=0.0)\n"
        "rows = [same | dict(width=w, step=s, quantity=q) for w in (32, 64) for s, q in ((0, 'init'), (1, 'update'))]\n"
        "CoordinateExplorer(pd.DataFrame(rows))"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    path = tmp_path / "one.ipynb"
    nbformat.write(notebook, path)
    tools.run(path)
    (cell,) = read(path).cells
    assert [set(output.data) for output in cell.outputs] == [
        {"text/plain"},  # the controls
        {"text/plain", "image/png"},
        {"text/plain", "text/html"},
    ]
    assert dict(cell.metadata) == {}
