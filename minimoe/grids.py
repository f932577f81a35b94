"""What is to be trained: every cell of a grid over tables, sizes, options, learning rates and seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from itertools import product
from typing import NamedTuple

from .checks import positive
from .config import Axis, Config, points, several
from .corpus import Corpus
from .parametrization import Parametrization, require_distinct_names
from .step import TrainOptions
from .tables import parametrization
from .training import check_training

WIDTHS, STEPS = (32, 64, 128), 200
GIVEN_AS = {"parametrization": "parametrizations", "seed": "seeds", "lr": "lrs", "vocab_size": "corpus"}  # other arguments
SIZES = [f.name for f in fields(Config) if f.name not in GIVEN_AS]
OPTIONS = [f.name for f in fields(TrainOptions) if f.name != "betas"]  # a pair of numbers is one value, and no axis


class Planned(NamedTuple):
    """One cell of a grid: what is to be trained, and how."""

    config: Config
    lr: float
    steps: int
    options: TrainOptions


def planned_runs(
    parametrizations: Iterable[str | Parametrization],
    lrs: Iterable[float],
    seeds: Iterable[int],
    corpus: Corpus,
    options: TrainOptions,
    axes: Mapping[str, Axis],
    path: Mapping[str, Iterable] | None = None,
) -> list[Planned]:
    """A cell for each table, point of the axes, learning rate and seed, in this order, the seed fastest.

    axes: fields of Config and TrainOptions, and `steps`, each with one value, several, or a function of the sizes; path:
    those that grow together (see `config.points`). Width and steps are WIDTHS and STEPS where neither has them.

    Raises ValueError for an empty axis, two tables under one name, or what could not be trained; TypeError for a field that
    neither Config nor TrainOptions has.
    """
    given = {*axes, *(path or {})}
    width, steps = ({name: usual} if name not in given else {} for name, usual in (("width", WIDTHS), ("steps", STEPS)))
    axes = width | dict(axes) | steps
    for name in sorted(given - {*SIZES, *OPTIONS, "steps"}):
        known = f"Config has {', '.join(SIZES)}; TrainOptions has {', '.join(OPTIONS)}"
        raise TypeError(f"unknown field {name!r}: {f'give {GIVEN_AS[name]} instead' if name in GIVEN_AS else known}")
    tables = [*dict.fromkeys(parametrization(table) for table in several("parametrizations", parametrizations))]
    require_distinct_names(tables)
    lrs, seeds = [positive("lr", lr) for lr in several("lrs", lrs)], several("seeds", seeds)
    planned = []
    for table, point in product(tables, points(axes, path)):
        sizes = {name: value for name, value in point.items() if name in SIZES}
        trained = replace(options, **{name: value for name, value in point.items() if name in OPTIONS})
        for lr, seed in product(lrs, seeds):
            config = Config(table, vocab_size=corpus.vocab_size, seed=seed, **sizes)
            planned.append(Planned(config, lr, check_training([(config, lr)], corpus, point["steps"]), trained))
    return planned
