"""The coordinate check: what must come out, on every axis."""

import numpy as np
import pandas as pd
import pytest

from minimoe import PARAMETRIZATIONS, Config, coordinate_check, coordinate_curves, exponents, fan_in
from minimoe.arms import ARMS
from minimoe.diagnoses import diagnosis
from minimoe.probe import sites
from minimoe.theory import NONE, TOLERANCE

TINY = {"widths": (32, 64), "steps": 2, "seeds": (0,), "n_jobs": 1, "context": 16, "n_experts": 4}
FIXED = PARAMETRIZATIONS["simplep"].replace("router", lr=1 / fan_in)
TENSORS = [site.name for site in sites(Config(depth=1))]


@pytest.fixture(scope="module")
def tables(pydocs):
    """The exponents at moderate widths: what each parametrization does to each tensor."""
    frame = coordinate_check(["sp", "simplep", "mup", FIXED], widths=(64, 128, 256), steps=4, seeds=(0, 1, 2), corpus=pydocs)
    return dict(list(exponents(frame).groupby("parametrization")))


def measured(table, tensor, quantity):
    return table[(table.tensor == tensor) & (table.quantity == quantity)].measured.to_numpy()


def test_theory_describes_every_weight_of_every_parametrization(tables):
    for name, table in tables.items():
        predicted = table[table.predicted.notna()]
        gates_change = name == "mup"  # they flatten with the width, so nothing is predicted of the MoE's output
        assert len(predicted) == 4 + 2 * (14 + 5 - 3 * gates_change)  # per layer 7 weights, 3 activations, 2 parts
        assert predicted.agrees.all(), predicted[~predicted.agrees]


def test_mup_holds_everywhere(tables):
    table = tables["mup"]
    judged = table[table.verdict != "unjudged"]
    assert set(judged.verdict) == {"holds", "zero"}
    assert np.abs(measured(table, "router", "update")).max() <= TOLERANCE
    assert measured(table, "router", "init") == pytest.approx([-0.5, -0.5], abs=0.15)
    assert measured(table, "logits", "init") == pytest.approx([-0.5], abs=0.1)


def test_sp_updates_grow(tables):
    table = tables["sp"]
    grown = set(table[(table.quantity == "update") & (table.verdict == "explodes")].tensor)
    assert grown == set(table.tensor[table.role != NONE]) - {"embedding"}
    assert set(table[table.quantity == "init"].verdict) == {"holds"}


def test_simplep_grows_in_the_router_alone_and_a_smaller_lr_mends_it(tables):
    table = tables["simplep"]
    broken = table[table.verdict.isin(("explodes", "shrinks"))]
    assert set(zip(broken.tensor, broken.quantity, strict=True)) == {("router", "update")}
    assert measured(table, "router", "update") == pytest.approx([1, 1], abs=TOLERANCE)
    assert set(tables[FIXED.name].verdict) <= {"holds", "unjudged", "zero"}


def test_the_sum_would_misjudge_the_router(tables):
    """What other tools show lies between update and drift, and reads like neither."""
    for name in ("mup", "simplep"):
        drift, change, update = (measured(tables[name], "router", q) for q in ("drift", "change", "update"))
        assert (drift < change).all()
        assert (change < update + 0.02).all()


def test_over_granularity_the_moe_does_as_predicted(pydocs):
    """Init variance and LR by the width and a route scale of K: constant; by fan_in: the init shrinks, the update does not."""
    names = ("authors", "route K", "down by fan_in")
    tables = [ARMS[name].table for name in names]
    sizes = {"widths": 64, "granularity": (1, 2, 4, 8), "base_width": 16, "base_granularity": 1}
    frame = coordinate_check(tables, **sizes, steps=2, seeds=(0, 1), corpus=pydocs)
    assert frame.groupby("parametrization").granularity.nunique().tolist() == [4] * 3
    table = exponents(frame)
    assert table[table.predicted.notna()].agrees.all()
    judged = table[(table.tensor == "moe") & (table.layer == 0)].set_index(["parametrization", "quantity"]).verdict
    for name, verdicts in zip(names, (["shrinks"] * 3, ["holds"] * 3, ["shrinks", "shrinks", "holds"]), strict=True):
        assert [judged[ARMS[name].table.name, quantity] for quantity in ("init", "from_up", "from_down")] == verdicts


