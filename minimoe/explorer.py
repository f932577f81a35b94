"""Widgets that choose rows and show figures: controls -> observe -> Figure -> PNG. None trains in a slider's callback.

The controls are a widget; the picture and the words below it are ordinary outputs of the cell, which the controls change. So a
saved notebook holds the picture that was last drawn, and shows it again where no kernel runs; where the controls were it asks
to run the cell. A test sets `.value` of the controls and reads `.figure`, `.text` and `.image` without a browser.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable

import ipywidgets as widgets
import pandas as pd
from IPython.display import display
from matplotlib.figure import Figure

DPI = 90
SPACED = {"flex_flow": "row wrap", "grid_gap": "4px 18px"}  # of a row of controls
VIEW = "application/vnd.jupyter.widget-view+json"  # a live widget
TO_DO = "run this cell to use its controls"
# JupyterLab saves no controls, only that there were some: reopened, their place says "Error displaying widget: model not found".
# That place, and never one of live controls, has both classes. An output that Lab does not trust has no place for controls.
TO_DO_FOR_ERROR = f"""<style>
.jp-OutputArea-output.jupyter-widgets {{ visibility: hidden; font-size: 0; }}
.jp-OutputArea-output.jupyter-widgets::after {{ visibility: visible; font-size: 13px; content: "{TO_DO}"; }}
</style>
"""


class LiveOutput:
    """An ordinary output of a cell that can change: a saved notebook holds what it last showed.

    kind: its MIME type, "image/png" or "text/html". words: what stands for it as plain text.
    """

    def __init__(self, kind: str, words: str):
        self.kind, self.words, self._value, self._handles = kind, words, "", []

    @property
    def value(self) -> str | bytes:
        return self._value

    @value.setter
    def value(self, value: str | bytes) -> None:
        self._value = value
        for handle in self._handles:
            handle.update(self._bundle(), raw=True)

    def show(self) -> None:
        """Display it below the running cell; it follows every later change."""
        self._handles.append(display(self._bundle(), raw=True, display_id=True))

    def _bundle(self) -> dict[str, str]:
        shown = base64.b64encode(self._value).decode() if isinstance(self._value, bytes) else TO_DO_FOR_ERROR + self._value
        return {self.kind: shown, "text/plain": self.words}


class Drawn:
    """What an explorer shows below its controls: a picture and words. A subclass says what to draw and to say."""

    figure: Figure | None = None

    def show_nothing_yet(self) -> None:
        name = type(self).__name__
        self.image = LiveOutput("image/png", f"{name}: the picture; its numbers are below it")
        self.text = LiveOutput("text/html", f"{name}: the numbers")

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

    def _ipython_display_(self) -> None:
        show(self, self.image, self.text)


class Explorer(Drawn, widgets.VBox):
    """Controls of ipywidgets, and below them a picture of fixed size and words."""

    def __init__(self, controls: Iterable[widgets.Widget], rows: Iterable[widgets.Widget]):
        self.show_nothing_yet()
        super().__init__(list(rows))
        self.add_class("minimoe-explorer")
        for control in controls:
            control.observe(self.refresh, "value")
        self.refresh()


def show(controls: widgets.Widget, *outputs: LiveOutput) -> None:
    """Display the controls and, below them, the outputs: each is an output of the running cell."""
    view = {"version_major": 2, "version_minor": 0, "model_id": controls.model_id}
    display({VIEW: view, "text/plain": f"{type(controls).__name__}: {TO_DO}"}, raw=True)
    for output in outputs:
        output.show()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def labelled(kind: type, label: str, tooltip: str, wide: str = "auto", **settings) -> widgets.Widget:
    """A control with a visible label (it is what a screen reader reads) and a tooltip."""
    style = {"description_width": "initial"}
    return kind(description=label, tooltip=tooltip, style=style, layout=widgets.Layout(width=wide), **settings)


def html_table(table: pd.DataFrame) -> str:
    page = table.to_html(index=False, border=0, na_rep="", escape=True)
    return re.sub("<(th|td)>", r'<\1 style="padding: 2px 14px; text-align: right">', page)
