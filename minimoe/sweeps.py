"""Sweeps: grid -> data frame, one row per cell of the grid.

Two cells are one run when everything that training can see is equal: every evaluated number of the table, the shape, the
data, the schedule and the seed. Such a run is trained and stored once, and each cell keeps its row.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import joblib
import pandas as pd
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError
from tqdm.auto import tqdm

from .checks import require, whole
from .clusters import dask_workers
from .config import BASED, Config, config_from_dict, config_to_dict
from .corpus import Corpus, load_corpus
from .grids import planned_runs
from .identity import run_key
from .parametrization import Parametrization
from .room import require_memory
from .step import TrainOptions
from .store import FORMAT, LineError, RunStore, StoreError, stored_cells
from .tables import PARAMETRIZATIONS
from .training import Kind, available_device, finished_runs, parts_of_one_kind
from .workers import local_workers, results_of

DIED = "a worker process died, perhaps for lack of memory"
LOST = "the Dask scheduler died"
ENDS = {"KilledWorker": DIED, "CommClosedError": LOST, "FutureCancelledError": LOST}  # Dask's, which need not be installed
LRS = tuple(2.0**octave for octave in range(-9, -2))


def sweep(
    widths: Sequence[int] | None = None,
    parametrizations: Sequence[str | Parametrization] = ("sp", "simplep", "mup"),
    lrs: Sequence[float] = LRS,
    seeds: Sequence[int] = (0,),
    steps: int | Sequence[int] | None = None,
    corpus: str | os.PathLike | Corpus = "pydocs",
    *,
    options: TrainOptions = TrainOptions(),  # noqa: B008 (frozen)
    store: str | os.PathLike | None = None,
    n_jobs: int | None = None,
    device: str | torch.device | None = None,
    at_once: int | None = None,
    deterministic: bool = False,
    backend: str = "loky",
    address: str | None = None,
    progress: bool = True,
    path: Mapping[str, Sequence] | None = None,
    **axes,
) -> pd.DataFrame:
    """Train the grid parametrizations x widths x axes x lrs x seeds; one row per cell, in that order.

    widths: by default 32, 64 and 128. steps: one number or several, by default 200. axes: any other field of Config, or of
    TrainOptions (batch_size, say), with one value or several: `depth=(2, 8, 32), n_experts=6`; or with a function of the
    size: `top_k=lambda size: size.n_experts // 4`. path: sizes that grow together, `{"width": (32, 64), "n_experts": (4, 8)}`;
    see `config.points`.

    store: path of a JSON-lines file to which each finished run is appended at once, and whose runs are not trained again.
    at_once, deterministic: see `train`.

    Where: on a GPU (the default device, when there is one), in this process, as many runs of one shape at once as its
    memory holds. On a CPU, in n_jobs processes (default: one per core) of one thread, each with one run. With
    backend="dask", on the workers of the cluster whose scheduler is at `address` (default: the current client), one run
    after the other on each, on their CPUs unless a device is given, this process writing the store.

    Columns: every Config field (parametrization by its name), lr, steps, train_loss and val_loss (nats per character;
    infinite if the run diverged), diverged, seconds, corpus, corpus_digest, key (the run's identity) and history (the
    records along the way, see `training.record`), and every field of TrainOptions.

    Raises ValueError or TypeError, before any training, for bad input; OSError for a store that cannot be written, before
    training, and StoreError, which carries every finished run, if that happens later; KeyboardInterrupt on Ctrl-C and
    RuntimeError when a worker dies, both saying how to go on.
    """
    require(n_jobs is None or whole(n_jobs, 1), "n_jobs", n_jobs, "must be a positive integer or None")
    require(address is None or backend == "dask", "address", address, "goes with backend='dask'")
    corpus = load_corpus(corpus)
    device = torch.device(device or "cpu") if backend == "dask" else available_device(device)
    axes = ({} if widths is None else {"width": widths}) | axes | ({} if steps is None else {"steps": steps})
    planned = planned_runs(parametrizations, lrs, seeds, corpus, options, axes, path)
    require_memory(planned, here=backend == "loky" and device.type == "cpu")
    configs = [(run.config, run.lr) for run in planned]
    cells = [_cell(*run, corpus) for run in planned]
    store = None if store is None else RunStore(store)
    runs, missing = _divided(cells, configs, store)
    n_jobs = min(n_jobs or joblib.cpu_count(), len(missing)) if device.type == "cpu" else 1
    jobs = ((part, corpus, device, deterministic) for part in _parts(missing, device, at_once, backend, store))
    try:
        if store is not None:
            _append_labels(cells, runs, store)
        for finished in _with_progress(_executed(jobs, n_jobs, backend, address), missing, progress):
            runs |= {run["key"]: run for run in finished}
            if store is not None:
                for run in finished:
                    store.append(run)
                _append_labels(cells, {run["key"]: run for run in finished}, store)
        if store is not None:
            runs |= store.runs({cell["key"] for cell in cells})  # another sweep may have trained some of them
            _append_labels(cells, runs, store)
    except (StoreError, LineError) as error:
        error.frame = _frame(cells, configs, runs)
        raise
    except (KeyboardInterrupt, _WorkerDied) as stop:
        raise _stopped(stop, len(missing), sum(cell["key"] in runs for cell in missing), store) from None
    return _frame(cells, configs, runs)


def _frame(cells: list[dict], configs: list[tuple], runs: dict[str, dict]) -> pd.DataFrame:
    """A row for each cell whose run has finished."""
    rows = zip(cells, configs, strict=True)
    return _by_columns(_row(_labels(config), cell, runs[cell["key"]]) for cell, (config, _) in rows if cell["key"] in runs)


def read_sweep(path: str | os.PathLike) -> pd.DataFrame:
    """The frame of everything in a run store, in the columns of `sweep`: a row for every cell of every sweep.

    Raises FileNotFoundError for a missing store, ValueError for a damaged or empty one or a file that is no store.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no run store at {path}: `minimoe sweep --store {path}` makes one")
    runs, cells = stored_cells(path)
    built_in = list(PARAMETRIZATIONS)

    def order(cell: dict) -> tuple:  # that of finishing is chance
        name = cell["config"].parametrization.name
        known = built_in.index(name) if name in built_in else len(built_in)
        return known, name, cell["config"].width, cell["lr"], cell["seed"]

    cells.sort(key=order)
    labels = {id(config): _labels(config) for config in {id(cell["config"]): cell["config"] for cell in cells}.values()}
    rows = ((labels[id(cell["config"])] | {"seed": cell["seed"]}, cell, runs[cell["key"]]) for cell in cells)
    return _by_columns(_row(*row) for row in rows)


