"""Widgets that choose rows and show figures: controls -> observe -> Figure -> PNG. None trains in a slider's callback.

Where no kernel runs (a code-hosting site, an exported page) an explorer shows the picture that it last drew. Each is an
ordinary ipywidgets box, so a test sets `.value` of its controls and reads `.figure`, `.text` and `.image` without a browser.
"""

from __future__ import annotations

import base64
import html
import io
import math
import threading
from collections.abc import Iterable

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure

from .coordinates import OUTSIDE, TENSORS, coordinate_check, exponents, predicted_exponents, suspects
from .corpus import Corpus, load_corpus
from .figures import exponents_chart, lr_curves, tensor_curves
from .model import Config
from .parametrization import CELLS, PARAMETRIZATIONS, Monomial, Parametrization, fan_in, parametrization
from .sweeps import sweep
from .transfer import losses_at, regrets

DPI = 90
VALUES: dict[str, Monomial | float] = {  # what a cell can be set to
    "1": 1,
    "1/fan_in": 1 / fan_in,
    "1/fan_in^0.5": 1 / fan_in**0.5,
    "1/fan_in^2": 1 / fan_in**2,
    "fan_in^0.5": fan_in**0.5,
    "fan_in": fan_in,
}


class Explorer(widgets.VBox):
    """Controls above a picture of fixed width and a line of text. A subclass says what to draw and to say."""

    def __init__(self, controls: Iterable[widgets.Widget], rows: Iterable[widgets.Widget], width: int = 900):
        self.image = widgets.Image(format="png", layout=widgets.Layout(width=f"{width}px", max_width="100%"))
        self.text = widgets.HTML()
        self.figure: Figure | None = None
        super().__init__([*rows, self.image, self.text])
        self.add_class("minimoe-explorer")
        for control in controls:
            control.observe(self.refresh, "value")
        self.refresh()

    def refresh(self, _change=None) -> None:
        """Draw again what the controls ask for; what cannot be drawn is said in words."""
        try:
            self.figure, said = self.draw(), self.say()
        except ValueError as error:
            self.text.value = f"<b>{html.escape(str(error))}</b>"
            return
        self.image.value = _png(self.figure)
        self.text.value = said

    def draw(self) -> Figure:
        raise NotImplementedError

    def say(self) -> str:
        """HTML below the picture: the numbers, for eyes and screen readers alike."""
        raise NotImplementedError

    def _repr_mimebundle_(self, **kwargs) -> dict:
        """The live widget, beside a picture for where no kernel runs."""
        bundle = super()._repr_mimebundle_(**kwargs)
        still = base64.b64encode(self.image.value).decode()
        return {**bundle, "text/plain": f"{type(self).__name__}: run this cell to use it", "image/png": still}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def _control(kind: type, label: str, tooltip: str, wide: str = "auto", **settings) -> widgets.Widget:
    """A control with a visible label (it is what a screen reader reads) and a tooltip."""
    style = {"description_width": "initial"}
    return kind(description=label, tooltip=tooltip, style=style, layout=widgets.Layout(width=wide), **settings)


def _html_table(table: pd.DataFrame) -> str:
    return table.to_html(index=False, border=0, na_rep="", escape=True)


