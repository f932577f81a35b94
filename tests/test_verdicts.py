"""Verdicts: exponents from frames made by hand, and every wrong cell named by the check."""

import math

import numpy as np
import pandas as pd
import pytest

from minimoe import PARAMETRIZATIONS, Config, coordinate_check, exponents, fan_in, mystery, predicted_exponents, suspects, width
from minimoe.coordinates import LOSS
from minimoe.diagnoses import diagnosis
from minimoe.identity import tensor_numbers
from minimoe.mutations import caught_by, is_harmless, mutants
from minimoe.theory import NONE, TOLERANCE, site_labels
from minimoe.verdicts import BROKEN

TINY = {"widths": (32, 64), "steps": 2, "seeds": (0,), "n_jobs": 1, "context": 16, "n_experts": 4}
MUP = PARAMETRIZATIONS["mup"]
FIXED = PARAMETRIZATIONS["simplep"].replace("router", lr=1 / fan_in)


@pytest.fixture(scope="module")
def tables(pydocs):
    """The exponents at moderate widths: what each parametrization does to each tensor."""
    frame = coordinate_check(["sp", "simplep", "mup", FIXED], widths=(64, 128, 256), steps=4, seeds=(0, 1, 2), corpus=pydocs)
    return dict(list(exponents(frame).groupby("parametrization")))


def measured(table, tensor, quantity):
    return table[(table.tensor == tensor) & (table.quantity == quantity)].measured.to_numpy()


def test_suspects_name_what_is_wrong_with_the_published_tables(tables):
    found = {name: suspects(table) for name, table in tables.items()}
    assert found["mup"].empty
    assert found[FIXED.name].empty
    assert found["simplep"][["role", "cell"]].to_numpy().tolist() == [["router", "lr"]]
    assert dict(zip(found["sp"].role, found["sp"].cell, strict=True)) == {
        **dict.fromkeys(("attention", "experts_up", "experts_down", "router"), "lr"),
        "unembedding": "init_var and lr",  # its std n^-1/2, which the allocations of all others feel, and its LR
    }
    assert found["sp"].power.to_numpy() == pytest.approx(np.ones(5), abs=TOLERANCE)


WRONG = {f"{role}.{cell} x n^{power:+g}": (role, cell, power, mutant) for role, cell, power, mutant in mutants()}
SEEN_LATE = "router.init_var x n^+1"  # a router of std n^-1/2: in the first steps its init and update are constant


@pytest.fixture(scope="module")
def mutants_frame(pydocs):
    tables = [mutant for *_, mutant in WRONG.values()]
    return coordinate_check(tables, widths=(64, 128, 256), steps=4, seeds=(0, 1), corpus=pydocs)


@pytest.mark.parametrize("name", WRONG)
def test_every_wrong_cell_is_caught(name, mutants_frame):
    role, cell, power, mutant = WRONG[name]
    assert tensor_numbers(Config(mutant, width=256)) != tensor_numbers(Config(width=256))  # else it is no mutant
    frame = mutants_frame[mutants_frame.parametrization == mutant.name]
    own = exponents(frame)
    blamed = suspects(own)
    if name == SEEN_LATE or is_harmless(role, cell, power):
        assert caught_by(own) == ()
        assert diagnosis(own) == {mutant.name: "every init, update and allocation keeps muP's desiderata."}
        against_mup = exponents(frame, expected=predicted_exponents(Config("mup")))
        assert not against_mup[(own.role == role) & (against_mup.agrees == False)].empty  # noqa: E712 (missing values)
        return
    assert caught_by(own)
    assert set(own.verdict) <= {"explodes", "shrinks", "holds", "unclear", "unjudged", "zero"}
    found = blamed.set_index("role")
    assert blamed.iloc[0][["role", "cell"]].tolist() == [role, cell]  # the first suspect is the culprit
    assert found.power[role] == pytest.approx(power, abs=TOLERANCE)
    size = f"width^{blamed.iloc[0].power:+.2f}"
    assert diagnosis(own)[mutant.name].startswith(f"{role}.{cell} is too large by {size}")


