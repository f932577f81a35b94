"""A day on a GPU in one command: the step, runs at once, and the sweeps that docs/findings.md asks for.

    python benchmarks/gpu.py --all

It does the most valuable part first and starts a part only if, by a guess for one H100, it ends within the budget
(`--minutes`, 40). What is done is on record (`gpu.jsonl`) and not done again: run it again for what is left. Every run adds
a section to `results.md`. Where there is no GPU it says so and measures nothing; `--tiny --device cpu` runs every part at
toy sizes.

step       a training step against Mixtral's (`contenders.py`): 256 x 64 tokens, 2 layers, 8 experts, top-2, widths 256 to
           2048, float32 (without TF32) and bfloat16, compiled or not.
runs       1, 9 and 27 runs at once, width 128, 200 steps of 16 x 64 tokens, validation counted.
granularity, experts
           the sweeps, base width 64, in bfloat16, one run at a time. They have 100 times the tokens of the laptop's: 16
           times the batch (256 x 64 tokens) and 6.25 times the steps, so granularity 2500 for 400 (41 million tokens a run)
           and expert count 1250 for 200 (20 million). Width 256 at G = 1 is 1.6 million active matrix parameters, 0.4
           PFLOP a run, and 8 ms a step of which most is launching kernels: 20 s. G = 16 moves 16 times the rows, and 32
           active experts of 128 are 17 million parameters: about a minute each. Five LRs, an arm and a size, are a part.
           `pydocs` has 2 million characters, so 41 million are 21 passes: for a question of loss give a larger --corpus.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from contenders import mixtral, ours
from sections import section
from timing import interleaved

from minimoe import Config, TrainOptions, load_corpus, sweep, train
from minimoe.arms import ARMS, EXPERT_ARMS, Arm
from minimoe.corpus import Corpus
from minimoe.training import available_device

ROOT = Path(__file__).parent.parent
GRANULARITY_ARMS = ("authors", "router mup")
COUNT_ARMS = ("mup, raw, k=2", "mup, raw, k=E/4", "simplep, raw, k=2", "simplep, raw, k=E/4")


@dataclass(frozen=True)
class Sizes:
    """How large everything is; the defaults are the GPU's."""

    step_widths: tuple[int, ...] = (256, 512, 1024, 2048)
    sequences: int = 256  # of a step and of the sweeps
    repeats: int = 20
    backend: str = "inductor"  # torch.compile's
    at_once: tuple[int, ...] = (1, 9, 27)
    at_once_width: int = 128
    at_once_steps: int = 200
    widths: tuple[int, ...] = (256, 512, 1024)  # of the sweeps
    base_width: int = 64
    granularities: tuple[int, ...] = (1, 16)
    granularity_steps: int = 2500
    experts: tuple[int, ...] = (8, 32, 128)
    experts_steps: int = 1250
    lrs: tuple[float, ...] = tuple(2.0**octave for octave in range(-6, -1))
    seeds: tuple[int, ...] = (0, 1, 2)
    evals: int = 10


TINY = Sizes(
    step_widths=(32,), sequences=2, repeats=1, backend="aot_eager", at_once=(1, 2), at_once_width=32, at_once_steps=2,
    widths=(64, 128), base_width=32, granularities=(1, 2), granularity_steps=2, experts=(4, 8), experts_steps=2,
    lrs=(2.0**-5, 2.0**-4), seeds=(0, 1), evals=1,
)  # fmt: skip


class Day(NamedTuple):
    """What every part needs."""

    sizes: Sizes
    device: torch.device
    corpus: Corpus
    folder: Path  # of the sweeps' stores


class Part(NamedTuple):
    """Something to be done in one go."""

    kind: str  # step, runs, granularity or experts
    name: str
    minutes: float  # a guess, for one H100
    run: Callable[[], dict]  # what it found, for the record