def test_one_size_grows_at_a_time(corpus):
    with pytest.raises(ValueError, match="both width and granularity have several values"):
        coordinate_check("mup", corpus=corpus, **TINY | {"granularity": (1, 2)})


def test_forced_routing_goes_round(corpus):
    frame = coordinate_check("mup", corpus=corpus, routing="forced", **TINY)
    assert set(frame.tensor) == set(TENSORS)


def test_frame_is_tidy_and_repeats(corpus):
    frame = coordinate_check(["mup", "sp"], corpus=corpus, **TINY)
    sizes = ["width", "depth", "n_experts", "top_k", "granularity", "expert_ratio", "batch_size"]
    labels = ["parametrization", *sizes, "seed", "step", "layer", "tensor", "quantity"]
    about = ["role", "kind", "source", "degree", "place"]
    assert list(frame.columns) == [*labels, "rms", "alignment", "predicted", *about]
    assert not frame.duplicated(labels).any()
    assert set(frame[frame.step == 0].quantity) == {"init"}
    again = coordinate_check(["mup", "sp"], corpus=corpus, **TINY | {"n_jobs": 2})
    pd.testing.assert_frame_equal(frame, again)  # in any number of processes


def test_a_dense_model_has_no_router(corpus):
    frame = coordinate_check("mup", corpus=corpus, **TINY | {"n_experts": 1, "top_k": 1})
    assert set(TENSORS) - set(frame.tensor) == {"router"}
    coordinate_curves(frame)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"widths": (64,)}, "a slope over the width needs at least two"),
        ({"routing": "free-range"}, "routing='free-range': must be one of free, forced, frozen"),
        ({"lr": 0.0}, "lr=0.0: must be positive"),
        ({"steps": 0}, "steps=0: must be a positive integer"),
        ({"n_jobs": 0}, "n_jobs=0"),
        ({"parametrization": "ntk"}, "unknown parametrization 'ntk'"),
        ({"widths": (32, 40)}, "width=40: must be a multiple of head_size=16"),
        ({"seeds": ()}, "seeds is empty"),
    ],
)
def test_bad_input(arguments, message, corpus):
    with pytest.raises(ValueError, match=message):
        coordinate_check(**{"corpus": corpus, **TINY, **arguments})


@pytest.mark.parametrize(("name", "sizes"), [("depth", (1, 2)), ("n_experts", (4, 8)), ("batch_size", (4, 8))])
def test_any_other_size_can_grow_without_a_prediction(name, sizes, corpus):
    frame = coordinate_check("mup", corpus=corpus, **TINY | {"widths": 32, name: sizes})
    table = exponents(frame)
    assert frame.predicted.isna().all()
    assert set(frame[name]) == set(sizes)
    shared = table.layer < 1  # a second layer is in one of the depths only, and has no slope
    assert table[shared & (table.quantity == "init")].measured.notna().all()
    assert name != "depth" or set(table[~shared].verdict) == {"unjudged"}
    assert diagnosis(table).keys() == {"mup"}


def test_a_field_can_follow_the_size_that_grows(corpus):
    frame = coordinate_check("mup", corpus=corpus, **TINY | {"widths": 32, "granularity": (1, 2), "balance_weight": _k_times})
    plain = coordinate_check("mup", corpus=corpus, **TINY | {"widths": 32, "granularity": (1, 2)})
    assert not frame.rms.equals(plain.rms)


def _k_times(size):
    return 10.0 * size.top_k * size.granularity
