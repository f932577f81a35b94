"""The command line: `minimoe demo`, `train`, `sweep`, `report`, `coords`, `explain`, `sample`."""

from __future__ import annotations

import sys

from minimoe.entry import main

if __name__ == "__main__":
    sys.exit(main())  # it imports this module under its own name, and answers Ctrl-C meanwhile

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from . import checker, flags
from .adoption import adopt
from .causal import imported
from .checks import require
from .conditions import rows_where
from .config import Config
from .coordinate_figures import coordinate_curves
from .coordinates import ROUTINGS, coordinate_check, size_axis
from .coordinates import SIZES as GROWING
from .coordinates import WIDTHS as CHECKED_WIDTHS
from .corpus import load_corpus
from .diagnoses import diagnosis
from .explanations import explain, marked, side_by_side
from .figures import lr_curves
from .flags import (
    add_argument,
    add_config,
    add_path,
    add_training,
    config_fields,
    integer,
    number,
    numbers,
    require_one_of,
    size_field,
    train_fields,
)
from .grids import OPTIONS, SIZES, WIDTHS
from .model import MiniMoE
from .outputs import figure_file, writable_file
from .room import require_countable, require_memory
from .step import TrainOptions
from .sweeps import read_sweep, sweep
from .tables import PARAMETRIZATIONS
from .training import available_device, train
from .transfer import sentence, summary, transfer_report
from .verdicts import exponents, exponents_text

NAMES = f"of {', '.join(PARAMETRIZATIONS)}"
AXES = (*SIZES, *OPTIONS, "steps")
DEMO_STEPS = 140  # enough for SP's optimum to move by an octave per doubling, and two minutes on two cores


