"""Write what a lecturer hands out for the lab to handout/: the notebooks with blanks, the lab sheet, the rubric.

The sheets are pages to print, made from docs/lab_sheet.md and docs/rubric.md.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from minimoe import lr_curves, read_sweep
from minimoe.figures import label_octaves
from notebooks import write_student_copies
from website import ROOT, TEMPLATES, formatted

LAB = ("01_weight_types", "03_coordinate_checks", "04_lr_transfer", "05_router_rules")
SHEETS = {"lab_sheet": "Lab sheet", "rubric": "Rubric of the lab"}
PLACE = "<!-- figure -->"  # of the figure in a sheet


def write(folder: Path) -> list[Path]:
    """The copies and the sheets, in `folder`, which lies beside `notebooks/` so that links and data are found."""
    copies = write_student_copies(folder, LAB)
    page = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined).get_template("handout.html.j2")
    for name, title in SHEETS.items():
        text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").replace(PLACE, figure_to_complete())
        body = formatted(text.replace(".md)", ".html)"))
        (folder / f"{name}.html").write_text(page.render(title=title, body=body), encoding="utf-8")
    return [*copies, *(folder / f"{name}.html" for name in SHEETS)]


def figure_to_complete() -> str:
    """The measured curve of the smallest width under SP, on axes with room for a sketch of the largest."""
    frame = read_sweep(ROOT / "data" / "sweeps" / "transfer.jsonl")
    frame = frame[frame.parametrization == "sp"]
    limits = (frame.val_loss.min() - 0.05, frame.val_loss.max())
    figure = lr_curves(frame[frame.width == frame.width.min()], size=(8, 4.2), losses=limits)
    (axes,) = figure.axes
    ends = (frame.lr.min() / 2, frame.lr.max() * 2)
    label_octaves(axes, list(ends))
    axes.set_xlim(*ends)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    words = "Validation loss against LR at width 32 under sp, with room for a sketch"
    return f'<img alt="{words}" src="data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}">'


if __name__ == "__main__":
    print("\n".join(str(path.relative_to(ROOT)) for path in write(ROOT / "handout")))
