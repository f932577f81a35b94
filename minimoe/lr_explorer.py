"""The explorer of LR curves: one module of JavaScript, lr_explorer.js, for the notebook and for a page without a kernel.

The module draws and computes in the browser. Python gives it the runs (`explorer_data`), follows what is chosen, and keeps a
still picture and the numbers for a notebook that is opened without a kernel.
"""

from __future__ import annotations

import html
import math
from pathlib import Path

import anywidget
import numpy as np
import pandas as pd
import traitlets
from matplotlib.figure import Figure

from .config import require
from .explorer import Drawn, html_table
from .figures import lr_curves, styles, table_styles
from .transfer import losses_at, mean_losses, regrets

PLURALS = {"width": "widths", "n_experts": "experts", "granularity": "granularities", "depth": "depths"}
END = "the end"  # in place of a step, where runs differ in length
AT_FIRST = 3  # tables shown before the reader has chosen
MY_LR = -6.0  # log2 of the LR that is marked at first
MODULE, STYLE = (Path(__file__).with_name(f"lr_explorer.{kind}") for kind in ("js", "css"))
STATE = ("tables", "values", "seeds", "step", "my_lr", "swapped", "minima")


def explorer_data(frame: pd.DataFrame, by: str = "width", names: str = "tables") -> dict:
    """The runs of a sweep as lr_explorer.js reads them: plain JSON, losses as whole millionths of a nat, null if diverged.

    frame: as `read_sweep` returns it, with histories. by: the axis of transfer, any column of numbers, as in `mean_losses`; over
    by="steps" there is also "the end" of each run. names: what the parametrizations are called here, e.g. "arms". Raises
    ValueError for an empty frame, or where the runs that did not diverge have no recorded step in common.
    """
    require(len(frame) > 0, "frame", "no rows", "must have runs")
    recorded = [{record["step"] for record in history} for history in frame.history[~frame.diverged]]
    steps = sorted(set.intersection(*recorded)) if recorded else []
    if by == "steps":
        steps.append(END)
    if not steps:
        raise ValueError("the runs that did not diverge have no recorded step in common: select one length of training")
    tables = list(dict.fromkeys(frame.parametrization))
    values, seeds = (sorted(set(frame[column].tolist())) for column in (by, "seed"))
    losses = zip(*(at_step(frame, step).val_loss for step in steps), strict=True)
    rows = zip(frame.parametrization, frame[by], frame.seed, frame.lr, losses, strict=True)
    return {
        "label": by.replace("_", " "),
        "plural": PLURALS.get(by, by.replace("_", " ")),
        "names": names,
        "tables": tables,
        "values": values,
        "seeds": seeds,
        "steps": steps,
        "looks": {"tables": [*table_styles(tables).values()], "values": [styles(values, by)[value] for value in values]},
        "limits": _limits(frame, steps),
        "runs": [
            [tables.index(name), values.index(value), seeds.index(seed), round(math.log2(lr), 6), [_whole(x) for x in own]]
            for name, value, seed, lr, own in rows
        ],
        "start": {"tables": tables[:AT_FIRST], "values": values, "seeds": seeds, "step": steps[-1], "my_lr": MY_LR}
        | {"swapped": False, "minima": True, "live": [], "note": ""},
    }


def at_step(frame: pd.DataFrame, step: int | str) -> pd.DataFrame:
    """The frame with the losses after `step` steps, or at the end of each run."""
    return frame if step == END else losses_at(frame, step)


def _whole(loss: float) -> int | None:
    return round(loss * 1e6) if math.isfinite(loss) else None


def _limits(frame: pd.DataFrame, steps: list) -> list[float]:
    """The lowest and the highest loss that an explorer shows at every step: from the best at the end to just above what half
    of all runs have reached at the first step."""
    finite = frame.val_loss[frame.val_loss < math.inf]
    if finite.empty:
        return [0.0, 1.0]
    return [float(finite.min()), float(max(at_step(frame, steps[0]).val_loss.median(), finite.quantile(0.9))) + 0.1]