def parts(day: Day) -> Iterator[Part]:
    """Every part, the most valuable first."""
    yield from step_parts(day, compiled=False)
    yield Part("runs", f"{day.sizes.at_once} runs at once", 2, partial(runs_at_once, day))
    yield from step_parts(day, compiled=True)
    first, *further = day.sizes.seeds
    narrow, *wider = day.sizes.widths
    yield from granularity_parts(day, narrow, first)
    yield from experts_parts(day, narrow, first)
    for width in wider:
        yield from granularity_parts(day, width, first)
    for seed in further:
        yield from granularity_parts(day, narrow, seed)
        yield from experts_parts(day, narrow, seed)


def step_parts(day: Day, compiled: bool) -> Iterator[Part]:
    """A step of each width in both precisions."""
    for dtype in ("bfloat16", "float32"):
        for width in day.sizes.step_widths:
            name = f"width {width}, {dtype}{', compiled' if compiled else ''}"
            yield Part("step", name, 1.0 if compiled else 0.4, partial(a_step, day, width, dtype, compiled))


def a_step(day: Day, width: int, dtype: str, compiled: bool) -> dict:
    """Median seconds of a step and its peak memory in bytes (0 on a CPU), ours and Mixtral's."""
    config, backend = Config(width=width), day.sizes.backend if compiled else None
    contenders, memory = {}, {}
    for name, make in (("ours", ours), ("mixtral", mixtral)):
        held = reset_memory(day.device)
        step = make(config, day.sizes.sequences, day.device, dtype, backend)
        for _ in range(2):
            step()
        memory[name] = peak_memory(day.device) - held
        contenders[name] = synchronised(step, day.device)
    took = interleaved(contenders, day.sizes.repeats)
    torch.compiler.reset()
    return {"width": width, "dtype": dtype, "compiled": compiled, "seconds": took, "memory": memory}


def runs_at_once(day: Day) -> dict:
    """Median seconds of so many runs as one program."""
    config, options = Config("mup", day.sizes.at_once_width), TrainOptions(evals=day.sizes.evals)

    def trained(runs: int) -> None:
        lrs = [2.0 ** (-9 + 6 * i / runs) for i in range(runs)]
        train(config, lrs, 0, "pydocs", day.sizes.at_once_steps, options, day.device, at_once=runs)

    contenders = {runs: synchronised(partial(trained, runs), day.device) for runs in day.sizes.at_once}
    took = interleaved(contenders, repeats=min(3, day.sizes.repeats), warmup=1)
    return {"seconds": {str(runs): seconds for runs, seconds in took.items()}}


def granularity_parts(day: Day, width: int, seed: int) -> Iterator[Part]:
    """The authors' form against muP's router."""
    for name in GRANULARITY_ARMS:
        for granularity in day.sizes.granularities:
            sizes = {"width": width, "granularity": granularity, "base_granularity": 1}
            label = f"{name}, width {width}, G={granularity}, seed {seed}"
            yield sweep_part(day, "granularity", label, ARMS[name], sizes, day.sizes.granularity_steps, seed)


def experts_parts(day: Day, width: int, seed: int) -> Iterator[Part]:
    """Two active experts against a quarter of all."""
    for experts in day.sizes.experts:
        for name in COUNT_ARMS:
            sizes = {"width": width, "n_experts": experts}
            label = f"{name}, width {width}, E={experts}, seed {seed}"
            yield sweep_part(day, "experts", label, EXPERT_ARMS[name], sizes, day.sizes.experts_steps, seed)


def sweep_part(day: Day, kind: str, label: str, arm: Arm, sizes: dict, steps: int, seed: int) -> Part:
    """One arm at one size: every LR, into the kind's store, which remembers what has been trained."""
    options = TrainOptions(batch_size=day.sizes.sequences, dtype="bfloat16", evals=day.sizes.evals)
    one = guessed_seconds(Config(vocab_size=day.corpus.vocab_size, **sizes, **arm.at(**sizes)), steps, options)

    def run() -> dict:
        fields = {name: value for name, value in sizes.items() if name != "width"} | arm.fields
        frame = sweep(
            (sizes["width"],), (arm.table,), day.sizes.lrs, (seed,), steps, day.corpus, options=options,
            store=store_path(day.folder, kind), device=day.device, at_once=1, n_jobs=1, progress=False,
            base_width=day.sizes.base_width, **fields,
        )  # fmt: skip
        return {"rows": len(frame), "seconds": frame.seconds.sum()}

    return Part(kind, label, len(day.sizes.lrs) * one / 60, run)


