"""The LR explorer in a page: module, data and style inlined, so that the page needs no kernel and no network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from pathlib import Path

import pandas as pd

from .arms import ARMS, EXPERT_ARMS, labelled
from .lr_explorer import MODULE, STYLE, explorer_data
from .sweeps import read_sweep
from .transfer import transfer_report

CHOSEN = ["sp", "simplep", "mup"]  # what a reader sees first; the other tables can be chosen
COMPARED = {"n_experts": ["mup, raw, k=2", "mup, raw, k=E/4"], "granularity": ["authors", "route K", "router mup"]}
SEEDS = 3  # of an arm that is shown


def explorer_fragment(datasets: dict[str, dict], state: dict | None = None) -> str:
    """HTML for the body of any page: an element with the explorer, its style, its data, its script.

    datasets: name -> what `explorer_data` returns; a reader chooses among several. state: what is chosen at first, e.g.
    {"tables": ["sp"], "my_lr": -5.0}, where it is not the first data's `start`. Raises ValueError if there are no data.
    """
    if not datasets:
        raise ValueError("datasets is empty: give at least one")
    first = next(iter(datasets))
    chosen = {"datasets": datasets, "dataset": first, **datasets[first]["start"], **(state or {})}
    text = json.dumps(chosen, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")  # no name can end the script
    place = f"lr-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    start = f"""
const el = document.getElementById("{place}"), state = document.getElementById("{place}-state");
render({{ model: plainModel(JSON.parse(state.textContent)), el }});
"""
    return f"""<style>{STYLE.read_text(encoding="utf-8")}</style>
<div id="{place}"></div>
<script type="application/json" id="{place}-state">{text}</script>
<script type="module">{MODULE.read_text(encoding="utf-8")}{start}</script>
"""


def explorer_page(datasets: dict[str, dict], title: str, state: dict | None = None) -> str:
    """The explorer as a whole page in one file. Its content security policy allows its own script and style, and nothing else."""
    body = explorer_fragment(datasets, state)
    allowed = {tag: " ".join(digests(body, tag)) for tag in ("script", "style")}
    policy = f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; base-uri 'none'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{html.escape(title)}</title>
</head>
<body>
{body}</body>
</html>
"""


def digests(page: str, tag: str) -> list[str]:
    """What a content security policy calls the page's own inline elements of this tag."""
    own = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", page, flags=re.DOTALL)
    return [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in own]


def course_datasets(sweeps: Path) -> dict[str, dict]:
    """The shipped sweeps of the course, reduced to what the explorer shows: over width, experts, granularity and depth.

    sweeps: the folder data/sweeps. Arms are those with three seeds at width 64, at the length that notebooks 06 and 07 compare;
    of the depth it is all tables, at the longer of the two lengths.
    """
    widths = pd.concat([read_sweep(sweeps / f"{name}.jsonl") for name in ("transfer", "router_rules")], ignore_index=True)
    found = {"width": explorer_data(widths)}
    tuned = transfer_report(widths[widths.parametrization == CHOSEN[0]]).grid_lr.iloc[0]  # the best LR of the smallest width
    found["width"]["start"] |= {"tables": CHOSEN, "my_lr": math.log2(tuned)}
    for by, names, arms, steps in (
        ("n_experts", ("expert_count", "balance"), EXPERT_ARMS, 200),
        ("granularity", ("granularity", "router_cells"), ARMS, 400),
    ):
        rows = labelled(pd.concat([read_sweep(sweeps / f"{name}.jsonl") for name in names], ignore_index=True), arms)
        rows = rows[(rows.width == 64) & (rows.steps == steps)]
        rows = rows[rows.groupby(["parametrization", by]).seed.transform("nunique") == SEEDS]
        data = explorer_data(rows, by, "arms")
        data["start"]["tables"] = COMPARED[by]
        found[{"n_experts": "number of experts"}.get(by, by)] = data
    depths = read_sweep(sweeps / "depth.jsonl")
    return found | {"depth": explorer_data(depths[depths.steps == depths.steps.max()], "depth")}
