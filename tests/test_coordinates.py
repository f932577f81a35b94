"""The coordinate check: what must come out, on every axis."""

import numpy as np
import pandas as pd
import pytest

from minimoe import PARAMETRIZATIONS, Config, coordinate_check, coordinate_curves, exponents, fan_in, suspects
from minimoe.arms import ARMS
from minimoe.coordinates import LOSS
from minimoe.diagnoses import diagnosis
from minimoe.parametrization import depth
from minimoe.probe import OUTSIDE, sites
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
        mixture = 0 if name == "mup" else 2  # its gates flatten with the width, so nothing is predicted of the MoE's output
        assert len(predicted) == 2 * 3 + 2 * (7 * 3 + 2 + mixture)  # per layer 7 weights, scores and residual, init and update
        surely = predicted[(predicted.quantity != "allocation") | (predicted.role != "router")]
        surely = surely[(surely.quantity != "allocation") | (name != "sp")]  # which leaves the first order at width 256
        assert surely.agrees.all(), surely[~surely.agrees]


def test_every_weights_share_of_the_learning(tables):
    """Each against the reference's slopes, of widths to 512; a router's gradient is scattered, and the errors are larger."""
    wanted = {
        "mup": {"embedding": 0.0, "v": 0.0, "o": 0.0, "up": -0.2, "down": -0.2, "router": -0.5, "logits": 0.0},
        "simplep": {"embedding": 0.0, "v": 0.0, "o": 0.0, "up": 0.0, "down": 0.0, "router": 0.5, "logits": 0.0},
        "sp": {"embedding": 0.4, "v": 1.3, "o": 1.3, "up": 1.3, "down": 1.3, "router": 1.0, "logits": 0.9},
    }
    for name, slopes in wanted.items():
        rows = tables[name][tables[name].quantity == "allocation"].groupby("tensor").measured.mean()
        for tensor, slope in slopes.items():
            assert rows[tensor] == pytest.approx(slope, abs=0.4 if tensor == "router" else 0.2), (name, tensor)
        assert tables[name].closure.dropna().to_numpy() == pytest.approx(1, abs=0.08)
        booked = tables[name][tables[name].tensor == LOSS].set_index("quantity").measured
        assert booked["allocation"] == pytest.approx(booked["fall"], abs=0.05)


def test_mup_holds_everywhere(tables):
    table = tables["mup"]
    judged = table[table.verdict != "unjudged"]
    assert set(judged.verdict) <= {"holds", "zero", "unclear"}
    assert {"holds"} == set(judged[judged.quantity != "allocation"].verdict) - {"zero"}
    assert np.abs(measured(table, "router", "update")).max() <= TOLERANCE
    assert measured(table, "router", "init") == pytest.approx([-0.5, -0.5], abs=0.15)
    assert measured(table, "logits", "init") == pytest.approx([-0.5], abs=0.1)


def test_sp_updates_grow(tables):
    table = tables["sp"]
    grown = set(table[(table.quantity == "update") & (table.verdict == "explodes")].tensor)
    assert grown == set(table.tensor[table.role != NONE]) - {"embedding"} | {"moe"}
    assert set(table[table.quantity == "init"].verdict) == {"holds"}


def test_simplep_grows_in_the_router_alone_and_a_smaller_lr_mends_it(tables):
    table = tables["simplep"]
    broken = table[table.verdict.isin(("explodes", "shrinks"))]
    assert ("router", "update") in set(zip(broken.tensor, broken.quantity, strict=True))
    assert set(zip(broken.tensor, broken.quantity, strict=True)) <= {("router", "update"), ("router", "allocation")}
    assert measured(table, "router", "update") == pytest.approx([1, 1], abs=TOLERANCE)
    assert set(tables[FIXED.name].verdict) <= {"holds", "unjudged", "zero", "unclear"}


