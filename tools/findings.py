"""Write the tables of docs/findings.md again, from the shipped sweeps: python tools/findings.py

Words are kept by hand; what stands between a table's two markers is replaced.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pandas as pd

from minimoe import (
    ARMS,
    BRIDGE_ARMS,
    CAPACITY_ARMS,
    EXPERT_ARMS,
    REGIME_ARMS,
    SHARE_ARMS,
    at_best_lr,
    beside,
    drift_words,
    labelled,
    power,
    read_adopted,
    read_sweep,
    summary,
    transfer_report,
)
from minimoe.arms import EMBEDDING_ARMS, HORIZON_ARMS, with_factors

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "findings.md"
SWEEPS = ROOT / "data" / "sweeps"
ADOPTED = {"Mixtral": "adopted_mixtral", "OLMoE": "adopted_olmoe"}
OTHER_BASES = {"Mixtral of std 0.1": "adopted_mixtral_init", "Mixtral": "adopted_mixtral_tuned"}
LENGTHS = {"": 200, ", half as long": 100}  # a table's name ends with this -> steps
ADOPTED_BASE = 64  # their base width
SCREENED = [name for name in EXPERT_ARMS if ", balance " not in name]


def measured(octaves: float, error: float) -> str:
    """An optimum as log2 of its LR."""
    if math.isnan(octaves):
        return "off the grid"
    return f"{octaves:.2f}" + ("" if math.isnan(error) else f" ± {error:.2f}")


def drift_table(frame: pd.DataFrame, by: str, tuned: str = "LR") -> str:
    """Optimum at each size, drift per doubling and in all, regret, best losses and seeds: a row per arm, as markdown. tuned: what
    the column lr holds."""
    report = transfer_report(frame, by)
    sizes, at = sorted(set(report[by])), {(row.parametrization, getattr(row, by)): row for row in report.itertuples()}
    letter = {"n_experts": "E", "granularity": "G", "depth": "L", "expert_ratio": "M/n", "batch_size": "batch"}.get(by, by)
    sizes_said = [f"{letter}={size:g}" for size in sizes]
    header = ["arm", *(f"best log2 {tuned}, {size}" for size in sizes_said), "drift, octaves", "per doubling", "regret, nats"]
    rows = [[*header, *(f"best loss, {size}" for size in sizes_said), "seeds"]]
    for row in summary(report).itertuples():
        own = [at.get((row.parametrization, size)) for size in sizes]
        cells = [measured(found.octave, found.octave_error) if found else "" for found in own]
        regret = f"{row.regret:.3f}" + ("" if math.isnan(row.regret_error) else f" ± {row.regret_error:.3f}")
        regret = "not measured" if math.isnan(row.regret) else regret
        drifts = (drift_words(row.drift, row.drift_error), drift_words(row.per_doubling, row.per_doubling_error))
        cells += [*(words.replace("|", "\\|") for words in drifts), regret]
        cells += [f"{found.best_loss:.3f}" if found else "" for found in own]
        rows.append([row.parametrization, *cells, str(row.seeds_with_optimum)])
    return markdown(rows)


def markdown(rows: list[list[str]]) -> str:
    """The rows as a table, the first one its header."""
    header, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body))


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


def stores(*names: str) -> pd.DataFrame:
    """The rows of these shipped sweeps."""
    return pd.concat([read_sweep(SWEEPS / f"{name}.jsonl") for name in names], ignore_index=True)


def adopted(names: dict[str, str]) -> pd.DataFrame:
    """The rows of sweeps of models that are not ours, with the model's name before the table's. names: of the model -> store."""
    frames = {name: read_adopted(SWEEPS / f"{store}.jsonl", ADOPTED_BASE) for name, store in names.items()}
    named = [rows.assign(parametrization=f"{name}, " + rows.parametrization) for name, rows in frames.items()]
    return pd.concat(named, ignore_index=True)


def tables() -> dict[str, str]:
    """name -> table, each as it stands in the page."""
    count = labelled(stores("expert_count", "balance"), EXPERT_ARMS)
    joint = count[(count.parametrization == "mup, raw, k=2") & (count.steps == 200) & count.n_experts.isin([2, 8, 32])]
    joint = joint.sort_values("width", kind="stable").assign(parametrization=lambda rows: rows.width.map("width {}".format))
    count = dict(iter(count[count.width == 64].groupby("steps")))
    tested = count[200].parametrization.str.contains("forced balance|, balance ") | (
        count[200].parametrization == "mup, raw, k=2"
    )
    published = count[200].parametrization.isin(SCREENED)
    fine = compared(labelled(stores("granularity", "router_cells"), ARMS), "granularity")
    wide = fine[fine.width == 128]
    fine = dict(iter(fine[fine.width == 64].groupby("steps")))
    experts = {
        "expert count": three_seeds(count[200][published], "n_experts"),
        "is it the balance": three_seeds(count[200][tested & count[200].n_experts.isin([4, 32])], "n_experts"),
        "expert count, every arm": screened(count[200][published], "n_experts", (2, 4, 8, 16, 32)),
        "expert count, half as long": three_seeds(count[100], "n_experts"),
        "width and expert count": joint,
    }
    granularities = {
        "granularity": three_seeds(fine[400], "granularity"),
        "granularity, every arm": screened(
            fine[400][~fine[400].parametrization.str.startswith("router mup's")], "granularity", (1, 4, 16)
        ),
        "granularity, half as long": three_seeds(fine[200], "granularity"),
        "granularity, twice as long": fine[800],
        "granularity, twice as wide": wide,
    }
    made = {name: drift_table(rows, "n_experts") for name, rows in experts.items()}
    made |= {name: drift_table(rows, "granularity") for name, rows in granularities.items()}
    models = {"adopted models": ADOPTED, "other bases": OTHER_BASES}
    made |= {name: drift_table(rows, by) for name, (rows, by) in of_depth_and_experts().items()}
    bridges = labelled(stores("bridges"), BRIDGE_ARMS)
    dense, others = bridges[bridges.parametrization == "dense"], labelled(stores("capacities"), CAPACITY_ARMS)
    beside_dense = {"bridges": bridges, "capacities": pd.concat([dense, others], ignore_index=True)}
    for name, rows in beside_dense.items():
        made |= {name + end: beside_table(rows[rows.steps == steps], "dense") for end, steps in LENGTHS.items()}
    made |= {"checks": checks_table(pd.read_csv(SWEEPS.parent / "axes.csv"))}
    made |= {name: overlay_table(pd.read_csv(SWEEPS.parent / f"{name}.csv")) for name in ("overlay", "upcycling")}
    made |= {"regime checks": regime_checks_table(pd.read_csv(SWEEPS.parent / "regimes.csv"))}
    made |= of_roles() | of_decay()
    longest = stores("horizon_duration").query("steps == 1600")
    made["the rule's betas"] = beside_table(longest, "mup", "gain")
    return made | {name: drift_table(adopted(names), "width") for name, names in models.items()}


def of_depth_and_experts() -> dict[str, tuple[pd.DataFrame, str]]:
    """name -> (rows, the size that grows), for the sweeps over depth, share and size of the experts."""
    share = shares(stores("share", "expert_count"))
    dmft = share.parametrization.str.startswith("dmft")
    both = {
        "depth": (with_all_seeds(stores("depth"), "depth"), "depth"),
        "width and depth": (stores("width_depth"), "width"),
        "experts under dmft": (share[dmft], "n_experts"),
        "share": (share[~dmft], "share"),
        "size of the experts": (stores("expert_size"), "expert_ratio"),
        "regimes": (labelled(stores("regimes"), REGIME_ARMS), "width"),
    }
    lengths = ((name + end, rows[rows.steps == steps], by) for name, (rows, by) in both.items() for end, steps in LENGTHS.items())
    others = {
        "share, four times the batch": (shares(stores("share_batch")), "share"),
        "is it the embedding": (with_and_without_embedding(), "width"),
        "duration": (stores("horizon_duration").query(f"parametrization != {HORIZON_ARMS[2].name!r}"), "steps"),
        "batch": (stores("horizon_batch"), "batch_size"),
        "one active": (stores("one_active"), "n_experts"),
    }
    return {name: (rows, by) for name, rows, by in lengths} | others


def of_roles() -> dict[str, str]:
    """name -> table, for the LRs of single roles."""
    rates = pd.concat([stores("rates_400"), stores("rates_800")])
    made = {
        f"rates, {table}, {steps} steps": beside_table(rows, table, "gain")
        for (table, steps), rows in rates.groupby([of_table(rates), "steps"])
    }
    factors = stores("embedding_factors")
    factors = factors.iloc[factors.parametrization.map(factor_of).argsort(kind="stable")]
    made |= {
        f"embedding factors, {table}, width {width}": beside_table(rows, table, "gain")
        for (table, width), rows in factors.groupby([of_table(factors), "width"])
    }
    best = at_best_lr(factors).assign(lr=lambda rows: rows.parametrization.map(factor_of), parametrization=of_table)
    best = pd.concat([best, best[best.width == 32].assign(parametrization="sp")])  # at the base width both are one table
    made["best factor"] = drift_table(best, "width", "factor")
    octaves = [2.0**octave for octave in range(-3, 4)]
    one_rate = stores("one_rate")
    single = pd.concat([with_factors(one_rate, name, octaves).assign(table=name) for name in ("mup", "sp")])
    single = single.sort_values(["width", "table"], kind="stable")
    return made | {"one rate": losses_table(single, ["table", "role", "width"], "factor", lambda factor: f"x {Fraction(factor)}")}


def of_decay() -> dict[str, str]:
    """name -> table, for the weight decay."""
    rows, sizes = stores("decay"), pd.read_csv(SWEEPS.parent / "decay_sizes.csv")
    made = {"decay": drift_table(rows[rows.weight_decay == 0.3], "width"), "decay sizes": sizes_table(sizes)}
    one_lr = rows[rows.lr == 2.0**-5].assign(rule=rows.parametrization).sort_values("width", kind="stable")
    return made | {"decay itself": losses_table(one_lr, ["rule", "width"], "weight_decay", "decay {:g}".format)}


def of_table(rows: pd.DataFrame) -> pd.Series:
    """The table that each row's arm begins with."""
    return rows.parametrization.str.partition(",")[0]


