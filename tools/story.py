"""The first picture of the README: what happens to an LR that was tuned on a small model. Writes docs/story.png."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from minimoe import lr_curves, read_sweep, regrets, transfer_report
from minimoe.transfer import drift_words

ROOT = Path(__file__).parent.parent
TABLES = {"sp": "standard rules (sp)", "mup": "muP for MoE (mup)"}


def story(sweep: Path) -> Figure:
    """Loss against LR under sp and under mup, with the LR that is best for the smallest width, and what it costs the widest."""
    frame = read_sweep(sweep)
    frame = frame[frame.parametrization.isin(TABLES)]
    report = transfer_report(frame)
    small, wide = report.width.min(), report.width.max()
    tuned = report[report.width == small].grid_lr.iloc[0]
    cost = regrets(frame, tuned)
    figure = lr_curves(frame, my_lr=tuned, size=(11, 4.6))
    for axes, name in zip(figure.axes, TABLES, strict=True):
        there = cost[(cost.parametrization == name) & (cost.width == wide)].regret.item()
        moved = report[(report.parametrization == name) & (report.width == wide)].iloc[0]
        drift = f"drift of the best LR, width {small} to {wide}: {drift_words(moved.drift, moved.drift_error)} octaves"
        kept = f"width {wide} loses {abs(there):.2f} nats with the LR of width {small} (black)"
        axes.set_title(TABLES[name], fontsize=13, fontweight="bold", pad=36)
        axes.text(0.5, 1.02, f"{drift}\n{kept}", transform=axes.transAxes, ha="center", va="bottom", fontsize=10)
    return figure


if __name__ == "__main__":
    story(ROOT / "data" / "sweeps" / "transfer.jsonl").savefig(ROOT / "docs" / "story.png", dpi=130)