def test_the_sum_would_misjudge_the_router(tables):
    """What other tools show lies between update and propagated part, and reads like neither."""
    for name in ("mup", "simplep"):
        propagated, change, update = (measured(tables[name], "router", q) for q in ("propagated", "change", "update"))
        assert (propagated < change).all()
        assert (change < update + 0.02).all()


def test_over_granularity_the_moe_does_as_predicted(pydocs):
    """Init variance and LR by the width and a route scale of K: constant; by fan_in: the init shrinks, the update does not."""
    names = ("authors", "route K", "down by fan_in")
    tables = [ARMS[name].table for name in names]
    sizes = {"widths": 64, "granularity": (1, 2, 4, 8), "base_width": 16, "base_granularity": 1}
    frame = coordinate_check(tables, **sizes, steps=2, seeds=(0, 1), corpus=pydocs)
    assert frame.groupby("parametrization").granularity.nunique().tolist() == [4] * 3
    table = exponents(frame)
    table = table[table.layer == 0]
    known = table[table.predicted.notna()]
    assert known.agrees.all(), known[~known.agrees]
    judged = table.set_index(["parametrization", "tensor", "quantity"]).verdict
    for name, verdicts in zip(names, (["shrinks"] * 3, ["holds"] * 3, ["shrinks", "shrinks", "holds"]), strict=True):
        found = [judged[ARMS[name].table.name, *key] for key in (("moe", "init"), ("up", "allocation"), ("down", "allocation"))]
        assert found == verdicts, name


def test_one_size_grows_at_a_time(corpus):
    with pytest.raises(ValueError, match="both width and granularity have several values: let one"):
        coordinate_check("mup", corpus=corpus, **TINY | {"granularity": (1, 2)})


def test_forced_routing_goes_round(corpus):
    frame = coordinate_check("mup", corpus=corpus, routing="forced", **TINY)
    assert set(frame.tensor) == {*TENSORS, LOSS}


def test_frame_is_tidy_and_repeats(corpus):
    frame = coordinate_check(["mup", "sp"], corpus=corpus, **TINY)
    sizes = ["width", "depth", "n_experts", "top_k", "granularity", "expert_ratio", "batch_size"]
    labels = ["parametrization", *sizes, "seed", "step", "layer", "tensor", "quantity"]
    about = ["role", "kind", "source", "degree", "mixture", "place"]
    assert list(frame.columns) == [*labels, "value", "alignment", "predicted", *about]
    assert not frame.duplicated(labels).any()
    assert set(frame[frame.step == 0].quantity) == {"init"}
    again = coordinate_check(["mup", "sp"], corpus=corpus, **TINY | {"n_jobs": 2})
    pd.testing.assert_frame_equal(frame, again)  # in any number of processes


def test_a_dense_model_has_no_router(corpus):
    frame = coordinate_check("mup", corpus=corpus, **TINY | {"n_experts": 1, "top_k": 1})
    assert {*TENSORS, LOSS} - set(frame.tensor) == {"router"}
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


@pytest.mark.parametrize(("name", "sizes"), [("n_experts", (4, 8)), ("batch_size", (4, 8))])
def test_any_other_size_can_grow_without_a_prediction(name, sizes, corpus):
    frame = coordinate_check("mup", corpus=corpus, **TINY | {"widths": None, name: sizes})
    table = exponents(frame)
    assert frame.predicted.isna().all()
    assert set(frame[name]) == set(sizes)
    assert set(frame.width) == {64}  # the default beside another size
    assert table[table.quantity == "init"].measured.notna().all()
    assert diagnosis(table, name).keys() == {"mup"}


def _scaled(name, alpha, lr=0.0):
    """muP with its branches times L^-alpha, and L^-lr on the LRs of all but the router."""
    table = PARAMETRIZATIONS["mup"]
    for role in ("attention_out", "experts_down"):
        table = table.replace(role, name, multiplier=1 / depth**alpha)
    for role in ("attention", "attention_out", "experts_up", "experts_down"):
        table = table.replace(role, name, lr=1 / fan_in / depth**lr)
    return table