def factor_of(arm: str) -> float:
    """The number behind the "x" at the end of an arm's name, or 1."""
    return float(arm.rpartition(" x ")[2]) if " x " in arm else 1.0


def losses_table(rows: pd.DataFrame, by: list[str], column: str, said: Callable[[float], str]) -> str:
    """The mean loss and its standard error: a row for each combination of `by`, a column for each value of `column`, whose title
    is what `said` makes of it, as markdown."""
    values, labels = sorted(set(rows[column])), list(dict.fromkeys(rows[by].itertuples(index=False, name=None)))
    losses = rows.groupby([*by, column]).val_loss.agg(["mean", "sem"])
    lines = [[*by, *map(said, values)]]
    for label in labels:
        own = losses.loc[label].reindex(values).itertuples(index=False)
        lines.append([*map(str, label), *("" if math.isnan(row.mean) else f"{row.mean:.3f} ± {row.sem:.3f}" for row in own)])
    return markdown(lines)


def sizes_table(sizes: pd.DataFrame) -> str:
    """The exponents in the width of the weights' sizes, RMS and largest singular value: a row per rule and role, as markdown."""
    lines = [["rule", "role", "RMS", "largest singular value"]]
    means = sizes.groupby(["parametrization", "role", "width", "seed"], sort=False)[["rms", "top"]].mean().reset_index()
    for (rule, role), own in means.groupby(["parametrization", "role"], sort=False):
        found = (power(own, "width", value) for value in ("rms", "top"))
        lines.append([rule, role.replace("_", " "), *(f"{exponent:+.2f} ± {error:.2f}" for exponent, error in found)])
    return markdown(lines)


