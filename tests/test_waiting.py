"""Nothing waits in silence: locks that others hold, locks that cannot be made, and sizes that fit no memory."""

import multiprocessing
import threading
import time

import pytest

from minimoe import Config, MiniMoE, TrainOptions, make_corpus, memory, room, sweep
from minimoe import corpus as corpora
from minimoe.store import RunStore

fcntl = pytest.importorskip("fcntl")


def hold(path, seconds, ready):
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ready.set()
        time.sleep(seconds)


@pytest.mark.parametrize("ending", [".lock", ""])
def test_a_lock_held_elsewhere_is_said_within_two_seconds_and_waited_for(ending, tmp_path):
    path, context = tmp_path / "runs.jsonl", multiprocessing.get_context("spawn")
    path.touch()
    ready = context.Event()
    process = context.Process(target=hold, args=(f"{path}{ending}", 4, ready))
    process.start()
    assert ready.wait(60)
    start, said = time.monotonic(), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minimoe.locks._say", lambda name: said.append((name, time.monotonic() - start)))
        RunStore(path).prepare()
    assert time.monotonic() - start > 2.5  # it has waited
    ((name, after),) = said
    assert name == f"{path}{ending}"
    assert after < 2
    process.join()


def test_what_is_waited_for_is_a_warning(tmp_path):
    lock = tmp_path / "runs.jsonl.lock"
    with open(lock, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(1.5, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        with pytest.warns(UserWarning, match=r"waiting for .*runs.jsonl.lock, which another process has locked"):
            RunStore(tmp_path / "runs.jsonl").prepare()


@pytest.mark.parametrize("obstacle", ["folder", "loop", "name"])
def test_a_lock_that_cannot_be_made_is_an_error_at_once(obstacle, tmp_path):
    name = "n" * 253 if obstacle == "name" else "runs.jsonl"  # with .lock it is longer than a name may be
    lock = tmp_path / f"{name}.lock"
    if obstacle == "folder":
        lock.mkdir()
    elif obstacle == "loop":
        lock.symlink_to(lock)
    start = time.monotonic()
    with pytest.raises(OSError, match="cannot be written"):
        RunStore(tmp_path / name).prepare()
    assert time.monotonic() - start < 3


def test_a_lock_that_never_appears_is_an_error(tmp_path, monkeypatch):
    """As where a file system answers each attempt as if another process had just been faster."""
    from filelock import FileLock

    monkeypatch.setattr(FileLock, "_acquire", lambda self: None)
    with pytest.raises(OSError, match=r"its lock .*runs.jsonl.lock cannot be made"):
        RunStore(tmp_path / "runs.jsonl").prepare()


SHAPES = [{}, {"activation": "swiglu"}, {"n_experts": 1, "top_k": 1}, {"granularity": 2, "depth": 3, "width": 96}]


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_counted_without_the_model(shape):
    config = Config(**shape)
    assert room.parameters(config) == sum(p.numel() for p in MiniMoE(config).parameters())


@pytest.mark.parametrize("size", [{"depth": 10**8}, {"width": 2**40}, {"batch_size": 10**9}, {"steps": 10**12}])
def test_what_cannot_fit_is_refused_before_it_is_allocated(size, corpus):
    ((name, value),) = size.items()
    grid = {"widths": (32,), "lrs": (0.01,), "corpus": corpus, "n_jobs": 1}
    grid |= {"widths": (value,)} if name == "width" else size
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"{name}={value}: a run needs at least .* GB of memory, and .* GB are free"):
        sweep(**grid)
    assert time.monotonic() - start < 2


def test_the_estimate_is_from_below():
    """A laptop's memory holds every size of the shipped sweeps."""
    assert room.memory_of_training(Config(width=512, depth=8, context=256), TrainOptions(batch_size=64), 2000) < 8e9


def test_where_the_system_does_not_say_nothing_is_refused(monkeypatch):
    monkeypatch.setattr(room, "free_memory", lambda: None)
    room.require_memory([(Config(depth=10**8), 0.01, 10, TrainOptions())])
    assert memory.gigabytes(2_500_000_000) == "2.5 GB"


def test_a_corpus_larger_than_memory_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "large.txt"
    with open(path, "wb") as file:
        file.truncate(2**40)  # a hole: it takes no room on the disk
    with pytest.raises(ValueError, match=r"corpus 'large.txt' is too large: reading its 1.1e\+03 GB takes"):
        corpora.load_corpus(path)


def test_a_corpus_is_read_in_pieces(monkeypatch):
    text = "Grüße, 世界!\n" * 50
    whole = make_corpus("text", text)
    monkeypatch.setattr(corpora, "CHUNK", 7)
    pieces = make_corpus("text", text)
    assert (pieces.train == whole.train).all()
    assert pieces.train.dtype == whole.train.dtype
    with pytest.raises(ValueError, match=r"outside the vocabulary: '\\udcff'"):
        whole.encode("\udcff")  # as a terminal passes on a byte that is no character
