"""Verdicts: exponents from frames made by hand, and every wrong cell named by the check."""

import math

import numpy as np
import pandas as pd
import pytest

from minimoe import PARAMETRIZATIONS, Config, coordinate_check, exponents, fan_in, mystery, predicted_exponents, suspects
from minimoe.diagnoses import diagnosis
from minimoe.identity import tensor_numbers
from minimoe.mutations import is_harmless, mutants
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
    assert set(found["sp"].cell) == {"lr"}
    assert set(found["sp"].role) == set(MUP.roles) - {"embedding"}
    assert found["sp"].power.to_numpy() == pytest.approx(np.ones(5), abs=TOLERANCE)


@pytest.fixture(scope="module")
def mutants_frame(pydocs):
    tables = [mutant for _, _, mutant in mutants()]
    return coordinate_check(tables, widths=(64, 128, 256), steps=4, seeds=(0, 1), corpus=pydocs)


@pytest.mark.parametrize(("role", "cell", "mutant"), list(mutants()), ids=lambda value: value if isinstance(value, str) else "")
def test_every_wrong_cell_is_caught(role, cell, mutant, mutants_frame):
    assert tensor_numbers(Config(mutant, width=256)) != tensor_numbers(Config(width=256))  # else it is no mutant
    frame = mutants_frame[mutants_frame.parametrization == mutant.name]
    own = exponents(frame)
    against_mup = exponents(frame, expected=predicted_exponents(Config("mup")))
    of_role = own.role == role
    condemned = own[of_role & own.verdict.isin(BROKEN)]
    assert not against_mup[of_role & (against_mup.agrees == False)].empty  # noqa: E712 (missing values)
    blamed = suspects(own)
    if is_harmless(role, cell):  # smaller than need be
        assert condemned.empty
        assert blamed.empty
    else:
        assert not condemned.empty
        assert blamed.iloc[0][["role", "cell"]].tolist() == [role, cell]  # the first suspect is the culprit
        assert diagnosis(own)[mutant.name].startswith(f"{role}.{cell} is too large by width^")


def test_mutants_are_all_cells_and_mysteries_are_mutants():
    cells = [(role, cell) for role, cell, _ in mutants()]
    assert len(set(cells)) == len(cells) == 18
    assert [cell for cell in cells if is_harmless(*cell)] == [("unembedding", "init_var"), ("router", "init_var")]
    rules = {mutant.rules for role, cell, mutant in mutants() if not is_harmless(role, cell)}
    assert {mystery(number).rules for number in range(16)} == rules
    assert mystery(3) == mystery(3)


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
    for fields in ({"n_experts": 32}, {"top_k": 1}, {"renormalize": True}, {"activation": "swiglu"}, {"forced_balance": True}):
        frame = coordinate_check("mup", (32, 64, 128), 1, (0, 1), corpus=corpus, n_jobs=2, context=16, **fields)
        assert diagnosis(exponents(frame)) == {"mup": "every init and every update keeps muP's desiderata."}, fields


def about(tensor):
    """What our model says of a site of this name."""
    return next(label for (_, name), label in site_labels(Config()).items() if name == tensor)


def synthetic(slopes, widths=(64, 128, 256), seeds=(0, 1)):
    rows = [
        {"parametrization": "t", "width": w, "seed": s, "step": step, "layer": 0, "tensor": tensor, "quantity": quantity,
         "rms": (1 + 0.01 * s) * w**slope, "alignment": 0.5, "predicted": 0.0, **about(tensor)}
        for (tensor, quantity), slope in slopes.items()
        for w in widths for s in seeds for step in ([0] if quantity == "init" else [1, 2])
    ]  # fmt: skip
    return pd.DataFrame(rows)


def test_slopes_errors_and_verdicts_of_known_powers():
    slopes = {("q", "init"): 0.5, ("q", "update"): -0.1, ("router", "init"): -0.5, ("router", "update"): -0.5, ("up", "drift"): 3}
    table = exponents(synthetic(slopes)).set_index(["tensor", "quantity"])
    for key, slope in slopes.items():
        assert table.measured[key] == pytest.approx(slope, abs=1e-9)
    assert table.verdict.to_dict() == {
        ("q", "init"): "explodes",
        ("q", "update"): "holds",
        ("router", "init"): "holds",  # output-type: may shrink
        ("router", "update"): "shrinks",
        ("up", "drift"): "unjudged",
    }
    assert table.agrees["q", "update"]
    assert not table.agrees["q", "init"]
    x = np.log2(np.repeat([64, 128, 256], 2))  # the textbook standard error of a slope
    y = np.tile(np.log2([1, 1.01]), 3)
    residual = y - y.mean()
    assert table.stderr["q", "init"] == pytest.approx(math.sqrt((residual**2).sum() / 4 / ((x - x.mean()) ** 2).sum()))


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
                 "quantity": quantity, "rms": float(w) ** slope, "alignment": 1.0, "predicted": math.nan, "role": role,
                 "kind": kind, "source": source, "degree": 1, "place": place}
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
