"""The explorers of a table's cells and of a coordinate check. None trains in a slider's callback."""

from __future__ import annotations

import html

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure

from .config import Config
from .coordinate_figures import exponents_chart, in_forward_order, tensor_curves
from .coordinates import coordinate_check
from .diagnoses import diagnosis
from .explorer import SPACED, Explorer, html_table, labelled
from .parametrization import CELLS, Monomial, Parametrization, as_monomial, fan_in, width
from .probe import OUTSIDE
from .tables import PARAMETRIZATIONS, parametrization
from .theory import predicted_exponents, predictions
from .verdicts import exponents

CHOICES: tuple[Monomial | float, ...] = (  # what a cell can be set to; an embedding's fan_in never grows, the width does
    1,
    1 / fan_in,
    1 / fan_in**0.5,
    1 / fan_in**2,
    fan_in**0.5,
    fan_in,
    1 / width,
)


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
