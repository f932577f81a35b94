"""The explorers: LR curves, a table's cells, a coordinate check. None trains in a slider's callback."""

from __future__ import annotations

import html
import math

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure

from .config import Config
from .coordinate_figures import exponents_chart, in_forward_order, tensor_curves
from .coordinates import coordinate_check
from .diagnoses import diagnosis
from .explorer import SPACED, Explorer, html_table, labelled
from .figures import MY_LR, lr_curves
from .parametrization import CELLS, Monomial, Parametrization, as_monomial, fan_in, width
from .probe import OUTSIDE
from .tables import PARAMETRIZATIONS, parametrization
from .theory import predicted_exponents, predictions
from .transfer import losses_at, regrets
from .verdicts import exponents

PLURALS = {"width": "widths", "n_experts": "experts", "granularity": "granularities"}
END = "the end"  # in place of a step, where runs differ in length
AT_FIRST = 3  # tables shown before the reader has chosen
MOST_PANELS = 6  # of one picture, whose height does not change
SIZE = (10.0, 4.3)  # of the LR curves, in inches: with the controls it fits on a laptop's screen
CHOICES: tuple[Monomial | float, ...] = (  # what a cell can be set to; an embedding's fan_in never grows, the width does
    1,
    1 / fan_in,
    1 / fan_in**0.5,
    1 / fan_in**2,
    fan_in**0.5,
    fan_in,
    1 / width,
)