class LRExplorer(Drawn, anywidget.AnyWidget):
    """Loss against LR from shipped sweeps: choose tables, sizes and seeds; let the training go on; drag "my LR" on the figure.

    frame, by, names: as for `explorer_data`. What is chosen: `tables`, `values`, `seeds`, `step`, `my_lr` (a log2), `swapped` (a
    panel for each size in place of each table) and `minima`; each can be set from Python, too. Nothing is trained here; `live`
    rows, from a `LiveSweep`, are drawn dashed. Raises ValueError as `explorer_data` does, TraitError for an unknown choice.
    """

    _esm, _css = MODULE, STYLE
    datasets = traitlets.Dict().tag(sync=True)
    dataset = traitlets.Unicode().tag(sync=True)
    tables, values, seeds, live = (traitlets.List().tag(sync=True) for _ in range(4))
    step = traitlets.Any().tag(sync=True)
    note = traitlets.Unicode().tag(sync=True)  # on the live rows
    my_lr = traitlets.Float(MY_LR).tag(sync=True)
    swapped, minima = (traitlets.Bool(on).tag(sync=True) for on in (False, True))

    def __init__(self, frame: pd.DataFrame, by: str = "width", names: str = "tables"):
        self.frame, self.by, self.live_rows = frame, by, frame.iloc[:0]
        self.data = explorer_data(frame, by, names)
        self._losses_at = {}
        self.show_nothing_yet()
        super().__init__(datasets={by: self.data}, dataset=by, **self.data["start"])
        self.observe(self.refresh, STATE)
        self.refresh()

    @traitlets.validate("tables", "values", "seeds")
    def _known(self, proposal) -> list:
        known = self.data[proposal.trait.name]
        unknown = [item for item in proposal.value if item not in known]
        if unknown:
            raise traitlets.TraitError(f"{proposal.trait.name}: {unknown[0]!r} is not one of {', '.join(map(str, known))}")
        return [item for item in known if item in proposal.value]

    @traitlets.validate("step")
    def _recorded(self, proposal) -> int | str:
        if proposal.value not in self.data["steps"]:
            raise traitlets.TraitError(f"step: {proposal.value!r} is not one of {', '.join(map(str, self.data['steps']))}")
        return proposal.value

    def chosen(self) -> pd.DataFrame:
        """The chosen rows, with the losses at the chosen step. Raises ValueError if there are none."""
        if self.step not in self._losses_at:
            self._losses_at[self.step] = at_step(self.frame, self.step)
        frame = self._losses_at[self.step]
        choices = {"parametrization": (self.tables, "names"), self.by: (self.values, "plural"), "seed": (self.seeds, "")}
        for column, (items, plural) in choices.items():
            frame = frame[frame[column].isin(items)]
            if frame.empty:
                raise ValueError(f"choose at least one of {self.data.get(plural, 'seeds')}")
        return frame

    def add_live(self, rows: pd.DataFrame) -> None:
        """Draw these rows too, dashed, in place of earlier ones of the same curves."""
        curves = set(zip(rows.parametrization, rows[self.by], strict=True))
        own = zip(self.live_rows.parametrization, self.live_rows[self.by], strict=True)
        earlier = [curve not in curves for curve in own]
        self.live_rows = pd.concat([self.live_rows[earlier], rows], ignore_index=True)
        means = mean_losses(self.live_rows, self.by)
        points = zip(means.parametrization, means[self.by].tolist(), np.log2(means.lr), means.loss, strict=True)
        self.live = [[name, value, x, loss if math.isfinite(loss) else None] for name, value, x, loss in points]
        self.refresh()

    def chosen_live(self) -> pd.DataFrame:
        """The live rows of the chosen tables and sizes."""
        return self.live_rows[self.live_rows[self.by].isin(self.values) & self.live_rows.parametrization.isin(self.tables)]

    def draw(self) -> Figure:
        """The still picture of what is chosen."""
        rows = self.chosen()
        curves = ", ".join(map(str, self.values))
        self.image.words = (
            f"loss against learning rate: {', '.join(self.tables)}; a curve for each {self.data['label']}: {curves}"
        )
        marks = {"minima": self.minima, "my_lr": 2.0**self.my_lr, "swapped": self.swapped}
        return lr_curves(rows, self.by, **marks, live=self.chosen_live(), losses=self.data["limits"])

    def regrets(self) -> pd.DataFrame:
        """What my LR costs each model, in nats: a row per table, a column per size."""
        found = regrets(self.chosen(), 2.0**self.my_lr, self.by)
        return found.pivot(index="parametrization", columns=self.by, values="regret").reindex(self.tables)

    def say(self) -> str:
        found = regrets(self.chosen(), 2.0**self.my_lr, self.by)
        words = [_cost(row) for row in found.itertuples()]
        shown = found.assign(words=words).pivot(index="parametrization", columns=self.by, values="words")
        shown = shown.reindex(self.tables).reset_index().rename_axis(columns=None)
        shown = shown.rename(columns={"parametrization": f"regret of 2^{self.my_lr:g} (nats) at {self.by}"})
        self.note = self._live_words()
        return html_table(shown) + (f"<p>{html.escape(self.note)}</p>" if self.note else "")

    def _live_words(self) -> str:
        live = self.chosen_live()
        if live.empty:
            return ""
        said = f"Dashed: {len(live)} live rows of {', '.join(map(str, sorted(set(live.steps))))} steps"
        if set(live.corpus_digest) != set(self.frame.corpus_digest):
            said += ", on another corpus than the shipped ones (the digests differ): compare shapes, not losses"
        return f"{said}."


def _cost(row) -> str:
    """A regret in words."""
    if not row.inside:
        return "off the grid"
    return "all diverged" if math.isnan(row.regret) else f"{row.regret:.3f}"