def test_over_the_depth_the_one_row_that_lacks_its_factor_is_named(pydocs):
    tables = [PARAMETRIZATIONS["mup"], _scaled("alpha 1/2", 0.5, 0.5), _scaled("alpha 1", 1.0)]
    frame = coordinate_check(tables, 64, 3, (0, 1), corpus=pydocs, depth=(2, 4, 8, 16))
    table = exponents(frame)
    assert set(frame.depth) == {2, 4, 8, 16}
    sums = table[table.layer == "sum"]
    slopes = sums[sums.quantity == "allocation"].pivot(index="parametrization", columns="tensor", values="measured")
    assert slopes.loc["mup", ["v", "o", "router", "up", "down"]].min() > 0.5
    assert slopes.loc["alpha 1/2", "router"] == pytest.approx(0.5, abs=0.2)
    assert slopes.loc["alpha 1/2", ["v", "o", "up", "down"]].to_numpy(float) == pytest.approx(np.zeros(4), abs=0.2)
    assert slopes.loc["alpha 1"].abs().max() < 0.3
    known = table[(table.parametrization != "mup") & (table.quantity == "allocation") & table.predicted.notna()]
    assert set(known.layer) == {OUTSIDE, "first", "last", "sum"}
    assert known[known.layer.isin((OUTSIDE, "sum"))].agrees.mean() > 0.8
    said = diagnosis(table, "depth")
    assert said["alpha 1/2"].startswith("router.lr is too large by depth^+0.")
    assert said["alpha 1"] == "every init, update and allocation keeps muP's desiderata."
    assert {"attention", "router", "experts_up", "experts_down"} <= set(suspects(table).query("parametrization == 'mup'").role)
    coordinate_curves(frame, layer="sum")


def test_several_sizes_can_grow_together(corpus):
    small = TINY | {"widths": None}
    path = {"width": (32, 64, 128), "n_experts": (4, 8, 16)}
    frame = coordinate_check("mup", corpus=corpus, **{k: v for k, v in small.items() if k != "n_experts"}, path=path)
    assert frame[["width", "n_experts"]].drop_duplicates().to_numpy().tolist() == [[32, 4], [64, 8], [128, 16]]
    assert frame.predicted.isna().all()  # which tokens an expert gets follows no power
    assert set(exponents(frame).predicted.isna()) == {True}
    deep = coordinate_check("mup", corpus=corpus, **small, path={"width": (32, 64), "depth": (1, 2)})
    table = exponents(deep)
    assert set(table.layer) == {OUTSIDE, "first", "last", "sum"}
    (logits,) = table[(table.tensor == "logits") & (table.quantity == "init")].itertuples()
    assert logits.predicted == -0.5  # against the width, the first of SIZES that grows
    (update,) = table[(table.tensor == "v") & (table.quantity == "update") & (table.layer == "sum")].itertuples()
    assert update.predicted == 1  # each layer's is constant, and their number grows like the width


def test_the_routers_law_is_the_one_that_applies(corpus):
    """A few small steps: its experts are as they were at init. Large ones: they have learned."""
    sizes = TINY | {"widths": (32, 64), "gates": "renormalized"}
    for lr, law in ((2.0**-13, -0.5), (2.0**-4, 0.0)):
        frame = coordinate_check("mup", corpus=corpus, lr=lr, **sizes)
        rows = frame[(frame.tensor == "router") & (frame.quantity == "allocation") & (frame.step == 2)]
        assert set(rows.predicted) == {law}


def test_a_field_can_follow_the_size_that_grows(corpus):
    frame = coordinate_check("mup", corpus=corpus, **TINY | {"widths": 32, "granularity": (1, 2), "balance_weight": _k_times})
    plain = coordinate_check("mup", corpus=corpus, **TINY | {"widths": 32, "granularity": (1, 2)})
    assert not frame.value.equals(plain.value)


def _k_times(size):
    return 10.0 * size.top_k * size.granularity
