"""README and notebooks: links that point where they say, outputs that are there."""

import re
from pathlib import Path

import pytest
import torch

import adoptions
import findings

ROOT = Path(__file__).parent.parent
CELLS = {"init variance": "init_var", "multiplier": "multiplier", "Adam LR": "lr"}
COLUMNS = ("embedding", "unembedding", "hidden", "router")


def table_links():
    table = ""
    for line in (ROOT / "README.md").read_text().splitlines():
        columns = [column.strip() for column in line.split("|")[1:-1]]
        if len(columns) == 6 and columns[1] in CELLS:
            table = columns[0] or table
            for role, link in zip(COLUMNS, columns[2:], strict=True):
                yield table, CELLS[columns[1]], role, link


def test_every_cell_of_the_readmes_tables_links_to_its_line():
    code = (ROOT / "minimoe" / "tables.py").read_text().splitlines()
    links = list(table_links())
    assert len(links) == 3 * 3 * 4
    for table, cell, role, link in links:
        value, number = re.fullmatch(r"\[(.+)\]\(minimoe/tables\.py#L(\d+)\)", link).groups()
        line = code[int(number) - 1]
        assert re.search(rf"\b{role}=Rule\(.*\b{cell}={re.escape(value)}[,)]", line), (table, role, cell)
        above = [name for text in code[: int(number)] for name in re.findall(r'^\s+"(sp|simplep|mup)",$', text)]
        assert above[-1] == table


def test_the_readmes_local_links_exist():
    for target in re.findall(r"\]\(([^)#:]+)(?:#L\d+)?\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target


def test_the_readme_says_what_each_module_is_for():
    text = (ROOT / "README.md").read_text().partition("## Where is what")[2]
    for path in (ROOT / "minimoe").glob("[a-z]*.py"):
        assert f"`{path.name}`" in text, path.name


def test_the_readmes_python_runs():
    """Every block of Python in the README, in order, except the sweep that would take minutes."""
    namespace = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL):
        kept = [line for line in block.splitlines() if not line.startswith(("frame = sweep(", "transfer_report(", "lr_curves("))]
        assert len(block.splitlines()) - len(kept) in (0, 3)
        exec("\n".join(kept), namespace)
    assert namespace["mended"].name == "simplep[router.lr=1/fan_in]"
    assert [group["lr"] for group in namespace["optimizer"].param_groups] == [1e-2]


def test_the_tables_of_the_findings_are_the_sweeps():
    text = findings.PAGE.read_text()
    assert findings.page(text, findings.tables()) == text, "run python tools/findings.py"
    assert text.count("<!-- table: ") == len(findings.tables())
    with pytest.raises(ValueError, match="no place for the table 'other'"):
        findings.page(text, {"other": ""})


def test_the_readme_counts_the_predictions_that_are_met():
    last = findings.tables()["checks"].splitlines()[-1]
    met, known = (sum(map(int, found)) for found in zip(*re.findall(r"(\d+) of (\d+)", last), strict=True))
    assert f"{met:,} of {known:,} predicted exponents" in (ROOT / "README.md").read_text()


def test_the_page_of_adopted_architectures_is_what_adopt_makes_of_them():
    assert adoptions.PAGE.read_text(encoding="utf-8") == adoptions.page(), "run python tools/adoptions.py"


def test_torch_is_the_locked_version():
    """An index or an oracle that drags in another torch would change every number."""
    pins = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line[:40])
    assert pins["torch"] == "2.13.0"
    assert torch.__version__.split("+")[0] == pins["torch"]