def test_what_only_the_allocation_sees(mutants_frame):
    """A head of std n^-1/2: every init and every update is as muP wants it."""
    *_, mutant = WRONG["unembedding.init_var x n^+1"]
    table = exponents(mutants_frame[mutants_frame.parametrization == mutant.name])
    assert caught_by(table) == ("allocation",)
    rows = table[table.quantity == "allocation"].groupby("tensor").measured.mean()
    assert rows[["embedding", "q", "k", "v", "o"]].to_numpy() == pytest.approx(np.full(5, 0.5), abs=0.15)
    assert rows["logits"] == pytest.approx(0, abs=0.1)
    (propagated,) = table[(table.tensor == "logits") & (table.quantity == "propagated")].itertuples()
    assert propagated.verdict == "unjudged"  # a blend of independent and aligned sums: +0.2 here, where theory has +1/2
    assert "the gradients that pass through it" in diagnosis(table)[mutant.name]


def test_the_lazy_regime_is_caught_by_its_updates(pydocs):
    """The same head, with hidden LRs smaller by the root of the width: the body learns as much as the head, and moves less
    and less. In the limit its features stay as they were at init."""
    lazy = MUP.replace("unembedding", "lazy", init_var=fan_in).replace("embedding", "lazy", lr=1 / width**0.5)
    for role in ("attention", "experts_up", "experts_down"):
        lazy = lazy.replace(role, "lazy", lr=1 / fan_in**1.5)
    table = exponents(coordinate_check(lazy, (64, 128, 256), 3, (0, 1), corpus=pydocs))
    body = table[table.tensor.isin(("embedding", "q", "k", "v", "o", "up", "down"))]
    assert set(body[body.quantity == "allocation"].verdict) == {"holds"}
    assert set(body[body.quantity == "update"].verdict) == {"shrinks"}
    assert caught_by(table) == ("update",)
    assert set(suspects(table).cell) == {"lr"}


def test_mutants_are_all_cells_in_both_directions_and_mysteries_are_wrong_by_a_whole_power():
    cells = [(role, cell, power) for role, cell, power, _ in mutants()]
    assert len(set(cells)) == len(cells) == 36
    assert {abs(power) for _, cell, power in cells if cell != "init_var"} == {0.5}
    harmless = [("unembedding", "init_var", -1), ("router", "init_var", -1)]
    assert [cell for cell in cells if is_harmless(*cell)] == harmless
    found = {mystery(number) for number in range(40)}
    assert len({table.rules for table in found}) == 16
    for table in found:
        (wrong,) = ((role, cell) for role in MUP.roles for cell in ("init_var", "multiplier", "lr")
                    if getattr(table[role], cell) != getattr(MUP[role], cell))  # fmt: skip
        assert not is_harmless(*wrong, -1) or not getattr(table[wrong[0]], wrong[1]).powers
    assert mystery(3) == mystery(3)


def test_every_mystery_names_itself(pydocs):
    tables = [mystery(number) for number in range(16)]
    table = exponents(coordinate_check(tables, (64, 128), 2, (0, 1), corpus=pydocs))
    for hidden in tables:
        (wrong,) = ([role, cell] for role in MUP.roles for cell in ("init_var", "multiplier", "lr")
                    if getattr(hidden[role], cell) != getattr(MUP[role], cell))  # fmt: skip
        blamed = suspects(table[table.parametrization == hidden.name])
        assert blamed.iloc[0][["role", "cell"]].tolist() == wrong, (hidden, blamed)


def test_a_zero_has_no_slope_and_says_so(corpus):
    silent = MUP.replace("unembedding", init_var=0)
    table = exponents(coordinate_check(silent, corpus=corpus, **TINY))
    row = table[(table.tensor == "logits") & (table.quantity == "init")].iloc[0]
    assert row.verdict == "zero"
    assert math.isnan(row.measured)


def test_a_run_that_diverged_is_no_clean_bill_of_health(corpus):
    table = exponents(coordinate_check("mup", corpus=corpus, lr=1e30, **TINY))
    assert diagnosis(table) == {"mup": "the run diverged: lower the LR."}
    assert suspects(table).empty
    assert set(table[table.quantity == "update"].verdict) & {"explodes"}


def test_many_experts_and_top_1_do_not_condemn_mup(corpus):
    renormalized, forced = {"gates": "renormalized"}, {"forced_balance": True}
    for fields in ({"n_experts": 32}, {"top_k": 1}, renormalized, {"activation": "swiglu"}, forced):
        frame = coordinate_check("mup", (32, 64, 128), 1, (0, 1), corpus=corpus, n_jobs=2, context=16, **fields)
        table = exponents(frame)
        assert table[table.verdict.isin(BROKEN)].empty, fields
        assert diagnosis(table)["mup"].startswith("every init"), fields