class LRExplorer(Explorer):
    """Loss against LR from shipped sweeps: choose tables, widths, step and seeds; drag "my LR" and read what it costs.

    frame: as `read_sweep` returns it, with histories. by: the axis of transfer: any column of numbers, as in `mean_losses`;
    over by="steps" the slider also has "the end" of each run. names: what the parametrizations are called here, e.g. "arms"
    for rows that `arms.labelled` has named. Panels are these, curves the values of `by`, or the other way round. Nothing is
    trained here; `live` rows, from a `LiveSweep`, are drawn dashed.
    """

    def __init__(self, frame: pd.DataFrame, by: str = "width", names: str = "tables"):
        self.frame, self.by, self.live = frame, by, frame.iloc[:0]
        recorded = [{record["step"] for record in history} for history in frame.history[~frame.diverged]]
        steps = sorted(set.intersection(*recorded)) if recorded else []
        if by == "steps":
            steps.append(END)
        if not steps:
            raise ValueError("the runs that did not diverge have no recorded step in common: select one length of training")
        tables, values, seeds = (list(dict.fromkeys(frame[c])) for c in ("parametrization", by, "seed"))
        multiple, first = widgets.SelectMultiple, tables[:AT_FIRST]
        self.tables = labelled(multiple, names, "ctrl-click for several", "330px", options=tables, value=first, rows=4)
        values, seeds = sorted(values), sorted(seeds)
        plural = PLURALS.get(by, by.replace("_", " "))
        self.values = labelled(multiple, plural, "ctrl-click", options=values, value=values, rows=4)
        self.seeds = labelled(multiple, "seeds", "several: mean and band", options=seeds, value=seeds, rows=4)
        self.step = labelled(widgets.SelectionSlider, "after step", "training goes on", "420px", options=steps, value=steps[-1])
        low, high = (round(math.log2(f(frame.lr))) for f in (min, max))
        self.my_lr = labelled(
            widgets.FloatSlider, "my LR = 2^", "arrow keys move it", "420px", min=low, max=high, step=0.25, value=-6.0
        )
        self.minima = labelled(widgets.Checkbox, "mark the minima", "a star at each optimum", value=True)
        self._losses_at, self._drawn = {}, None
        self._limits = _limits(frame, steps)
        panels = [(names, False), (self.values.description, True)]
        self.panels = labelled(widgets.ToggleButtons, "a panel for each of the", "the others are curves", options=panels)
        rows = (
            widgets.HBox([self.tables, self.values, self.seeds, self.panels], layout=SPACED),
            widgets.HBox([self.step, self.my_lr, self.minima], layout=SPACED),
        )
        self._redrawing = (self.tables, self.values, self.seeds, self.step, self.minima, self.panels)
        super().__init__((*self._redrawing, self.my_lr), rows)

    def chosen(self) -> pd.DataFrame:
        """The rows that the controls ask for, with the losses at the chosen step. Raises ValueError if there are none."""
        frame = self._at_the_step()
        for column, control in (("parametrization", self.tables), (self.by, self.values), ("seed", self.seeds)):
            frame = frame[frame[column].isin(control.value)]
            if frame.empty:
                raise ValueError(f"choose at least one of {control.description}")
        return frame

    def _at_the_step(self) -> pd.DataFrame:
        """The frame with the losses at the chosen step; read from the histories once for each step."""
        step = self.step.value
        if step not in self._losses_at:
            self._losses_at[step] = self.frame if step == END else losses_at(self.frame, step)
        return self._losses_at[step]

    def add_live(self, rows: pd.DataFrame) -> None:
        """Draw these rows too, dashed, in place of earlier ones of the same curves."""
        curves = set(zip(rows.parametrization, rows[self.by], strict=True))
        earlier = [curve not in curves for curve in zip(self.live.parametrization, self.live[self.by], strict=True)]
        self.live = pd.concat([self.live[earlier], rows], ignore_index=True)
        self.refresh()

    def chosen_live(self) -> pd.DataFrame:
        """The live rows of the chosen tables and widths."""
        return self.live[self.live[self.by].isin(self.values.value) & self.live.parametrization.isin(self.tables.value)]

    def draw(self) -> Figure:
        """The curves at one size and on one scale, whatever is chosen; where my LR alone has moved, its line is moved."""
        asked = (*(control.value for control in self._redrawing), len(self.live))
        if asked == self._drawn:
            for line in self.figure.findobj(lambda artist: artist.get_gid() == MY_LR):
                line.set_xdata([2.0**self.my_lr.value] * 2)
            return self.figure
        rows, column = self.chosen(), self.by if self.panels.value else "parametrization"
        if (number := rows[column].nunique()) > MOST_PANELS:
            raise ValueError(f"{number} panels are too many for one picture: choose at most {MOST_PANELS}")
        marks = {"minima": self.minima.value, "my_lr": 2.0**self.my_lr.value, "swapped": self.panels.value}
        figure = lr_curves(rows, self.by, **marks, live=self.chosen_live(), size=SIZE, losses=self._limits)
        for axes in figure.axes:
            axes.set_xlim(self.frame.lr.min() / 1.2, self.frame.lr.max() * 1.2)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # the layout is found; finding it again takes longer than drawing
        self._drawn = asked
        self.image.words = self._described(rows)
        return figure

    def _described(self, rows: pd.DataFrame) -> str:
        """The picture in words, for who cannot see it."""
        names, values = (", ".join(map(str, dict.fromkeys(rows[column]))) for column in ("parametrization", self.by))
        return f"loss against learning rate: {names}; a curve for each {self.by.replace('_', ' ')}: {values}"

    def regrets(self) -> pd.DataFrame:
        """What my LR costs each model, in nats: a row per table, a column per width."""
        found = regrets(self.chosen(), 2.0**self.my_lr.value, self.by)
        return found.pivot(index="parametrization", columns=self.by, values="regret").reindex(self.tables.value)

    def say(self) -> str:
        found = regrets(self.chosen(), 2.0**self.my_lr.value, self.by)
        words = [_cost(row) for row in found.itertuples()]
        shown = found.assign(words=words).pivot(index="parametrization", columns=self.by, values="words")
        shown = shown.reindex(self.tables.value).reset_index().rename_axis(columns=None)
        shown = shown.rename(columns={"parametrization": f"regret of 2^{self.my_lr.value:g} (nats) at {self.by}"})
        return html_table(shown) + self._live_words()

    def _live_words(self) -> str:
        live = self.chosen_live()
        if live.empty:
            return ""
        said = f"Dashed: {len(live)} live rows of {', '.join(map(str, sorted(set(live.steps))))} steps"
        if set(live.corpus_digest) != set(self.frame.corpus_digest):
            said += ", on another corpus than the shipped ones (the digests differ): compare shapes, not losses"
        return f"<p>{said}.</p>"


def _limits(frame: pd.DataFrame, steps: list) -> tuple[float, float]:
    """The lowest and the highest loss that an explorer shows at every step: from the best at the end to just above what half
    of all runs have reached at the first step."""
    first = frame if steps[0] == END else losses_at(frame, steps[0])
    finite = frame.val_loss[frame.val_loss < math.inf]
    return float(finite.min()), float(max(first.val_loss.median(), finite.quantile(0.9))) + 0.1


def _cost(row) -> str:
    """A regret in words."""
    if not row.inside:
        return "off the grid"
    return "all diverged" if math.isnan(row.regret) else f"{row.regret:.3f}"