class LRExplorer(Explorer):
    """Loss against LR from shipped sweeps: choose tables, widths, step and seeds; drag "my LR" and read what it costs.

    frame: as `read_sweep` returns it, with histories. by: the axis of transfer. Nothing is trained here; `live` rows, from
    a `LiveSweep`, are drawn dashed.
    """

    def __init__(self, frame: pd.DataFrame, by: str = "width"):
        self.frame, self.by, self.live = frame, by, frame.iloc[:0]
        steps = sorted({record["step"] for history in frame.history for record in history})
        names, values, seeds = (list(dict.fromkeys(frame[c])) for c in ("parametrization", by, "seed"))
        multiple = widgets.SelectMultiple
        self.tables = _control(multiple, "tables", "ctrl-click for several", options=names, value=names, rows=5)
        values, seeds = sorted(values), sorted(seeds)
        self.values = _control(multiple, f"{by.replace('_', ' ')}s", "ctrl-click", options=values, value=values, rows=5)
        self.seeds = _control(multiple, "seeds", "several: mean and band", options=seeds, value=seeds, rows=5)
        self.step = _control(widgets.SelectionSlider, "after step", "training goes on", "420px", options=steps, value=steps[-1])
        low, high = (round(math.log2(f(frame.lr))) for f in (min, max))
        self.my_lr = _control(
            widgets.FloatSlider, "my LR = 2^", "arrow keys move it", "420px", min=low, max=high, step=0.25, value=-6.0
        )
        self.minima = _control(widgets.Checkbox, "mark the minima", "a star at each optimum", value=True)
        rows = (
            widgets.HBox([self.tables, self.values, self.seeds]),
            widgets.HBox([self.step, self.my_lr, self.minima], layout=widgets.Layout(flex_flow="row wrap")),
        )
        super().__init__((self.tables, self.values, self.seeds, self.step, self.my_lr, self.minima), rows)

    def chosen(self) -> pd.DataFrame:
        """The rows that the controls ask for, with the losses at the chosen step. Raises ValueError if there are none."""
        frame = self.frame
        for column, control in (("parametrization", self.tables), (self.by, self.values), ("seed", self.seeds)):
            frame = frame[frame[column].isin(control.value)]
            if frame.empty:
                raise ValueError(f"choose at least one of {control.description}")
        return losses_at(frame, self.step.value)

    def add_live(self, rows: pd.DataFrame) -> None:
        """Draw these rows too, dashed."""
        self.live = pd.concat([self.live, rows], ignore_index=True)
        self.refresh()

    def draw(self) -> Figure:
        live = self.live[self.live[self.by].isin(self.values.value) & self.live.parametrization.isin(self.tables.value)]
        return lr_curves(self.chosen(), self.by, minima=self.minima.value, my_lr=2.0**self.my_lr.value, live=live)

    def regrets(self) -> pd.DataFrame:
        """What my LR costs each model, in nats: a row per table, a column per width."""
        found = regrets(self.chosen(), 2.0**self.my_lr.value, self.by)
        return found.pivot(index="parametrization", columns=self.by, values="regret").reindex(self.tables.value)

    def say(self) -> str:
        costs = self.regrets()
        shown = costs.map(lambda nats: "off the grid" if math.isnan(nats) else f"{nats:.3f}")
        shown = shown.reset_index().rename_axis(columns=None)
        shown = shown.rename(columns={"parametrization": f"regret of 2^{self.my_lr.value:g} (nats) at {self.by}"})
        return _html_table(shown) + self._live_words()

    def _live_words(self) -> str:
        if self.live.empty:
            return ""
        said = f"Dashed: {len(self.live)} live rows of {', '.join(f'{s}' for s in sorted(set(self.live.steps)))} steps"
        if set(self.live.corpus_digest) != set(self.frame.corpus_digest):
            said += ", on another corpus than the shipped ones (the digests differ): compare shapes, not losses"
        return f"<p>{said}.</p>"


