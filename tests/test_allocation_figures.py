"""Pictures of allocations, and the books of whole trainings: what is drawn is what the frames say."""

import math

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from minimoe import (
    PARAMETRIZATIONS,
    Config,
    TrainOptions,
    allocation_map,
    coordinate_check,
    exponents,
    fan_in,
    learning_shares,
    promise_and_fall,
    train,
)
from minimoe.figures import ALERT
from minimoe.learning import books

TINY = {"widths": (32, 64), "steps": 2, "seeds": (0, 1), "n_jobs": 1, "context": 16, "n_experts": 4}


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_the_map_shows_every_tensor_and_size(corpus):
    big_head = PARAMETRIZATIONS["mup"].replace("unembedding", "big head", init_var=fan_in)
    frame = coordinate_check(["mup", big_head], corpus=corpus, **TINY)
    table, figure = exponents(frame), allocation_map(frame)
    for axes, name in zip(figure.axes, ("mup", "big head"), strict=True):
        own = table[(table.parametrization == name) & (table.quantity == "allocation") & (table.tensor != "loss")]
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels[: len(own)] == [f"{r.tensor}{'' if r.layer < 0 else f', layer {r.layer}'}" for r in own.itertuples()]
        assert labels[len(own) :] == ["sum of all", "true fall of the loss", "closure"]
        assert len(axes.patches) == 2 * (len(own) + 2)
        slopes = axes.texts[2 : 3 * len(own) : 3]  # of each row: two numbers and the slope
        for text, row in zip(slopes, own.itertuples(), strict=True):
            assert text.get_text().startswith(f"{row.measured:+.2f} ±")
            assert (to_rgb(text.get_color()) == to_rgb(ALERT)) == (row.verdict in ("explodes", "shrinks"))
        nats = frame[(frame.parametrization == name) & (frame.tensor == "v") & (frame.layer == 0) & (frame.step == 2)]
        means = nats[nats.quantity == "allocation"].groupby("width").value.mean()
        place = labels.index("v, layer 0")
        assert texts(axes)[3 * place + 1] == f"{math.log2(means[64] / means[32]):+.1f}"


def test_over_the_depth_the_map_shows_the_sums(corpus):
    frame = coordinate_check("mup", corpus=corpus, **TINY | {"widths": None, "depth": (1, 2)})
    (axes,) = allocation_map(frame, step=1).axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == ["embedding", "q", "k", "v", "o", "router", "up", "down", "logits",
                      "sum of all", "true fall of the loss", "closure"]  # fmt: skip
    assert axes.get_xlabel() == "depth"


def test_an_allocation_that_is_not_positive_is_not_drawn_as_a_growth(corpus):
    frame = coordinate_check("mup", corpus=corpus, **TINY)
    hurt = (frame.tensor == "v") & (frame.quantity == "allocation") & (frame.width == 64) & (frame.layer == 0)
    (axes,) = allocation_map(frame.assign(value=frame.value.where(~hurt, -1.0))).axes
    assert texts(axes).count("< 0") == 1
    assert "negative" in texts(axes)
    with pytest.raises(ValueError, match="has no allocations"):
        allocation_map(frame[~frame.quantity.isin(("allocation", "fall"))])


@pytest.fixture(scope="module")
def booked(pydocs):
    options = TrainOptions(evals=1)
    return pd.concat(
        books(Config(name, width=width, seed=seed), 2.0**-6, pydocs, 12, options, records=(3, 6))
        for name in ("sp", "mup") for width in (32, 64) for seed in (0, 1)
    )  # fmt: skip


def test_books_add_up_to_the_fall_of_the_loss(booked):
    runs = booked.groupby(["parametrization", "width", "seed", "step"])
    sums = runs.allocation.sum() / runs.fall.first()
    assert sums.to_numpy() == pytest.approx(runs.closure.first().to_numpy())
    whole = (
        booked.groupby(["parametrization", "width", "seed"]).allocation.sum() / runs.fall.first().groupby(level=[0, 1, 2]).sum()
    )
    assert whole.to_numpy() == pytest.approx(np.ones(len(whole)), abs=0.05)
    assert set(booked.step) == {3, 6}
    assert (runs.left.sum() > runs.trapezoid.sum()).all()  # the loss is curved upwards along its own steps
    narrow = booked[booked.width == 32].drop(columns="parametrization")
    halves = [narrow.iloc[: len(narrow) // 2], narrow.iloc[len(narrow) // 2 :]]
    pd.testing.assert_frame_equal(*halves)  # at the base width sp and mup are one run


def test_booking_is_training(pydocs):
    """The same losses as `train`'s, up to the last record; the schedule is that of all steps."""
    config, options = Config("mup", width=32, seed=1), TrainOptions(evals=4)
    (run,) = train([config], 2.0**-6, 1, pydocs, 8, options)
    frame = books(config, 2.0**-6, pydocs, 8, options, intervals=0)
    falls = frame.groupby("step").fall.first()
    assert len(falls) == 8
    assert falls.sum() > 0.5 * (run.history[0]["val_loss"] - run.val_loss)
    short = books(config, 2.0**-6, pydocs, 8, options, records=(4,), intervals=0)
    assert short.fall.iloc[0] == pytest.approx(falls[:4].sum(), rel=1e-6)
    with pytest.raises(ValueError, match="records=\\[9\\]: must be integers from 1 to steps=8"):
        books(config, 2.0**-6, pydocs, 8, options, records=(9,))


def test_the_shares_are_stacked_to_the_fall(booked):
    figure = learning_shares(booked)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [f"{name}, width {width}, LR 2^-6.0" for name in ("sp", "mup") for width in (32, 64)]
    axes = figure.axes[3]
    own = booked[(booked.parametrization == "mup") & (booked.width == 64)]
    total = own.groupby(["seed", "step"]).allocation.sum().groupby("step").mean().sum()
    tops = [collection.get_paths()[0].vertices[:, 1].max() for collection in axes.collections[: own.role.nunique()]]
    lowest = [collection.get_paths()[0].vertices[:, 1].min() for collection in axes.collections[: own.role.nunique()]]
    assert max(tops) + min(0, *lowest) == pytest.approx(total, rel=1e-6)
    assert axes.lines[0].get_ydata()[-1] == pytest.approx(own.groupby(["seed", "step"]).fall.first().groupby("seed").sum().mean())
    with pytest.raises(ValueError, match="has no rows"):
        learning_shares(booked[:0])


def test_promise_and_fall_draws_the_three_sums(booked):
    figure = promise_and_fall(booked)
    sp = booked[booked.parametrization == "sp"].groupby(["width", "seed"])
    curves = {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}
    drawn = [container.lines[0].get_ydata() for container in figure.axes[0].containers]
    assert not curves
    assert drawn[0] == pytest.approx(sp.left.sum().groupby("width").mean().to_numpy())
    assert drawn[1] == pytest.approx(sp.trapezoid.sum().groupby("width").mean().to_numpy())
    assert figure.axes[0].get_ylabel() == "nats, after 6 steps at LR 2^-6"
    with pytest.raises(ValueError, match="must be one LR for all"):
        promise_and_fall(booked.assign(lr=np.linspace(0.1, 1, len(booked))))
