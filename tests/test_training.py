"""Training one run: the schedule, reproducibility, records, divergence, bad input."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minimoe import Config, MiniMoE, TrainOptions, train
from minimoe.step import lr_factor
from minimoe.training import TextData, record_steps

SMALL = Config(width=32, depth=1, n_experts=4, context=16)
FAST = TrainOptions(batch_size=4, eval_batches=2)


def one(corpus, config=SMALL, lr=0.01, seed=0, steps=20, options=FAST):
    (run,) = train(config, lr, seed, corpus, steps, options)
    return run


def test_a_run_learns_and_reports(corpus):
    run = one(corpus, steps=60)
    assert run.val_loss < 3.0 < math.log(96) < run.history[0]["train_loss"] + 1
    assert [r["step"] for r in run.history] == [6 * i for i in range(1, 11)]
    assert run.val_loss == run.history[-1]["val_loss"]
    assert run.history[-1]["train_loss"] == pytest.approx(run.train_loss)  # both the last tenth
    assert not run.diverged
    assert (run.corpus, run.corpus_digest) == ("words", corpus.digest)
    for record in run.history:
        assert len(record["max_load"]) == len(record["idle_experts"]) == len(record["router_rms"]) == 1
        assert 1 <= record["max_load"][0] <= 4
        assert record["idle_experts"][0] in range(4)
        assert record["router_rms"][0] > 0


def test_the_same_seed_gives_bit_identical_losses(corpus):
    first, second, other = one(corpus), one(corpus), one(corpus, seed=1)
    assert first.history == second.history
    assert first.history != other.history
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_seeds_govern_init_and_data_order_separately(corpus):
    own = one(corpus, seed=1)
    other_data = one(corpus, seed=1, options=TrainOptions(batch_size=4, eval_batches=2, data_seed=5))
    other_init = one(corpus, seed=5, options=TrainOptions(batch_size=4, eval_batches=2, data_seed=1))
    assert len({run.val_loss for run in (own, other_data, other_init)}) == 3
    assert one(corpus, seed=1, options=TrainOptions(batch_size=4, eval_batches=2, data_seed=1)).val_loss == own.val_loss
    data = TextData(corpus, torch.device("cpu"))
    orders = [data.order([run_options.order_seed(1)], 20, 4, 16) for run_options in (FAST, TrainOptions(data_seed=5))]
    assert not torch.equal(*orders)
    assert torch.equal(data.order([FAST.order_seed(1)], 20, 4, 16), orders[0])


def test_a_run_does_not_depend_on_the_number_of_threads_outside(corpus):
    reference = one(corpus).history
    torch.set_num_threads(2)
    assert one(corpus).history == reference
    assert torch.get_num_threads() == 2


def test_a_diverging_run_is_a_result_like_any_other(corpus):
    good, bad = train(SMALL, [0.01, 1e30], 0, corpus, 20, FAST)
    assert bad.diverged
    assert bad.val_loss == bad.train_loss == math.inf
    assert not good.diverged
    assert good.history == one(corpus).history


def test_runs_are_given_as_lists_or_single_values(corpus):
    runs = train([SMALL, Config(width=64, context=16)], 0.01, [3, 4], corpus, 2, FAST)
    assert [(run.config.width, run.seed, run.config.seed) for run in runs] == [(32, 3, 3), (64, 4, 4)]
    with pytest.raises(ValueError, match="lrs has 2 values for 3 runs"):
        train(SMALL, [0.1, 0.2], [0, 1, 2], corpus, 2, FAST)
    with pytest.raises(ValueError, match="lrs is empty"):
        train(SMALL, [], 0, corpus, 2, FAST)


@given(steps=st.integers(1, 400), warmup=st.floats(0, 1), final=st.floats(0, 1))
def test_the_schedule_rises_to_one_and_falls_to_its_end(steps, warmup, final):
    options = TrainOptions(warmup=warmup, final_lr=final)
    factors = [lr_factor(step, steps, options) for step in range(steps)]
    risen = round(warmup * steps)
    assert all(0 < f <= 1 for f in factors[:-1])
    assert factors[:risen] == sorted(factors[:risen])
    assert factors[risen:] == sorted(factors[risen:], reverse=True)
    if risen:
        assert factors[risen - 1] == 1
    if risen < steps:
        assert factors[-1] == pytest.approx(final, abs=1e-12)


@given(steps=st.integers(1, 300), evals=st.integers(1, 40))
def test_records_are_spaced_and_end_at_the_end(steps, evals):
    marks = record_steps(steps, evals)
    assert marks[-1] == steps
    assert marks[0] >= 1
    assert len(marks) == min(steps, evals)


def test_auxiliary_losses_reach_the_gradient_and_not_the_report(corpus):
    from minimoe.step import losses

    batch = torch.from_numpy(corpus.encode(corpus.decode(corpus.train[:17])))[None]
    seen = {}
    for balance, z in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        model = MiniMoE(Config(width=32, context=16, balance_weight=balance, z_weight=z))
        loss, cross_entropy = losses(model, model.config, batch)
        loss.backward()
        seen[balance, z] = (cross_entropy.item(), model.blocks[0].moe.router.grad.clone())
    assert len({cross_entropy for cross_entropy, _ in seen.values()}) == 1
    router = [gradient for _, gradient in seen.values()]
    assert not torch.allclose(router[0], router[1])
    assert not torch.allclose(router[0], router[2])


@pytest.mark.parametrize("lr", [0.0, -0.1, math.nan, math.inf])
def test_bad_lrs_are_refused(corpus, lr):
    with pytest.raises(ValueError, match="must be positive and finite"):
        one(corpus, lr=lr)


def test_other_bad_input_is_refused(corpus, tmp_path):
    with pytest.raises(ValueError, match="steps=0: must be a positive integer"):
        one(corpus, steps=0)
    with pytest.raises(ValueError, match="vocab_size=50: corpus 'words' has 96 symbols"):
        one(corpus, config=Config(vocab_size=50))
    with pytest.raises(ValueError, match="device='cuda:99' is not available here"):
        train(SMALL, 0.01, 0, corpus, 2, FAST, device="cuda:99")
    with pytest.raises(TypeError, match=r"seed=1.7: must be an integer"):
        one(corpus, seed=1.7)
    with pytest.raises(ValueError, match="too short for context=100000"):
        one(corpus, config=Config(context=100_000))


@pytest.mark.parametrize(
    "bad",
    [{"batch_size": 0}, {"betas": (0.9, 1.0)}, {"betas": (0.9,)}, {"betas": 5}, {"eps": -1.0}, {"eps": "x"},
     {"weight_decay": math.nan}, {"warmup": 1.5},
     {"final_lr": -0.1}, {"clip": 0.0}, {"evals": 0}, {"eval_batches": 0.5}, {"data_seed": -1}],
)  # fmt: skip
def test_bad_options_are_refused(bad):
    with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
        TrainOptions(**bad)


def test_clipping_is_off_by_default_and_works(corpus):
    assert TrainOptions().clip is None
    clipped = one(corpus, options=TrainOptions(batch_size=4, eval_batches=2, clip=1e-4))
    assert clipped.val_loss != one(corpus).val_loss