def _by_columns(rows: Iterable[dict]) -> pd.DataFrame:
    """The frame of these rows, which have the same names in one order: many rows as dicts would fill the memory."""
    names, values = (), []
    for row in rows:
        names = names or tuple(row)
        values.append(tuple(row.values()))
    return pd.DataFrame(dict(zip(names, zip(*values, strict=True), strict=True)))


def _cell(config: Config, lr: float, steps: int, options: TrainOptions, corpus: Corpus) -> dict:
    """A cell as the store writes it: its labels, and the key of the run that it is."""
    return {
        "format": FORMAT,
        "key": run_key(config, lr, steps, options, corpus.digest),
        "config": config_to_dict(config),
        "lr": lr,
        "steps": steps,
        "options": asdict(options),
        "corpus": corpus.name,
        "corpus_digest": corpus.digest,
    }


def _divided(cells: list[dict], configs: list[tuple], store: RunStore | None) -> tuple[dict[str, dict], list[dict]]:
    """(key -> run, for what the store has; one cell for each run that is still to be trained)."""
    runs = {}
    if store is not None:
        store.prepare()
        store.require_names({config.parametrization for config, _ in configs})
        runs = store.runs({cell["key"] for cell in cells})
    first = {}
    for cell in cells:
        first.setdefault(cell["key"], cell)
    return runs, [cell for key, cell in first.items() if key not in runs]


def _append_labels(cells: list[dict], runs: dict[str, dict], store: RunStore) -> None:
    """Let the store know of the cells that are one of these runs, where it does not yet."""
    for cell in cells:
        if cell["key"] in runs and not store.knows(cell):
            store.append(cell)


def _stopped(stop: BaseException, runs: int, done: int, store: RunStore | None) -> BaseException:
    """The same stop, saying what is kept and how to go on."""
    kept = (
        f"{done} of {runs} runs are in {store.path}: the same call goes on from there"
        if store is not None
        else (f"{done} of {runs} runs were finished and are lost; with store=PATH the same call would go on from there")
    )
    if isinstance(stop, KeyboardInterrupt):
        return KeyboardInterrupt(f"sweep stopped; {kept}")
    return RuntimeError(f"{stop}; {kept}, with fewer n_jobs if need be")