def with_and_without_embedding() -> pd.DataFrame:
    """sp and mup of `transfer`, and the arms that change the embedding's LR alone; these are sp and mup at the base width."""
    rows = stores("transfer", "embedding_rule")
    rows = rows[rows.parametrization != "simplep"]
    base = rows[(rows.parametrization == "mup") & (rows.width == 32)]
    shared = [base.assign(parametrization=table.name) for table in EMBEDDING_ARMS]
    return pd.concat([rows, *shared], ignore_index=True)


def shares(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the arms of `SHARE_ARMS`, with their active share, which is at most a half."""
    rows = labelled(rows[rows.width == 64], SHARE_ARMS)
    rows = rows.assign(share=rows.top_k / rows.n_experts)
    return with_all_seeds(rows[rows.share <= 1 / 2], "share")


def beside_table(rows: pd.DataFrame, reference: str, cost: str = "regret") -> str:
    """Each arm's best LR, its distance from the reference's (seed by seed) and the best loss, with `cost`: "regret", what the
    reference's LR costs there, or "gain", by how much the best loss lies below the reference's. A row per arm, as markdown."""
    title, sign = {"regret": (f"regret at the {reference} LR, nats", ""), "gain": ("gain, nats", "+")}[cost]
    lines = [["arm", "best log2 LR", f"less that of {reference}, octaves", title, "best loss"]]
    for row in beside(rows, reference).itertuples():
        moved = drift_words(row.moved, row.moved_error).replace("|", "\\|")
        said = "" if row.parametrization == reference else moved
        costs = f"{getattr(row, cost):{sign}.3f} ± {getattr(row, cost + '_error'):.3f}"
        lines.append([row.parametrization, measured(row.octave, row.octave_error), said, costs, f"{row.best_loss:.3f}"])
    return markdown(lines)


def overlay_table(frame: pd.DataFrame, steps: int = 20, reference: str = "dense") -> str:
    """The loss of each variant less the dense model's over the last steps of an overlay, seed by seed: as markdown."""
    losses = frame[frame.step > frame.step.max() - steps].pivot_table(index="seed", columns="variant", values="loss", sort=False)
    gaps = losses.sub(losses[reference], axis=0).drop(columns=reference)
    rows = [[name, f"{gap.mean():+.3f} ± {gap.sem():.3f}"] for name, gap in gaps.items()]
    return markdown([["variant", f"loss less that of dense, nats, last {steps} steps"], *rows])


def regime_checks_table(judged: pd.DataFrame) -> str:
    """The exponents of the routed sum, in the first layer, and of the up projection's allocation, with the predicted ones, and
    how many of all predictions are met: a row per arm, as markdown."""
    columns = {
        "init": ("moe", "init"),
        "effective update": ("moe", "update"),
        "propagating update": ("moe", "propagated"),
        "up's allocation": ("up", "allocation"),
    }
    rows = [["arm", *columns, "predictions met"]]
    for name, own in judged.groupby("parametrization", sort=False):
        first = own[own.layer == 0].set_index(["tensor", "quantity"])
        found = [first.loc[key] for key in columns.values()]
        said = [f"{row.measured:+.2f}" + ("" if math.isnan(row.predicted) else f" ({row.predicted:+.1f})") for row in found]
        known = own.agrees.dropna().astype(bool)
        rows.append([name, *said, f"{known.sum()} of {len(known)}"])
    return markdown(rows)


def checks_table(axes: pd.DataFrame) -> str:
    """What the checks condemn along each axis, and how many of the predictions are met: a row per table, as markdown."""
    known = axes[axes.agrees.notna()]
    met = known.agrees.astype(bool).groupby(known.axis, sort=False).agg(["sum", "count"])
    rows = [["table", *met.index]]
    for name, own in axes[axes.axis == "width"].groupby("parametrization", sort=False):
        own = axes[axes.parametrization == name]
        grown = {axis: list(dict.fromkeys(part.tensor[part.verdict == "explodes"])) for axis, part in own.groupby("axis")}
        rows.append([name, *(", ".join(grown[axis]) or "none" for axis in met.index)])
    rows.append(["predictions met", *(f"{row['sum']} of {row['count']}" for _, row in met.iterrows())])
    return markdown(rows)


def with_all_seeds(frame: pd.DataFrame, by: str, seeds: int = 3) -> pd.DataFrame:
    """The rows of LRs that have been trained with all seeds: screens of one seed are left out."""
    return frame[frame.groupby(["parametrization", by, "steps", "lr"]).seed.transform("nunique") == seeds]


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