def guessed_seconds(c: Config, steps: int, options: TrainOptions) -> float:
    """A guess at one run's time on an H100: 8 ms a step for launching kernels, the arithmetic at 100 TFLOP/s, and 100 bytes
    for each row and channel of the experts' inputs and outputs at 2 TB/s."""
    tokens = steps * options.batch_size * c.context
    matrices = c.depth * c.width * (4 * c.width + 2 * c.active_experts * c.expert_width)
    moved = 100 * c.depth * c.active_experts * c.width
    return 0.008 * steps + tokens * (6 * matrices / 1e14 + moved / 2e12)


def store_path(folder: Path, kind: str) -> Path:
    """The store of a kind of sweep."""
    return folder / {"granularity": "gpu_granularity.jsonl", "experts": "gpu_expert_count.jsonl"}[kind]


def synchronised(function: Callable, device: torch.device) -> Callable[[], None]:
    """The function, returning only when the GPU has done what it was given."""

    def run() -> None:
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return run


def reset_memory(device: torch.device) -> int:
    """The bytes that are held now; the peak counts anew."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_memory(device: torch.device) -> int:
    """The largest number of bytes held since the last reset; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def recorded(path: Path) -> list[dict]:
    """What earlier commands have put on record."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def as_time_allows(waiting: list[Part], minutes: float) -> Iterator[tuple[Part, dict | Exception | None]]:
    """(part, what it found), in order; the error where it failed, and None for a part that would not end in time.

    A guess counts as longer once those before it have turned out too short.
    """
    start, guessed = time.monotonic(), 0.0
    for part in waiting:
        elapsed = (time.monotonic() - start) / 60
        if elapsed + part.minutes * max(1.0, elapsed / guessed if guessed else 1.0) > minutes:
            yield part, None
            continue
        print(f"{part.kind}: {part.name} (about {part.minutes:.1f} min)", flush=True)
        guessed += part.minutes
        try:
            found = part.run()
        except Exception as error:  # one part must not cost the others their time on the GPU
            traceback.print_exc()
            found = error
        yield part, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="the sweeps, too; without it the step and runs at once")
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that every part works")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results.md")
    parser.add_argument("--records", type=Path, default=ROOT / "benchmarks" / "gpu.jsonl")
    parser.add_argument("--sweeps", type=Path, default=ROOT / "data" / "sweeps", help="the folder of the stores")
    parser.add_argument("--corpus", default="pydocs", help="of the sweeps: pydocs, or a text file")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing measured")
        return
    device, corpus = available_device(options.device), load_corpus(options.corpus)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    place = {"device": name, "torch": torch.__version__, "corpus": corpus.name}
    known = {(r["kind"], r["name"]) for r in recorded(options.records) if place.items() <= r.items()}
    day = Day(TINY if options.tiny else Sizes(), device, corpus, options.sweeps)
    wanted = [part for part in parts(day) if options.all or part.kind in ("step", "runs")]
    waiting = [part for part in wanted if (part.kind, part.name) not in known]
    done, left, failed = [], [], []
    for part, found in as_time_allows(waiting, options.minutes):
        if isinstance(found, dict):
            done.append({"kind": part.kind, "name": part.name, **place, **found})
            with open(options.records, "a") as file:
                file.write(json.dumps(done[-1]) + "\n")
        else:
            (left if found is None else failed).append(part.name)
    if done:
        stores = {kind: store_path(options.sweeps, kind) for kind in ("granularity", "experts")}
        with open(options.results, "a") as file:
            file.write(section(done, place, " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]), stores))
    print(f"{len(done)} parts done, {len(wanted) - len(waiting)} were; left: {'; '.join(left) or 'nothing'}")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