class LiveSweep(widgets.VBox):
    """A button that trains a small sweep now, a bar, a button that stops it; its curves join an `LRExplorer`.

    Runs are trained one after the other in a thread, so that the kernel stays free and a stop is heard after at most one
    run. `wait` returns when it is done.
    """

    def __init__(self, explorer: LRExplorer, corpus: str | Corpus = "pydocs"):
        self.explorer, self.corpus = explorer, corpus
        self._stop, self._thread = threading.Event(), None
        tables = list(explorer.tables.options)
        self.table = _control(widgets.Dropdown, "table", "what to train under", options=tables, value=tables[-1])
        self.width = _control(widgets.Dropdown, "width", "of the model", options=[32, 64, 128], value=32)
        self.steps = _control(widgets.IntSlider, "steps", "of each run", "300px", min=20, max=200, step=20, value=40)
        self.start = widgets.Button(description="Train now", tooltip="trains six learning rates", button_style="primary")
        self.stop = widgets.Button(description="Stop", tooltip="after the run that is going on", disabled=True)
        self.bar = _control(widgets.IntProgress, "runs", "trained so far", "300px", min=0, max=6, value=0)
        self.status = widgets.HTML("ready")
        self.start.on_click(self._started)
        self.stop.on_click(lambda _button: self._stop.set())
        choices = widgets.HBox([self.table, self.width, self.steps], layout=widgets.Layout(flex_flow="row wrap"))
        super().__init__([choices, widgets.HBox([self.start, self.stop, self.bar, self.status])])

    def _started(self, _button) -> None:
        self._stop.clear()
        self.start.disabled, self.stop.disabled = True, False
        job = (self.table.value, self.width.value, self.steps.value)
        self._thread = threading.Thread(target=self._train, args=job, daemon=True)
        self._thread.start()

    def _train(self, name: str, width: int, steps: int) -> None:
        rows = []
        try:
            corpus = load_corpus(self.corpus)
            table = self._table(name)
            lrs = [2.0**octave for octave in range(-8, -2)]
            for done, lr in enumerate(lrs):
                if self._stop.is_set():
                    break
                self.bar.value, self.status.value = done, f"width {width}, LR 2^{math.log2(lr):g} ..."
                rows.append(sweep((width,), (table,), (lr,), (0,), steps, corpus, n_jobs=1, progress=False))
            else:
                self.bar.value = len(lrs)
            said = "stopped" if self._stop.is_set() else "done"
            if rows:
                self.explorer.add_live(pd.concat(rows, ignore_index=True))
            self.status.value = f"{said}: {len(rows)} of {len(lrs)} runs"
        except Exception as error:  # a thread's exception would be seen nowhere
            self.status.value = f"<b>{html.escape(f'{type(error).__name__}: {error}')}</b>"
        finally:
            self.start.disabled, self.stop.disabled = False, True

    def _table(self, name: str) -> Parametrization:
        from .routers import ROUTER_RULES

        return parametrization(ROUTER_RULES.get(name, name))

    def wait(self, timeout: float | None = None) -> None:
        """Until the sweep that was started has ended. Raises TimeoutError."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError(f"the live sweep is still training after {timeout} s")


class TableExplorer(Explorer):
    """Edit a cell of a table; the predicted exponents change at once, and a button measures them.

    measure: keyword arguments of `coordinate_check` for the button (default: widths 32 to 128, two steps, one seed).
    """

    def __init__(self, table: str | Parametrization = "mup", **measure):
        self.measure = {"widths": (32, 64, 128), "steps": 2, "seeds": (0, 1), "n_jobs": 1, **measure}
        self.table, self.measured = parametrization(table), None
        self.base = _control(widgets.Dropdown, "start from", "a table", options=list(PARAMETRIZATIONS), value=self.table.name)
        self.role = _control(widgets.Dropdown, "role", "whose cell", options=list(self.table.roles), value="router")
        self.cell = _control(widgets.Dropdown, "cell", "which cell", options=list(CELLS[:3]), value="lr")
        self.value = _control(widgets.Dropdown, "value", "what it becomes", options=list(VALUES))
        self.apply = widgets.Button(description="Set the cell", tooltip="edits the table", button_style="primary")
        self.check = widgets.Button(description="Measure", tooltip="a coordinate check of this table: some seconds")
        self.base.observe(self._reset, "value")
        self.apply.on_click(self._set)
        self.check.on_click(self._measure)
        rows = (
            widgets.HBox([self.base, self.role, self.cell, self.value], layout=widgets.Layout(flex_flow="row wrap")),
            widgets.HBox([self.apply, self.check]),
        )
        super().__init__((), rows)

    def _reset(self, _change) -> None:
        self.table, self.measured = PARAMETRIZATIONS[self.base.value], None
        self.refresh()

    def _set(self, _button) -> None:
        edited = self.table.replace(self.role.value, **{self.cell.value: VALUES[self.value.value]})
        same = edited[self.role.value] == PARAMETRIZATIONS[self.base.value][self.role.value]
        whole = all(edited[role] == PARAMETRIZATIONS[self.base.value][role] for role in edited.roles)
        self.table, self.measured = PARAMETRIZATIONS[self.base.value] if same and whole else edited, None
        self.refresh()

    def _measure(self, _button) -> None:
        self.text.value = "measuring ..."
        self.measured = exponents(coordinate_check(self.table, **self.measure))
        self.refresh()

    def predicted(self) -> dict[tuple[str, str], float]:
        """The exponents that follow from the table."""
        return predicted_exponents(Config(self.table))

    def draw(self) -> Figure:
        return exponents_chart(self.predicted(), self.measured)

    def say(self) -> str:
        said = f"<pre>{html.escape(str(self.table))}</pre>"
        if self.measured is None:
            return said
        blamed = suspects(self.measured)
        if blamed.empty:
            return said + "<p>Measured: every weight keeps muP's desiderata.</p>"
        lines = (f"{row.role}.{row.cell}: width^{row.power:+.2f} too much" for row in blamed.itertuples())
        return said + "<p>Measured, and blamed: " + "; ".join(lines) + ".</p>"


class CoordinateExplorer(Explorer):
    """One tensor of a coordinate check, at one step, under one table: init, update, drift, change.

    frame: from `coordinate_check`.
    """

    def __init__(self, frame: pd.DataFrame):
        self.frame = frame
        names, steps = list(dict.fromkeys(frame.parametrization)), sorted(set(frame.step) - {0})
        tensors = [tensor for tensor in TENSORS if tensor in set(frame.tensor)]
        layers = sorted(set(frame.layer) - {OUTSIDE})
        self.name = _control(widgets.Dropdown, "table", "of rules", options=names, value=names[0])
        self.tensor = _control(widgets.Dropdown, "tensor", "in the forward pass's order", options=tensors, value="router")
        self.layer = _control(widgets.Dropdown, "layer", "embedding and logits have none", options=layers)
        self.step = _control(widgets.SelectionSlider, "after step", "arrow keys move it", "300px", options=steps, value=steps[-1])
        controls = (self.name, self.tensor, self.layer, self.step)
        super().__init__(controls, (widgets.HBox(controls, layout=widgets.Layout(flex_flow="row wrap")),))

    def chosen(self) -> pd.DataFrame:
        """The rows of the chosen table and tensor."""
        frame = self.frame
        layer = OUTSIDE if self.tensor.value in ("embedding", "logits") else self.layer.value
        return frame[(frame.parametrization == self.name.value) & (frame.tensor == self.tensor.value) & (frame.layer == layer)]

    def slopes(self) -> pd.DataFrame:
        """The chosen tensor's rows of `exponents` at the chosen step."""
        return exponents(self.chosen(), self.step.value)

    def draw(self) -> Figure:
        rows = self.chosen()
        return tensor_curves(rows, self.tensor.value, int(rows.layer.iloc[0]), self.step.value)

    def say(self) -> str:
        columns = ["quantity", "predicted", "measured", "stderr", "verdict", "alignment"]
        return _html_table(self.slopes()[columns].round(2))