class TableExplorer(Explorer):
    """Edit a cell of a table: the predicted exponents change at once, and a button measures them.

    table: to start from. fields: of the Config, e.g. activation="swiglu". The button's check has widths 32 to 128, two
    steps and two seeds, or what `measure` says: keyword arguments of `coordinate_check`.
    """

    def __init__(self, table: str | Parametrization = "mup", measure: dict | None = None, **fields):
        self.measure = {"widths": (32, 64, 128), "steps": 2, "seeds": (0, 1), "n_jobs": 1, **(measure or {})}
        self.table, self.fields, self.measured = parametrization(table), fields, None
        starts = {self.table.name: self.table, **PARAMETRIZATIONS}
        self.base = labelled(widgets.Dropdown, "start from", "a table", options=list(starts.items()), value=self.table)
        self.role = labelled(widgets.Dropdown, "role", "whose cell", options=list(self.table.roles), value="router")
        self.cell = labelled(widgets.Dropdown, "cell", "which cell", options=list(CELLS[:3]), value="lr")
        self.value = labelled(widgets.Dropdown, "value", "the cell's: choose another")
        self.check = widgets.Button(description="Measure", tooltip="a coordinate check of this table: some seconds")
        self.base.observe(self._start, "value")
        for control in (self.role, self.cell):
            control.observe(self._offer, "value")
        self._offer()
        self.value.observe(self._edit, "value")
        self.check.on_click(self._measure)
        edits = widgets.HBox([self.base, self.role, self.cell, self.value], layout=SPACED)
        super().__init__((), (edits, self.check))

    def _offer(self, _change=None) -> None:
        """Let `value` show the chosen cell, and what it could be instead."""
        now = getattr(self.table[self.role.value], self.cell.value)
        options = {str(choice): choice for choice in (now, *(as_monomial(choice) for choice in CHOICES))}
        self.value.options = list(options.items())  # selects the first
        self.value.value = now  # where the options were these already

    def _start(self, _change) -> None:
        self.table, self.measured = self.base.value, None
        self._offer()
        self.refresh()

    def _edit(self, _change) -> None:
        if self.value.value == getattr(self.table[self.role.value], self.cell.value):
            return  # another cell is shown
        edited = self.table.replace(self.role.value, **{self.cell.value: self.value.value})
        same = next((table for _, table in self.base.options if table.rules == edited.rules), edited)
        self.table, self.measured = same, None
        self.refresh()

    def _measure(self, _button) -> None:
        self.text.value = "measuring ..."
        try:
            self.measured = exponents(coordinate_check(self.table, **self.measure, **self.fields))
        except Exception as error:  # of a button: it would be seen nowhere, and "measuring ..." would stand for ever
            self.text.value = f"<b>{html.escape(str(error) or type(error).__name__)}</b>"
            return
        self.refresh()

    def predicted(self) -> dict[tuple[str, str], float]:
        """The exponents that follow from the table."""
        return predicted_exponents(Config(self.table, **self.fields))

    def draw(self) -> Figure:
        return exponents_chart(predictions(Config(self.table, **self.fields)), self.measured)

    def say(self) -> str:
        said = f"<pre>{html.escape(str(self.table))}</pre>"
        if self.measured is None:
            return said
        (found,) = diagnosis(self.measured).values()
        return f"{said}<p>Measured: {html.escape(found)}</p>"


class CoordinateExplorer(Explorer):
    """One tensor of a coordinate check, at one step, under one table: init, update, propagated, change.

    frame: from `coordinate_check`.
    """

    def __init__(self, frame: pd.DataFrame):
        self.frame = frame
        names, steps = list(dict.fromkeys(frame.parametrization)), sorted(set(frame.step) - {0})
        tensors = in_forward_order(frame)
        layers = sorted(set(frame.layer) - {OUTSIDE})
        self.name = labelled(widgets.Dropdown, "table", "of rules", options=names, value=names[0])
        self.tensor = labelled(widgets.Dropdown, "tensor", "in the forward pass's order", options=tensors)
        self.layer = labelled(widgets.Dropdown, "layer", "embedding and logits have none", options=layers)
        self.step = labelled(widgets.SelectionSlider, "after step", "arrow keys move it", "300px", options=steps, value=steps[-1])
        if "router" in tensors:  # the tensor that tables disagree on
            self.tensor.value = "router"
        controls = (self.name, self.tensor, self.layer, self.step)
        super().__init__(controls, (widgets.HBox(controls, layout=SPACED),))

    def chosen(self) -> pd.DataFrame:
        """The rows of the chosen table and tensor."""
        frame = self.frame
        own = frame[(frame.parametrization == self.name.value) & (frame.tensor == self.tensor.value)]
        return own[own.layer.isin((self.layer.value, OUTSIDE))]

    def slopes(self) -> pd.DataFrame:
        """The chosen tensor's rows of `exponents` at the chosen step."""
        return exponents(self.chosen(), self.step.value)

    def draw(self) -> Figure:
        rows = self.chosen()
        return tensor_curves(rows, self.tensor.value, int(rows.layer.iloc[0]), self.step.value)

    def say(self) -> str:
        columns = ["quantity", "predicted", "measured", "stderr", "verdict", "alignment"]
        return html_table(self.slopes()[columns].round(2))