def _with_progress(finished: Iterator[list[dict]], missing: list[dict], progress: bool) -> Iterator[list[dict]]:
    """The same lists of runs, with a bar whose estimate weighs each run by its cost."""
    cost, done = {cell["key"]: _cost(cell) for cell in missing}, 0
    bar_format = "{desc} {percentage:3.0f}%|{bar}| {elapsed} elapsed, about {remaining} left"
    with tqdm(total=sum(cost.values()), bar_format=bar_format, disable=not (progress and missing), smoothing=0) as bar:
        bar.set_description_str(f"run 0 of {len(missing)}")
        for runs in finished:
            yield runs
            done += len(runs)
            bar.set_description_str(f"run {done} of {len(missing)}", refresh=False)
            bar.update(sum(cost[run["key"]] for run in runs))


def _cost(cell: dict) -> float:
    """About how long a run takes, in arbitrary units: active matrix parameters, plus attention and a fixed overhead."""
    c = config_from_dict(cell["config"])
    experts = c.active_width * c.width * (3 if c.activation == "swiglu" else 2)
    attention = 4 * c.width**2 + 12 * c.context * c.width
    tokens = c.context * cell["options"]["batch_size"] * cell["steps"]
    return tokens * (c.depth * (experts + attention + 30_000) + c.width * c.vocab_size)


class _WorkerDied(Exception):
    """A process that trained, or gave out the work, was ended from outside; the message says which."""


def _parts(missing: list[dict], device, at_once: int | None, backend: str, store: RunStore | None) -> Iterator[list[dict]]:
    """The cells of each batched program, the longest first; a run that another sweep has put into the store by the time
    it is asked for is left out.

    Runs of equal length come in an order of this process's own: two sweeps on one store then seldom train the same one.
    """

    def turn(cell: dict) -> tuple:
        return -_cost(cell), hash((os.getpid(), cell["key"]))

    def kind(cell: dict) -> Kind:
        return Kind(config_from_dict(cell["config"]), TrainOptions(**cell["options"]), cell["steps"])

    cells = sorted(missing, key=turn)
    parts = parts_of_one_kind(cells, kind, device, 1 if backend == "dask" else at_once)
    for part in parts:
        known = () if store is None else _known(store)
        if wanted := [cell for cell in part if cell["key"] not in known]:
            yield wanted


def _known(store: RunStore) -> Collection[str]:
    """The keys of the runs in the store; none if it cannot be read. The next append then says why: in a thread of joblib's,
    which asks for parts too, an error would be lost."""
    try:
        return store.trained()
    except (OSError, ValueError):
        return ()


def _executed(jobs: Iterator[tuple], n_jobs: int, backend: str, address: str | None) -> Iterator[list[dict]]:
    """The finished runs, as they finish. Raises _WorkerDied."""
    if backend == "loky" and n_jobs <= 1:
        for job in jobs:
            yield finished_runs(*job)
        return
    # batch_size=1: a finished run reaches the store at once, not when its neighbours have finished too. Jobs are asked for
    # when somebody is free to do them; of a cluster nobody knows how many that will be.
    pre_dispatch = "all" if backend == "dask" else "n_jobs"
    with _workers(backend, address, n_jobs):
        pool = joblib.Parallel(n_jobs, batch_size=1, pre_dispatch=pre_dispatch, return_as="generator_unordered")
        try:
            yield from results_of(pool, (joblib.delayed(finished_runs)(*job) for job in jobs))
        except TerminatedWorkerError as error:
            raise _WorkerDied(DIED) from error
        except Exception as error:
            if type(error).__name__ in ENDS:
                raise _WorkerDied(ENDS[type(error).__name__]) from error
            raise


@contextmanager
def _workers(backend: str, address: str | None, n_jobs: int) -> Iterator[None]:
    """joblib's configuration inside. Raises ValueError for an unknown backend, or a cluster that cannot be used."""
    if backend == "loky":
        with local_workers(n_jobs):
            yield
        return
    if backend != "dask":
        raise ValueError(f"backend={backend!r}: must be loky (this machine) or dask (a cluster)")
    with dask_workers(address):
        yield


def _labels(config: Config) -> dict:
    """name -> value for the columns of a config."""
    labels = {f.name: getattr(config, f.name) for f in fields(config)} | {"parametrization": config.parametrization.name}
    return labels | {f"base_{name}": config.base_size(name) for name in BASED}


def _row(labels: dict, cell: dict, run: dict) -> dict:
    """A frame's row: the config's columns, the cell's other labels, and the run's results."""
    results = {name: run[name] for name in ("train_loss", "val_loss", "diverged", "seconds", "history")}
    text = {name: cell[name] for name in ("corpus", "corpus_digest")}
    return {**labels, "lr": cell["lr"], "steps": cell["steps"], **results, **text, **cell["options"], "key": cell["key"]}