def run(arguments: list[str] | None = None) -> None:
    """Run one command. Raises what `entry.main` says in one line."""
    options = _parser().parse_args(arguments)
    options.run(options)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """One line, as for all bad input."""
        self.exit(2, f"minimoe: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        "minimoe",
        description="muP for Mixture-of-Experts, to read, run and check.",
        epilog=flags.EPILOG,
        formatter_class=formatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(name: str, run, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about.splitlines()[0], description=about, formatter_class=formatter)
        added.set_defaults(run=run)
        return added

    demo = command("demo", _demo, "train the famous picture now: widths 32, 64, 128 under sp, simplep and mup")
    _add_sweep_outputs(demo, store="runs/demo.jsonl", figure="runs/demo.png")

    one = command("train", _train, "train one model\n\nPrints its history of losses; --save keeps it for `minimoe sample`.")
    add_config(one)
    add_argument(one, explain, "lr", "base learning rate, e.g. 0.01 or 2^-6", type=number)
    add_training(one)
    one.add_argument("--seed", type=integer, default=0, help="of the initial weights and the data order (default 0)")
    one.add_argument("--save", metavar="FILE", help="write the trained model here")

    many = command(
        "sweep",
        _sweep,
        "train a grid of sizes, parametrizations, learning rates and seeds\n\n"
        "Each finished run is a line in --store; the same command again goes on where it stopped. A model or training\n"
        "option with several values is an axis of the grid: --depth 2 8 32.",
    )
    usual = f"(default {' '.join(map(str, WIDTHS))})"
    many.add_argument("--widths", type=integer, nargs="+", help=f"sizes of the residual stream {usual}")
    add_path(many)
    many.add_argument("--by", type=size_field, help="the axis to report (default: the one that has several values, or width)")
    add_argument(many, sweep, "parametrizations", NAMES, metavar="NAME")
    octaves = "numbers (0.01, 2^-6.5), or ranges of octaves such as 2^-10:2^-3, or :0.5 for halves"
    add_argument(many, sweep, "lrs", octaves, type=numbers, metavar="LR")
    add_argument(many, sweep, "seeds", "of initial weights and data order", type=integer)
    add_config(many, without=("width", "parametrization"), several=True)
    add_training(many, several=True)
    many.add_argument("--jobs", type=integer, help="processes on a CPU (default: one per core)")
    _add_sweep_outputs(many, store="runs/sweep.jsonl", figure=None)

    checker.add_arguments(command("check", checker.run, "check a student's copies of the course's notebooks"))

    report = command("report", _report, "say what a run store shows: optimum, drift and regret")
    report.add_argument("store", metavar="STORE", help="a file that `sweep` or `demo` wrote")
    about = "the axis of transfer: a field of Config, batch_size or steps"
    add_argument(report, transfer_report, "by", about, type=size_field)
    report.add_argument("--figure", metavar="PNG", help="draw the curves here")
    report.add_argument(
        "--where",
        nargs="+",
        default=[],
        metavar="COLUMN=VALUE",
        help="use these rows only, e.g. steps=200 n_experts=8, where a store holds several sweeps",
    )

    coords = command(
        "coords",
        _coords,
        "check how every tensor, its updates and its share of the learning grow with width, or with another size\n\n"
        "Prints measured exponents (predicted ones in brackets) and the cells that the check condemns. Another size:\n"
        "--along depth --sizes 2 4 8 16 32, at width 64 unless --widths says another; or --granularity 1 2 4. Several that\n"
        "grow together: --path width=64,128,256 n_experts=4,8,16.",
    )
    coords.add_argument("--along", type=size_field, help=f"the size that grows: {', '.join(GROWING)} (default width)")
    coords.add_argument("--sizes", type=integer, nargs="+", help="its values")
    add_path(coords)
    add_argument(coords, coordinate_check, "parametrization", NAMES, nargs="+", metavar="NAME")
    usual = " ".join(map(str, CHECKED_WIDTHS))
    coords.add_argument("--widths", type=integer, nargs="+", help=f"sizes of the residual stream (default {usual})")
    add_argument(coords, coordinate_check, "steps", "optimiser steps", type=integer)
    add_argument(coords, coordinate_check, "seeds", "of initial weights and data order", type=integer)
    add_argument(coords, coordinate_check, "lr", "constant learning rate", type=number)
    add_argument(coords, coordinate_check, "corpus", "pydocs, shakespeare or a UTF-8 text file")
    add_argument(coords, coordinate_check, "routing", "see `coordinate_check`", choices=ROUTINGS)
    coords.add_argument("--jobs", type=integer, help="processes on a CPU (default: one per core)")
    coords.add_argument("--device", help="cpu or cuda (default: a GPU when there is one)")
    coords.add_argument("--csv", metavar="FILE", help="write the whole exponents table here")
    coords.add_argument("--figure", default="runs/coords.png", metavar="PNG", help="draw it here (default runs/coords.png)")
    add_config(coords, without=("parametrization", "width"), several=True)

    rules = command("explain", _explain, "show a parametrization's table, and what it gives each tensor")
    rules.add_argument("model", nargs="?", metavar="MODULE:FUNCTION", help="makes a model of yours at a width: mymodel:build")
    rules.add_argument("--parametrization", nargs="+", default=[Config.parametrization], metavar="NAME", help=NAMES)
    rules.add_argument("--json", action="store_true", help="of a model of yours: as JSON, for other trainers")
    add_argument(rules, explain, "lr", "base learning rate of effective_lr", type=number)
    add_config(rules, without=("parametrization",))

    sample = command("sample", _sample, "let a trained model write")
    sample.add_argument("model", metavar="FILE", help="a file that `train --save` wrote")
    sample.add_argument("--corpus", help="the corpus that it was trained on (default: as the model says)")
    sample.add_argument("--prompt", help="text to begin with (default: the corpus's first character)")
    sample.add_argument("--length", type=integer, default=400, help="characters to write (default 400)")
    sample.add_argument("--temperature", type=number, default=0.8, help="0 takes the likeliest character (default 0.8)")
    sample.add_argument("--seed", type=integer, default=0)
    return parser


def _add_sweep_outputs(parser: argparse.ArgumentParser, store: str, figure: str | None) -> None:
    parser.add_argument("--store", default=store, help=f"the run store (default {store})")
    parser.add_argument("--figure", default=figure, metavar="PNG", help=f"draw the curves here (default {figure})")


def _demo(options: argparse.Namespace) -> None:
    start, options.figure = time.perf_counter(), figure_file(options.figure)
    print("Training loss against learning rate for three widths under sp, simplep and mup, on the pydocs corpus.")
    frame = sweep(steps=DEMO_STEPS, store=options.store)
    print(f"{len(frame)} rows, {frame.key.nunique()} runs in {time.perf_counter() - start:.0f} s ({options.store})\n")
    _show(frame, "width", options.figure)


def _show(frame: pd.DataFrame, by: str, figure: Path | None) -> None:
    """The report as a table, a sentence per parametrization, and the figure."""
    report = transfer_report(frame, by)
    print(_report_table(report, by), "\n")
    print("\n".join(sentence(rows, by) for _, rows in report.groupby("parametrization", sort=False)))
    if figure:
        lr_curves(frame, by).savefig(figure, dpi=150)
        print(f"\nfigure: {figure}")


def _report_table(report: pd.DataFrame, by: str) -> str:
    """The report for a terminal, a row per parametrization: best LRs as log2, an asterisk at the edge of the grid."""
    compared = summary(report).set_index("parametrization")
    table = pd.DataFrame(index=compared.index)
    for size, rows in report.set_index("parametrization").groupby(by):
        table[f"best LR, {by} {size}"] = pd.Series({row.Index: _best_lr(row) for row in rows.itertuples()})
        table[f"loss, {size}"] = rows.best_loss.map("{:.3f}".format)
    table["drift (octaves)"] = compared.drift_octaves.map("{:+.2f}".format)
    table["regret (nats)"] = compared.regret.map("{:.3f}".format)
    table["larger is worse"] = compared.larger_is_worse
    edge = "\n* on the edge of the grid, or beside a diverged run" if report.on_edge.any() else ""
    return table.reset_index().to_string(index=False, na_rep="") + edge


def _best_lr(row) -> str:
    """A row's best LR as a power of two."""
    return "none" if math.isnan(row.best_lr) else f"2^{math.log2(row.best_lr):.2f}{'*' if row.on_edge else ''}"


def _train(options: argparse.Namespace) -> None:
    corpus = load_corpus(options.corpus)
    config = Config(vocab_size=corpus.vocab_size, **config_fields(options))
    require(options.save != "", "--save", options.save, "must name a file")
    save = writable_file("--save", options.save)
    training = TrainOptions(**train_fields(options))
    require_memory([(config, options.lr, options.steps, training)], here=available_device(options.device).type == "cpu")
    (run,) = train(config, options.lr, options.seed, corpus, options.steps, training, options.device)
    if save:  # before the first word, which a closed pipe may refuse
        run.model.cpu().save(save)
    history = pd.DataFrame(run.history)[["step", "train_loss", "val_loss"]]
    print(history.to_string(index=False, float_format="{:.4f}".format))
    print(f"{'diverged' if run.diverged else f'validation loss {run.val_loss:.4f} nats per character'}, {run.seconds:.0f} s")
    if save:
        print(f"saved: {save}")


def _sweep(options: argparse.Namespace) -> None:
    require_one_of("--by", options.by, AXES)
    options.figure = figure_file(options.figure)
    axes, path = config_fields(options) | train_fields(options), dict(options.path)
    betas = {"betas": axes.pop("betas")} if "betas" in axes else {}
    frame = sweep(
        options.widths,
        options.parametrizations,
        _flat(options.lrs),
        options.seeds,
        options.steps,
        options.corpus,
        options=TrainOptions(**betas),
        store=options.store,
        n_jobs=options.jobs,
        device=options.device,
        path=path,
        **axes,
    )
    grown = [name for name in ("width", "steps", *axes) if name not in path and frame[name].nunique() > 1] + [*path][:1]
    if options.by or len(grown) < 2:
        _show(frame, options.by or next(iter(grown), "width"), options.figure)
    else:
        print(f"{len(frame)} rows in {options.store}; several sizes grow, so choose one to report:")
        print(f"minimoe report {options.store} --by {grown[0]} --where {grown[1]}=...")


def _flat(lrs: Sequence) -> list[float]:
    """Numbers and ranges of numbers, as `--lrs` reads them, in one list."""
    return [lr for part in lrs for lr in (part if isinstance(part, tuple) else (part,))]


def _report(options: argparse.Namespace) -> None:
    require_one_of("--by", options.by, AXES)
    options.figure = figure_file(options.figure)
    frame = read_sweep(options.store)
    for condition in options.where:
        frame = rows_where(frame, condition)
    _show(frame, options.by, options.figure)


def _coords(options: argparse.Namespace) -> None:
    start = time.perf_counter()
    figure, csv = figure_file(options.figure), writable_file("--csv", options.csv)
    fields = config_fields(options, without=("parametrization", "width"))
    if (options.along is None) != (options.sizes is None):
        raise ValueError("--along and --sizes belong together: --along depth --sizes 2 4 8")
    require_one_of("--along", options.along, GROWING)
    if options.along == "width":
        options.widths = options.sizes
    elif options.along:
        fields[options.along] = options.sizes
    frame = coordinate_check(
        options.parametrization,
        options.widths,
        options.steps,
        options.seeds,
        options.lr,
        options.corpus,
        routing=options.routing,
        path=dict(options.path),
        n_jobs=options.jobs,
        device=options.device,
        **fields,
    )
    table, axis = exponents(frame), size_axis(frame)
    said = diagnosis(table, axis) if axis in ("width", "depth") else {}
    for name, rows in table.groupby("parametrization", sort=False):
        print(f"{name}: exponents in the {axis}, measured (predicted)\n{exponents_text(rows)}\n")
        if name in said:
            print(f"{name}: {said[name]}\n")
    if csv:
        table.to_csv(csv, index=False)
    if figure:
        coordinate_curves(frame).savefig(figure, dpi=120)
    print(f"{time.perf_counter() - start:.0f} s; figure: {figure}")


def _explain(options: argparse.Namespace) -> None:
    if options.model:
        return _explain_adopted(options)
    require(not options.json, "--json", True, "is for a model of yours")
    fields = config_fields(options, without=("parametrization",))
    configs = [Config(**fields, parametrization=name) for name in options.parametrization]
    for config in configs:
        require_countable(config)
        print(config.parametrization, "\n")
    if len(configs) > 1:
        print(marked(side_by_side(configs[0], options.parametrization)))
        print(f"\n* not the same in all of them; lr multiplies the base LR, {options.lr:g}\n")
    for config in configs:
        table = explain(config, lr=options.lr)
        print(table if len(configs) == 1 else "\n".join([f"{config.parametrization.name}:", *table.reasons()]))
        counted = table.groupby("role", sort=False).parameters.sum()
        print(f"\n{counted.sum()} parameters: " + ", ".join(f"{role} {count}" for role, count in counted.items()), "\n")


def _explain_adopted(options: argparse.Namespace) -> None:
    sizes = (options.width, options.base_width)
    require(all(sizes), "--width and --base-width", sizes, "are both needed for a model of yours")
    plan = adopt(imported(options.model), *sizes)
    for name in options.parametrization:
        text = "\n".join([f"{name}:", str(plan.explain(name, options.lr)), "", *plan.notes()])
        print(plan.to_json(name) if options.json else text)


def _sample(options: argparse.Namespace) -> None:
    model = MiniMoE.load(options.model)
    alphabet = model.alphabet if options.corpus is None else load_corpus(options.corpus).alphabet
    require(alphabet is not None, "--corpus", None, "must name the corpus of this model: an older version saved it without")
    own = model.alphabet  # of the model's corpus; older files have none
    same = alphabet.symbols == own.symbols if own else alphabet.vocab_size == model.config.vocab_size
    require(same, "--corpus", options.corpus, "has other symbols than the corpus that the model was trained on")
    prompt = torch.from_numpy(alphabet.encode(options.prompt or alphabet.symbols[0]))[None]
    print(alphabet.decode(model.generate(prompt, options.length, options.temperature, options.seed)[0]))
