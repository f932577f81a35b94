"""A widget that trains: a small sweep in a thread, whose curves join those of an `LRExplorer`."""

from __future__ import annotations

import html
import math
import threading

import ipywidgets as widgets
import pandas as pd

from .corpus import Corpus, load_corpus
from .explorer import SPACED, LiveOutput, labelled, show
from .lr_explorer import LRExplorer
from .parametrization import Parametrization
from .sweeps import sweep
from .tables import PARAMETRIZATIONS, ROUTER_RULES

LARGEST_LIVE = 128  # width that a laptop trains in seconds


class LiveSweep(widgets.VBox):
    """A button that trains a small sweep now, a bar, a button that stops it, a status; its curves join an `LRExplorer`.

    Runs are trained one after the other in a thread, so that the kernel stays free and a stop is heard after at most one
    run. `wait` returns when it is done.
    """

    def __init__(self, explorer: LRExplorer, corpus: str | Corpus = "pydocs"):
        known = {**PARAMETRIZATIONS, **ROUTER_RULES}
        tables = [(name, known[name]) for name in explorer.data["tables"] if name in known]
        values = [value for value in explorer.data["values"] if value <= LARGEST_LIVE]
        if explorer.by != "width" or not tables or not values:
            raise ValueError(f"a live sweep needs an explorer over widths up to {LARGEST_LIVE}, of tables that have a name")
        self.explorer, self.corpus = explorer, corpus
        self._stop, self._thread = threading.Event(), None
        self.table = labelled(widgets.Dropdown, "table", "what to train under", options=tables, value=tables[-1][1])
        self.width = labelled(widgets.Dropdown, "width", "of the model", options=values, value=values[0])
        self.steps = labelled(widgets.IntSlider, "steps", "of each run", "300px", min=20, max=200, step=20, value=40)
        self.start = widgets.Button(description="Train now", tooltip="trains six learning rates", button_style="primary")
        self.stop = widgets.Button(description="Stop", tooltip="after the run that is going on", disabled=True)
        self.bar = labelled(widgets.IntProgress, "runs", "trained so far", "300px", min=0, max=6, value=0)
        self.status = LiveOutput("text/html", "LiveSweep: its status")
        self.status.value = "ready"
        self.start.on_click(self._started)
        self.stop.on_click(lambda _button: self._stop.set())
        choices = widgets.HBox([self.table, self.width, self.steps], layout=SPACED)
        super().__init__([choices, widgets.HBox([self.start, self.stop, self.bar], layout=SPACED)])

    def _started(self, _button) -> None:
        self._stop.clear()
        self.start.disabled, self.stop.disabled = True, False
        job = (self.table.value, self.width.value, self.steps.value)
        self._thread = threading.Thread(target=self._train, args=job, daemon=True)
        self._thread.start()

    def _train(self, table: Parametrization, width: int, steps: int) -> None:
        rows = []
        try:
            corpus = load_corpus(self.corpus)
            lrs = [2.0**octave for octave in range(-8, -2)]
            for done, lr in enumerate(lrs):
                if self._stop.is_set():
                    break
                self.bar.value, self.status.value = done, f"width {width}, LR 2^{math.log2(lr):g} ..."
                rows.append(sweep((width,), (table,), (lr,), (0,), steps, corpus, n_jobs=1, progress=False))
                self.explorer.add_live(pd.concat(rows, ignore_index=True))
            else:
                self.bar.value = len(lrs)
            said = "stopped" if self._stop.is_set() else "done"
            self.status.value = f"{said}: {len(rows)} of {len(lrs)} runs{_found(rows)}"
        except Exception as error:  # a thread's exception would be seen nowhere
            self.status.value = f"<b>{html.escape(f'{type(error).__name__}: {error}')}</b>"
        finally:
            self.start.disabled, self.stop.disabled = False, True

    def _ipython_display_(self) -> None:
        show(self, self.status)

    def wait(self, timeout: float | None = None) -> None:
        """Until the sweep that was started has ended. Raises TimeoutError."""
        if self._thread is not None:
            self._thread.join(timeout)
            if self._thread.is_alive():
                raise TimeoutError(f"the live sweep is still training after {timeout} s")


def _found(rows: list[pd.DataFrame]) -> str:
    """What the runs so far say, below the button, as the picture may be out of sight."""
    if not rows:
        return ""
    losses = {math.log2(row.lr.iloc[0]): row.val_loss.iloc[0] for row in rows}
    return (
        f"; lowest loss {min(losses.values()):.2f} at LR 2^{min(losses, key=losses.get):g} (drawn dashed in the explorer above)"
    )