def about(tensor):
    """What our model says of a site of this name."""
    return next(label for (_, name), label in site_labels(Config()).items() if name == tensor)


def synthetic(slopes, widths=(64, 128, 256), seeds=(0, 1)):
    rows = [
        {"parametrization": "t", "width": w, "seed": s, "step": step, "layer": 0, "tensor": tensor, "quantity": quantity,
         "value": (1 + 0.01 * s) * w**slope, "alignment": 0.5, "predicted": 0.0, **about(tensor)}
        for (tensor, quantity), slope in slopes.items()
        for w in widths for s in seeds for step in ([0] if quantity == "init" else [1, 2])
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_slopes_errors_and_verdicts_of_known_powers():
    slopes = {
        ("q", "init"): 0.5,
        ("q", "update"): -0.1,
        ("router", "init"): -0.5,
        ("router", "update"): -0.5,
        ("up", "propagated"): 3,
    }
    table = exponents(synthetic(slopes)).set_index(["tensor", "quantity"])
    for key, slope in slopes.items():
        assert table.measured[key] == pytest.approx(slope, abs=1e-9)
    assert table.verdict.to_dict() == {
        ("q", "init"): "explodes",
        ("q", "update"): "holds",
        ("router", "init"): "holds",  # output-type: may shrink
        ("router", "update"): "shrinks",
        ("up", "propagated"): "unjudged",
    }
    assert table.agrees["q", "update"]
    assert not table.agrees["q", "init"]
    x = np.log2(np.repeat([64, 128, 256], 2))  # the textbook standard error of a slope
    y = np.tile(np.log2([1, 1.01]), 3)
    residual = y - y.mean()
    assert table.stderr["q", "init"] == pytest.approx(math.sqrt((residual**2).sum() / 4 / ((x - x.mean()) ** 2).sum()))


def booked(total, fall, widths=(64, 128, 256)):
    """The rows of the sum of the allocations and of the true fall, of one seed."""
    rows = [
        {"parametrization": "t", "width": w, "seed": 0, "step": 1, "layer": -1, "tensor": LOSS, "quantity": quantity,
         "value": value, "alignment": math.nan, "predicted": math.nan, **about("moe")}
        for w in widths for quantity, value in (("allocation", total(w)), ("fall", fall(w)))
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("total", "fall", "why"),
    [
        (lambda w: 1.05, lambda w: 1.0, None),
        (lambda w: 1.0 if w < 256 else 1.4, lambda w: 1.0, "at width 256 the allocations add up to 1.40 of the loss's fall"),
        (lambda w: 2e-6, lambda w: 1e-6, "the loss hardly moves: raise the LR, or lower Adam's eps"),
        (lambda w: math.nan, lambda w: math.nan, "the run diverged"),
    ],
)
def test_a_verdict_is_withheld_where_the_books_do_not_close(total, fall, why):
    slopes = {("q", "init"): 0.0, ("q", "update"): 0.0, ("q", "allocation"): 0.5}
    frame = pd.concat([synthetic(slopes, seeds=(0,)).query("step < 2"), booked(total, fall)])
    table = exponents(frame)
    row = table[(table.tensor == "q") & (table.quantity == "allocation")].iloc[0]
    assert row.verdict == ("withheld" if why else "explodes")
    assert row.why.startswith(why or NONE)
    assert row.measured == pytest.approx(0.5)
    if why:
        assert suspects(table).empty
        assert why in diagnosis(table)["t"]


def test_an_allocation_that_bends_back_or_scatters_is_not_condemned():
    pure = exponents(synthetic({("q", "update"): 0.0, ("q", "allocation"): -0.5}))
    assert pure.set_index("quantity").verdict["allocation"] == "shrinks"
    bent = synthetic({("q", "update"): 0.0, ("q", "allocation"): 0.0})
    allocated = bent.quantity == "allocation"
    settling = bent.assign(value=bent.value.where(~allocated | (bent.width > 64), 4.0))
    assert exponents(settling).set_index("quantity").verdict["allocation"] == "unclear"
    noisy = bent.assign(value=bent.value.where(~allocated, 2.0 ** (2 * (bent.seed == 0) * (bent.width / 128 - 1.5))))
    assert exponents(noisy).set_index("quantity").verdict["allocation"] in ("unclear", "holds")
    hurting = bent.assign(value=bent.value.where(~allocated, -bent.value))
    row = exponents(hurting).set_index("quantity").loc["allocation"]
    assert (row.verdict, math.isnan(row.measured)) == ("negative", True)


def test_output_type_tensors_may_shrink_at_init_but_not_grow():
    for tensor in ("router", "logits"):
        table = exponents(synthetic({(tensor, "init"): 0.5, (tensor, "update"): 0.0}))
        assert table.verdict.tolist() == ["explodes", "holds"]


def test_bad_frames(corpus):
    frame = synthetic({("q", "init"): 0.5, ("q", "update"): 0.5})
    with pytest.raises(ValueError, match="needs at least two"):
        exponents(frame[frame.width == 64])
    with pytest.raises(ValueError, match="step=3: the frame has the steps 1, 2"):
        exponents(frame, step=3)
    with pytest.raises(ValueError, match="the frame has no rows"):
        exponents(frame.head(0))


def test_a_model_with_other_names_is_judged_by_its_own():
    """Nothing here lists names: a made-up model's sites are blamed under its own roles."""
    sites = {"lookup": ("tables", "input", NONE), "lift": ("lifts", "hidden", NONE), "sink": ("sinks", "hidden", "lift"),
             "vote": ("votes", "output", NONE)}  # fmt: skip
    slopes = {"lookup": (0, 0), "lift": (0.5, 0), "sink": (0.5, 0.5), "vote": (-0.5, 1)}
    rows = []
    for place, (tensor, (role, kind, source)) in enumerate(sites.items()):
        for quantity, slope in zip(("init", "update"), slopes[tensor], strict=True):
            rows += [
                {"parametrization": "t", "width": w, "seed": s, "step": int(quantity == "update"), "layer": 0, "tensor": tensor,
                 "quantity": quantity, "value": float(w) ** slope, "alignment": 1.0, "predicted": math.nan, "role": role,
                 "kind": kind, "source": source, "degree": 1, "mixture": NONE, "place": place}
                for w in (64, 128) for s in (0, 1)
            ]  # fmt: skip
    table = exponents(pd.DataFrame(rows))
    assert table.tensor.drop_duplicates().tolist() == list(sites)
    assert suspects(table)[["role", "cell"]].to_numpy().tolist() == [["lifts", "init_var"], ["votes", "lr"]]
    assert "votes.lr is too large by width^+1.00" in diagnosis(table)["t"]


def test_a_row_of_its_own_is_blamed_by_its_own_name(corpus):
    wrong = MUP.replace("attention_out", lr=1)
    frame = coordinate_check(wrong, **TINY | {"widths": (32, 64, 128)}, corpus=corpus)
    assert suspects(exponents(frame)).iloc[0][["role", "cell"]].tolist() == ["attention_out", "lr"]
    assert set(exponents(frame).role) == {NONE, *wrong.roles}


def test_a_check_is_read_from_a_csv_file_as_it_was(tmp_path, corpus):
    frame = coordinate_check("simplep", **TINY | {"widths": (32, 64, 128)}, corpus=corpus)
    frame.to_csv(tmp_path / "check.csv", index=False)
    pd.testing.assert_frame_equal(exponents(pd.read_csv(tmp_path / "check.csv")), exponents(frame))


def test_a_router_alone_does_not_blame_the_head():
    """Over the granularity a router's allocation grows, of which nothing is predicted; the head is as it should be."""
    sizes = {"widths": 64, "granularity": (2, 4, 8, 16), "n_experts": 1, "top_k": 1, "expert_ratio": 4}
    base = {"base_width": 64, "base_n_experts": 1, "base_top_k": 1, "base_granularity": 1, "base_expert_ratio": 4}
    fields = {"gates": "renormalized sigmoid", "balance_weight": 0.0}
    frame = coordinate_check("complete-mue", steps=3, seeds=(0, 1), corpus="pydocs", **sizes, **base, **fields)
    table = exponents(frame)
    assert "explodes" in set(table[table.tensor == "router"].verdict)
    assert suspects(table).empty
