"""Many runs as one program: each equals itself alone, and nothing is read back from the device."""

import math
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimoe import Config, MiniMoE, TrainOptions, experts, sweep, train, training
from minimoe import model as model_module
from minimoe.batched import BatchedRuns, memory_per_run
from minimoe.config import differing
from minimoe.identity import run_key
from minimoe.step import NEUTRAL, SingleRun, losses
from minimoe.training import Kind, engine, parts_of_one_kind, planned_size, windows

FIELDS = {"width": 64, "context": 16, "n_experts": 4}
OPTIONS = TrainOptions(batch_size=4, eval_batches=2)


def configs(**fields):
    """Runs of different parametrizations and seeds, one shape."""
    names = [("mup", 0), ("sp", 0), ("mup", 3), ("simplep", 1)]
    return [Config(name, seed=seed, **FIELDS | fields) for name, seed in names]


LRS = [2**-6, 2**-7, 2**-5, 2**-6]
SHAPES = [{}, {"granularity": 4, "gates": "renormalized"}, {"activation": "swiglu"}, {"activation": "gelu", "z_weight": 0.1},
          {"n_experts": 1, "top_k": 1}, {"forced_balance": True},
          {"gates": "sigmoid", "bias_rate": 0.1}, {"gains": True}]  # fmt: skip


@pytest.fixture
def blocks(monkeypatch):
    """A CPU that takes the GPU's path of many runs."""
    monkeypatch.setattr(experts, "_by_turns", lambda *_: False)
    monkeypatch.setattr(model_module, "attention", experts._Attention.apply)


@pytest.fixture
def grouped(monkeypatch):
    """A CPU that takes the GPU's path of one run."""
    monkeypatch.setattr(experts, "_path", lambda *_: experts._grouped)


