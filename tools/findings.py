"""Write the tables of docs/findings.md again, from the shipped sweeps: python tools/findings.py

Words are kept by hand; what stands between a table's two markers is replaced.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import pandas as pd

from minimoe import ARMS, EXPERT_ARMS, drift_report, drift_words, labelled, read_sweep

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "findings.md"
SWEEPS = ROOT / "data" / "sweeps"


def measured(octaves: float, error: float) -> str:
    """An optimum as log2 of its LR."""
    if math.isnan(octaves):
        return "off the grid"
    return f"{octaves:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")


def drift_table(frame: pd.DataFrame, by: str) -> str:
    """Optimum at each size, drift per doubling and in all, regret, best losses and seeds: a row per arm, as markdown."""
    report = drift_report(frame, by)
    sizes = sorted(int(column.removeprefix("best_octave_")) for column in report if column.startswith("best_octave_"))
    letter = {"n_experts": "E", "granularity": "G"}.get(by, by)
    header = ["arm", *(f"best log2 LR, {letter}={size}" for size in sizes), "drift, octaves", "per doubling", "regret, nats"]
    rows = [[*header, *(f"best loss, {letter}={size}" for size in sizes), "seeds"]]
    for _, row in report.iterrows():
        present = [size for size in sizes if not math.isnan(row[f"best_loss_{size}"])]
        cells = [measured(row[f"best_octave_{size}"], row[f"error_{size}"]) if size in present else "" for size in sizes]
        regret = f"{row.regret:.3f}" + ("" if math.isnan(row.regret_error) else f" ± {row.regret_error:.3f}")
        drifts = (drift_words(row.drift, row.drift_error), drift_words(row.per_doubling, row.per_doubling_error))
        cells += [*(words.replace("|", "\\|") for words in drifts), regret]
        cells += [f"{row[f'best_loss_{size}']:.3f}" if size in present else "" for size in sizes]
        rows.append([row.parametrization, *cells, str(row.seeds)])
    rows.insert(1, ["---"] * len(rows[0]))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def three_seeds(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    """The arms that were trained with three seeds on half octaves, at more than the size that all arms share."""
    frame = frame[frame.groupby(["parametrization", by]).seed.transform("nunique") >= 3]
    return compared(frame, by)


def compared(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    """The rows of those arms that were trained at several sizes, at one width and length."""
    return frame[frame.groupby(["parametrization", "width", "steps"])[by].transform("nunique") > 1]


def screened(frame: pd.DataFrame, by: str, sizes: tuple) -> pd.DataFrame:
    """What every arm has: one seed, whole octaves, these sizes."""
    whole = frame.lr.map(lambda lr: math.log2(lr).is_integer())
    return frame[whole & (frame.seed == 0) & frame[by].isin(sizes)]


def tables() -> dict[str, str]:
    """name -> table, each as it stands in the page."""
    count = labelled(read_sweep(SWEEPS / "expert_count.jsonl"), EXPERT_ARMS)
    joint = count[(count.parametrization == "mup, raw, k=2") & (count.steps == 200) & count.n_experts.isin([2, 8, 32])]
    joint = joint.sort_values("width", kind="stable").assign(parametrization=lambda rows: rows.width.map("width {}".format))
    count = dict(iter(count[count.width == 64].groupby("steps")))
    fine = compared(labelled(read_sweep(SWEEPS / "granularity.jsonl"), ARMS), "granularity")
    wide = fine[fine.width == 128]
    fine = dict(iter(fine[fine.width == 64].groupby("steps")))
    experts = {
        "expert count": three_seeds(count[200], "n_experts"),
        "expert count, every arm": screened(count[200], "n_experts", (2, 4, 8, 16, 32)),
        "expert count, half as long": three_seeds(count[100], "n_experts"),
        "width and expert count": joint,
    }
    granularities = {
        "granularity": three_seeds(fine[400], "granularity"),
        "granularity, every arm": screened(fine[400], "granularity", (1, 4, 16)),
        "granularity, half as long": three_seeds(fine[200], "granularity"),
        "granularity, twice as long": fine[800],
        "granularity, twice as wide": wide,
    }
    made = {name: drift_table(rows, "n_experts") for name, rows in experts.items()}
    return made | {name: drift_table(rows, "granularity") for name, rows in granularities.items()}


def page(text: str, made: dict[str, str]) -> str:
    """The page with its tables made anew. Raises ValueError for a table that it has no place for."""
    for name, table in made.items():
        place = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", flags=re.DOTALL)
        if not place.search(text):
            raise ValueError(f"{PAGE.name} has no place for the table {name!r}")
        text = place.sub(lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(), tables()))
    print(f"wrote {PAGE.relative_to(ROOT)}")