def tokens(runs, seed=0):
    return torch.randint(96, (runs, 4, 17), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("fields", SHAPES)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_at_step_0_equal_each_run_alone(fields):
    models = [MiniMoE(config) for config in configs(**fields)]
    batched = BatchedRuns(models, LRS, OPTIONS)
    batch = tokens(4)
    gradient, _ = torch.func.vmap(torch.func.grad(batched._losses, has_aux=True))(batched.weights, batched.buffers, batch)
    for i, model in enumerate(models):
        losses(model, model.config, batch[i])[0].backward()
        alone = torch.cat([p.grad.flatten() for p in model.parameters()])
        torch.testing.assert_close(gradient[i], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_ten_steps_equal_each_run_alone_with_torchs_own_adamw(decay):
    options = TrainOptions(batch_size=4, weight_decay=decay, clip=0.5)
    batched = BatchedRuns([MiniMoE(config) for config in configs()], LRS, options)
    alone = [SingleRun([MiniMoE(config)], [lr], options) for config, lr in zip(configs(), LRS, strict=True)]
    for step in range(10):
        batch = tokens(4, seed=step)
        factor = (step + 1) / 10
        factors = dict.fromkeys(batched.finals, factor)
        together = batched.step(batch, factors)
        apart = torch.cat([run.step(batch[i : i + 1], factors) for i, run in enumerate(alone)])
        torch.testing.assert_close(together, apart, rtol=0, atol=1e-4)


def test_whole_runs_agree_and_keep_their_own_histories(corpus):
    together = train(configs(), LRS, [0, 0, 3, 1], corpus, 40, OPTIONS, at_once=4)
    apart = train(configs(), LRS, [0, 0, 3, 1], corpus, 40, OPTIONS)
    for one, other in zip(together, apart, strict=True):
        assert (one.config, one.lr, one.seed, one.diverged) == (other.config, other.lr, other.seed, other.diverged)
        assert [r["step"] for r in one.history] == [r["step"] for r in other.history]
        assert one.history[0]["train_loss"] == pytest.approx(other.history[0]["train_loss"], abs=1e-4)
        assert one.val_loss == pytest.approx(other.val_loss, abs=0.05)  # routing flips amplify rounding with time
        weights = [torch.cat([p.flatten() for p in run.model.parameters()]) for run in (one, other)]
        assert torch.nn.functional.cosine_similarity(*weights, dim=0) > 0.99


def test_the_batched_optimum_is_the_same(corpus):
    lrs = [2.0**octave for octave in range(-9, -2)]
    best = []
    for at_once in (1, 7):
        runs = train(Config("mup", **FIELDS), lrs, 0, corpus, 40, OPTIONS, at_once=at_once)
        best.append(min(runs, key=lambda run: run.val_loss).lr)
    assert best[0] == best[1]


@pytest.mark.parametrize("path", ["CPU's", "GPU's"])
def test_a_run_that_diverges_leaves_the_others_bit_identical(corpus, path, request):
    if path == "GPU's":
        request.getfixturevalue("blocks")
    calm = train(configs(), LRS, [0, 0, 3, 1], corpus, 20, OPTIONS, at_once=4)
    wild = train(configs(), [*LRS[:1], 1e30, *LRS[2:]], [0, 0, 3, 1], corpus, 20, OPTIONS, at_once=4)
    assert [run.diverged for run in wild] == [False, True, False, False]
    assert wild[1].val_loss == math.inf
    for i in (0, 2, 3):
        assert wild[i].history == calm[i].history
        assert all(torch.equal(a, b) for a, b in zip(wild[i].model.parameters(), calm[i].model.parameters(), strict=True))


def test_a_batched_run_does_not_depend_on_its_company(corpus):
    """Two runs of one program, or three and one, against four: the numbers are those of the run, not of the batch."""
    four = train(configs(), LRS, [0, 0, 3, 1], corpus, 10, OPTIONS, at_once=4)
    two = train(configs(), LRS, [0, 0, 3, 1], corpus, 10, OPTIONS, at_once=2)
    three_and_one = train(configs(), LRS, [0, 0, 3, 1], corpus, 10, OPTIONS, at_once=3)
    assert [run.history for run in four] == [run.history for run in two] == [run.history for run in three_and_one]


def test_on_a_cpu_runs_are_trained_alone_by_default(corpus, monkeypatch):
    assert planned_size(Config(), OPTIONS, torch.device("cpu")) == 1
    monkeypatch.setattr(training, "BatchedRuns", None)
    assert len(train(configs(), LRS, 0, corpus, 2, OPTIONS)) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fields", SHAPES)
def test_a_step_reads_nothing_back_from_the_device(fields, dtype, blocks):
    """Under FakeTensorMode tensors have no values: `.item()`, `.tolist()` and data-dependent shapes raise.

    A torch without CUDA has no fake CUDA either, so the GPU's path is taken on a fake CPU.
    """
    with FakeTensorMode():
        models = [MiniMoE(config) for config in configs(**fields)]
        batched = BatchedRuns(models, LRS, TrainOptions(weight_decay=0.1, clip=1.0, dtype=dtype))
        batch = windows(torch.zeros(1000, dtype=torch.uint8), torch.zeros(4, 4, dtype=torch.int64), 16)
        cross_entropy = batched.step(batch, dict.fromkeys(batched.finals, 0.5))
        loss, load, square = batched.measure([batch[0], batch[1]])
    assert cross_entropy.shape == loss.shape == (4,)
    assert load.shape == (4, 2, models[0].config.experts)
    assert square.shape == (4, 2)


def test_the_cpus_path_would_be_caught():
    with FakeTensorMode():
        single = SingleRun([MiniMoE(Config(**FIELDS))], [0.01], OPTIONS)
        with pytest.raises(DataDependentOutputException):  # the sizes of the groups, which a CPU may well look at
            single.step(torch.zeros(1, 4, 17, dtype=torch.int64))


def test_where_memory_runs_out_the_part_is_halved_and_that_is_said(corpus, monkeypatch):
    original, sizes = training._train, []

    def short_of_memory(specs, *rest):
        sizes.append(len(specs))
        if len(specs) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(specs, *rest)

    monkeypatch.setattr(training, "_train", short_of_memory)
    with pytest.warns(UserWarning, match="out of memory with 4 runs at once: going on with 2"):
        runs = train(configs(), LRS, [0, 0, 3, 1], corpus, 2, OPTIONS, at_once=4)
    assert sizes == [4, 2, 2]
    assert [run.lr for run in runs] == LRS


def test_a_single_run_that_does_not_fit_is_an_error(corpus, monkeypatch):
    def never(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(training, "_train", never)
    with pytest.raises(torch.OutOfMemoryError):
        train(Config(**FIELDS), 0.01, 0, corpus, 2, OPTIONS)


class PeakMemory(TorchDispatchMode):
    """The largest number of bytes that live tensors took, as a GPU's allocator would count them."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and id(tensor.untyped_storage()) not in given:
                storage = tensor.untyped_storage()
                if storage not in self.seen:
                    self.seen.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _freed(self, size):
        self.now -= size

    def __enter__(self):
        self.seen = weakref.WeakSet()
        return super().__enter__()


@pytest.mark.parametrize(
    "fields",
    [{"width": 32}, {"width": 128}, {"width": 256, "n_experts": 64}, {"granularity": 8}, {"activation": "swiglu", "depth": 4},
     {"n_experts": 32, "batch_size": 2}, {"width": 128, "dtype": "bfloat16"}],
)  # fmt: skip
def test_the_estimate_of_a_runs_memory_is_from_above_and_not_wild(fields, blocks):
    chosen = {"batch_size": 16} | {name: value for name, value in fields.items() if name in ("batch_size", "dtype")}
    options = TrainOptions(clip=1.0, weight_decay=0.1, **chosen)
    config = Config(**{name: value for name, value in fields.items() if name not in chosen})
    runs = 3
    with PeakMemory() as memory, FakeTensorMode():
        batched = BatchedRuns([MiniMoE(config) for _ in range(runs)], [0.01] * runs, options)
        for _ in range(2):
            batched.step(torch.zeros(runs, options.batch_size, 65, dtype=torch.int64))
    assert 1.0 <= memory_per_run(config, options) / (memory.peak / runs) <= 3.0


def test_the_planner_fills_a_gpu_and_says_where_it_splits(monkeypatch):
    free = 10 * memory_per_run(Config(width=128), TrainOptions())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    gpu = torch.device("cuda")
    assert planned_size(Config(width=128), TrainOptions(), gpu) == 8
    assert planned_size(Config(width=4096), TrainOptions(), gpu) == 1
    configs = [Config(name, 128) for name in ("sp", "mup") for _ in range(5)] + [Config("sp", 64)]
    with pytest.warns(UserWarning, match="10 runs of one shape, 8 at once"):
        parts = parts_of_one_kind(configs, lambda config: Kind(config, TrainOptions(), 1), gpu)
    assert [len(part) for part in parts] == [8, 2, 1]


def test_runs_of_other_options_or_lengths_are_other_programs():
    """A program has one schedule and one batch size; it may have several tables, base shapes and seeds."""
    config = Config(**FIELDS)
    kinds = [
        Kind(config, OPTIONS, 10), Kind(Config("sp", seed=4, base_width=16, **FIELDS), OPTIONS, 10), Kind(config, OPTIONS, 20),
        Kind(config, replace(OPTIONS, batch_size=8), 10), Kind(config, replace(OPTIONS, dtype="bfloat16"), 10),
        Kind(replace(config, width=32), OPTIONS, 10), Kind(config, replace(OPTIONS), 10),
    ]  # fmt: skip
    parts = parts_of_one_kind(range(7), lambda i: kinds[i], torch.device("cpu"), at_once=9)
    assert parts == [[0, 1, 6], [2], [3], [4], [5]]


def test_one_run_on_a_gpu_is_the_plain_loop():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert [engine(runs, gpu, 3) for runs in (1, 2, 3)] == [SingleRun, BatchedRuns, BatchedRuns]
    assert engine(1, gpu) is engine(1, gpu, 1) is engine(1, cpu) is engine(1, cpu, 1) is SingleRun
    assert engine(1, cpu, 3) is BatchedRuns


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_runs_in_bfloat16_learn_as_those_in_float32(corpus, at_once):
    """Weights stay in float32, and so do the optimizer's state and the loss."""
    exact, rounded = (
        train(configs(), LRS, [0, 0, 3, 1], corpus, 40, replace(OPTIONS, dtype=dtype), at_once=at_once)
        for dtype in ("float32", "bfloat16")
    )
    for one, other in zip(exact, rounded, strict=True):
        assert other.history != one.history
        assert other.history[0]["train_loss"] == pytest.approx(one.history[0]["train_loss"], abs=0.01)
        assert other.val_loss == pytest.approx(one.val_loss, abs=0.1)
        assert other.val_loss < other.history[0]["val_loss"] - 0.3
        assert {p.dtype for p in other.model.parameters()} == {torch.float32}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_bfloat16_leaves_weights_state_and_losses_in_float32(monkeypatch):
    options, seen = replace(OPTIONS, dtype="bfloat16"), []
    original = experts._path
    monkeypatch.setattr(experts, "_path", lambda *operands: seen.extend(t.dtype for t in operands) or original(*operands))
    single, batched = (kind([MiniMoE(Config(**FIELDS))], [0.01], options) for kind in (SingleRun, BatchedRuns))
    assert single.step(tokens(1)).dtype == batched.step(tokens(1)).dtype == torch.float32
    assert set(seen) == {torch.bfloat16}
    state = [value for entry in single.optimizer.torchs.state.values() for value in entry.values()]
    own = [batched.weights, batched.optimizer.mean, batched.optimizer.square]
    assert {tensor.dtype for tensor in [*single.model.parameters(), *state, *own]} == {torch.float32}


def test_one_run_on_a_gpu_reads_nothing_back_in_bfloat16(grouped):
    """The step's arithmetic. torch's fused AdamW, whose tensors are on the GPU, needs real ones."""
    with FakeTensorMode():
        single = SingleRun([MiniMoE(Config(**FIELDS))], [0.01], replace(OPTIONS, dtype="bfloat16"))
        loss, _ = losses(single._run, single.model.config, torch.zeros(4, 17, dtype=torch.int64))
        loss.backward()
        measured = single.measure([torch.zeros(4, 17, dtype=torch.int64)])
    assert [value.shape for value in measured] == [(1,), (1, 2, 4), (1, 2)]
    assert all(p.grad.shape == p.shape for p in single.model.parameters())


@pytest.mark.parametrize("fields", SHAPES)
def test_one_run_on_a_gpus_path_is_the_one_on_a_cpus(fields, monkeypatch):
    config, steps = Config(**FIELDS | fields), []
    for path in (experts._path, lambda *_: experts._grouped):
        monkeypatch.setattr(experts, "_path", path)
        run = SingleRun([MiniMoE(config)], [2**-6], OPTIONS)
        steps.append(torch.cat([run.step(tokens(1, seed=step)) for step in range(10)]))
    torch.testing.assert_close(*steps, rtol=0, atol=1e-4)


def test_deterministic_is_asked_of_torch_and_taken_back(corpus, monkeypatch):
    seen = []
    original = training._train
    monkeypatch.setattr(training, "_train", lambda *a: seen.append(torch.are_deterministic_algorithms_enabled()) or original(*a))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.use_deterministic_algorithms(False, warn_only=True)  # a caller's own setting
        train(Config(**FIELDS), 0.01, 0, corpus, 2, OPTIONS, deterministic=True)
        train(Config(**FIELDS), 0.01, 0, corpus, 2, OPTIONS)
    assert seen == [True, False]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)


def test_bad_sizes_are_refused(corpus):
    with pytest.raises(ValueError, match="at_once=0: must be a positive integer"):
        train(Config(**FIELDS), 0.01, 0, corpus, 2, OPTIONS, at_once=0)


def test_the_dtype_is_checked_and_counts_where_it_is_not_float32(corpus):
    with pytest.raises(ValueError, match="dtype='float16': must be one of float32, bfloat16"):
        TrainOptions(dtype="float16")
    keys = [run_key(Config(**FIELDS), 0.01, 2, replace(OPTIONS, dtype=d), corpus.digest) for d in ("float32", "bfloat16")]
    assert keys[0] != keys[1]
    assert "dtype" not in differing(OPTIONS.schedule, NEUTRAL)  # so that a run from before the field keeps its key


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_sweep_can_be_batched_and_keeps_lengths_and_batch_sizes_apart(corpus, monkeypatch):
    programs, original = [], training._train
    monkeypatch.setattr(training, "_train", lambda specs, *a: programs.append(len(specs)) or original(specs, *a))
    grid = {"steps": (2, 3), "batch_size": (2, 4), "context": 16, "n_jobs": 1, "progress": False}
    frame = sweep((32,), ("mup",), (0.01, 0.02, 0.04), (0,), corpus=corpus, at_once=2, **grid)
    assert sorted(programs) == [1] * 4 + [2] * 4
    assert len(frame.drop_duplicates(["steps", "batch_size", "lr"])) == 12
    for row in frame.itertuples():
        assert row.history[-1]["step"] == row.steps
