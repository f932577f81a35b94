"""The coordinate check: its quantities against their definitions, what must come out, and a wrong cell in every place."""

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch

from minimoe import PARAMETRIZATIONS, Config, MiniMoE, coordinate_check, coordinate_curves, exponents, fan_in, suspects, width
from minimoe.arms import ARMS
from minimoe.coordinates import (
    ALLOWED,
    OUTPUTS,
    ROLES_OF,
    TENSORS,
    TOLERANCE,
    _at_init,
    _moe_updates,
    _since,
    diagnosis,
    loss_gradients,
    mutants,
    mystery,
    observed,
    predicted_exponents,
)
from minimoe.sweeps import tensor_numbers
from minimoe.training import TextData

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
    assert grown == set(ROLES_OF) - {"embedding"}
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
    of_role = own.tensor.map(ROLES_OF.get) == role
    condemned = own[of_role & own.verdict.isin(("explodes", "shrinks"))]
    assert not against_mup[of_role & (against_mup.agrees == False)].empty  # noqa: E712 (missing values)
    blamed = suspects(own)
    if (role, cell) in ALLOWED:  # smaller than need be
        assert condemned.empty
        assert blamed.empty
    else:
        assert not condemned.empty
        assert blamed.iloc[0][["role", "cell"]].tolist() == [role, cell]  # the first suspect is the culprit
        assert diagnosis(own)[mutant.name].startswith(f"{role}.{cell} is too large by width^")


def test_mutants_are_all_cells_and_mysteries_are_mutants():
    cells = [(role, cell) for role, cell, _ in mutants()]
    assert len(set(cells)) == len(cells) == 18
    assert len(ALLOWED) == 2
    rules = {mutant.rules for role, cell, mutant in mutants() if (role, cell) not in ALLOWED}
    assert {mystery(number).rules for number in range(16)} == rules
    assert mystery(3) == mystery(3)


def test_quantities_are_what_they_are_called(corpus):
    """Against the model's own outputs: what the split says must add up to what the forward pass does."""
    torch.manual_seed(0)
    start = MiniMoE(Config(width=32, depth=1, vocab_size=corpus.vocab_size, seed=0))
    now = MiniMoE(Config(width=32, depth=1, vocab_size=corpus.vocab_size, seed=0))
    with torch.no_grad():
        for param in now.parameters():
            param.add_(0.02 * torch.randn_like(param))
    tokens = torch.from_numpy(np.ascontiguousarray(corpus.val[: 8 * 16])).long().view(8, 16)
    seen, gradients = [observed(model, tokens) for model in (start, now)], [torch.ones(8 * 16, 32)]
    at_init = {(r["tensor"], r["quantity"]): r["rms"] for r in _at_init(seen[0])}
    since = {(r["tensor"], r["quantity"]): r["rms"] for r in _since(*seen, gradients)}
    alignment = {r["tensor"]: r["alignment"] for r in _since(*seen, gradients) if r["quantity"] == "update"}

    def rms(x):
        return x.square().mean().sqrt().item()

    before, after = start(tokens), now(tokens)
    assert at_init["logits", "init"] == pytest.approx(rms(before.logits), rel=1e-5)
    assert at_init["router", "init"] == pytest.approx(rms(before.router_logits), rel=1e-5)
    assert since["logits", "change"] == pytest.approx(rms(after.logits - before.logits), rel=1e-4)
    assert since["router", "change"] == pytest.approx(rms(after.router_logits - before.router_logits), rel=1e-4)
    assert "embedding" in alignment
    assert since["embedding", "drift"] == 0
    assert since["embedding", "change"] == since["embedding", "update"]
    assert all(0 < value <= 1 for value in alignment.values())
    # an expert's outputs, token by token
    moe0, moe = start.blocks[0].moe, now.blocks[0].moe
    x0, x = (s.inputs[0, "up"] for s in seen)
    ups, downs = [], []
    for token, experts in enumerate(seen[1].experts[0]):
        for e in experts:
            h0, h = torch.relu(x0[token] @ moe0.up[e]), torch.relu(x[token] @ moe.up[e])
            ups.append(x[token] @ (moe.up[e] - moe0.up[e]))
            downs.append((h - h0) @ moe0.down[e])
    assert since["up", "update"] == pytest.approx(rms(torch.stack(ups)), rel=1e-5)
    assert since["down", "drift"] == pytest.approx(rms(torch.stack(downs)), rel=1e-4)


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_parts_of_the_moes_change_are_what_the_loss_feels(renormalize, corpus):
    """Undo one weight's update in one layer: the loss changes by the gradient times that part, to first order."""
    config = Config(width=32, granularity=2, n_experts=4, context=16, vocab_size=corpus.vocab_size, renormalize=renormalize)
    data = TextData(corpus, torch.device("cpu"))
    batch = data.validation(1, 8, 16)[0]
    now = MiniMoE(config).double()
    start = copy.deepcopy(now)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for block in now.blocks:
            for weight in (block.moe.up, block.moe.down, block.moe.router):
                weight += 1e-6 * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    gradients = loss_gradients(now, batch)
    before, after = (observed(model, batch[:, :-1]) for model in (start, now))
    for layer in (0, 1):
        parts = _moe_updates(before, after, layer)
        for name in ("up", "down", "router"):
            undone = copy.deepcopy(now)
            with torch.no_grad():
                getattr(undone.blocks[layer].moe, name).copy_(getattr(start.blocks[layer].moe, name))
                felt = cross_entropy(now, batch) - cross_entropy(undone, batch)
            expected = (gradients[layer] * parts[name]).sum()
            assert felt.item() == pytest.approx(expected.item(), rel=0.01), (layer, name)
            assert abs(felt) > 1e-10


def cross_entropy(model, batch):
    return torch.nn.functional.cross_entropy(model(batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())


def test_over_granularity_the_moe_does_as_predicted(pydocs):
    """Init variance and LR by the width and a route scale of K: constant; by fan_in: the init shrinks, the update does not."""
    names = ("authors", "route K", "down by fan_in")
    tables = [ARMS[name].table for name in names]
    sizes = {"widths": 64, "granularities": (1, 2, 4, 8), "base_width": 16, "base_granularity": 1}
    frame = coordinate_check(tables, **sizes, steps=2, seeds=(0, 1), corpus=pydocs)
    assert frame.groupby("parametrization").granularity.nunique().tolist() == [4] * 3
    table = exponents(frame)
    assert table[table.predicted.notna()].agrees.all()
    judged = table[(table.tensor == "moe") & (table.layer == 0)].set_index(["parametrization", "quantity"]).verdict
    for name, verdicts in zip(names, (["shrinks"] * 3, ["holds"] * 3, ["shrinks", "shrinks", "holds"]), strict=True):
        assert [judged[ARMS[name].table.name, quantity] for quantity in ("init", "from_up", "from_down")] == verdicts


def test_one_size_grows_at_a_time(corpus):
    with pytest.raises(ValueError, match="both width and granularity have several values"):
        coordinate_check("mup", corpus=corpus, **TINY | {"granularities": (1, 2)})
    with pytest.raises(ValueError, match="granularity or granularities, not both"):
        coordinate_check("mup", corpus=corpus, **TINY | {"widths": 32, "granularities": (1, 2), "granularity": 2})
    with pytest.raises(ValueError, match="axis='depth': must be one of width, granularity"):
        predicted_exponents(Config(), "depth")


def test_observing_changes_nothing_and_leaves_no_hooks(corpus):
    model = MiniMoE(Config(width=32, vocab_size=corpus.vocab_size))
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    before = model(tokens).logits
    observed(model, tokens)
    assert torch.equal(model(tokens).logits, before)
    assert not any(module._forward_hooks for module in model.modules())


def test_frozen_routing_keeps_the_initial_choice(corpus, monkeypatch):
    seen = []
    real = observed

    def recording(model, tokens):
        seen.append((id(model), real(model, tokens)))
        return seen[-1][1]

    monkeypatch.setattr("minimoe.coordinates.observed", recording)
    coordinate_check("mup", corpus=corpus, routing="frozen", lr=2.0**-3, **TINY)
    first, last = seen[0][1], seen[4][1]  # of width 64: at init; (batch, probe) per step
    assert all(torch.equal(a, b) for a, b in zip(first.experts, last.experts, strict=True))
    seen.clear()
    coordinate_check("mup", corpus=corpus, routing="free", lr=2.0**-3, **TINY)
    assert not all(torch.equal(a, b) for a, b in zip(seen[0][1].experts, seen[2][1].experts, strict=True))


def test_forced_routing_goes_round(corpus):
    frame = coordinate_check("mup", corpus=corpus, routing="forced", **TINY)
    assert set(frame.tensor) == set(TENSORS)


def test_frame_is_tidy_and_repeats(corpus):
    frame = coordinate_check(["mup", "sp"], corpus=corpus, **TINY)
    labels = ["parametrization", "width", "granularity", "seed", "step", "layer", "tensor", "quantity"]
    assert list(frame.columns) == [*labels, "rms", "alignment", "predicted"]
    assert not frame.duplicated(labels).any()
    assert set(frame[frame.step == 0].quantity) == {"init"}
    again = coordinate_check(["mup", "sp"], corpus=corpus, **TINY | {"n_jobs": 2})
    pd.testing.assert_frame_equal(frame, again)  # in any number of processes


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


def test_a_dense_model_has_no_router(corpus):
    frame = coordinate_check("mup", corpus=corpus, **TINY | {"n_experts": 1, "top_k": 1})
    assert set(TENSORS) - set(frame.tensor) == {"router"}
    coordinate_curves(frame)


def test_predictions_of_the_built_in_tables_by_hand():
    def predicted(table, **fields):
        return predicted_exponents(Config(table, **fields))

    hidden = ("q", "k", "v", "o", "up", "down")
    for table, update, router, logits in (
        ("sp", 1, (0, 1), (0, 1)),
        ("simplep", 0, (0, 1), (-0.5, 0)),
        ("mup", 0, (-0.5, 0), (-0.5, 0)),
    ):
        found = predicted(table)
        assert {found[tensor, "init"] for tensor in hidden} == {0}
        assert {found[tensor, "update"] for tensor in hidden} == {update}
        assert (found["router", "init"], found["router", "update"]) == router
        assert (found["logits", "init"], found["logits", "update"]) == logits
        assert (found["embedding", "init"], found["embedding", "update"]) == (0, 0)
        assert found["scores", "init"] == found["residual", "init"] == 0
        assert found.get(("moe", "init")) == (None if table == "mup" else 0)  # raw gates that flatten: no power law yet
        assert predicted(table, renormalize=True)["moe", "init"] == 0
    grown = MUP.replace("experts_up", init_var=1)  # the hidden values grow, and the down projection inherits that
    assert predicted(grown)["down", "init"] == predicted(grown)["down", "update"] == 0.5
    assert predicted(grown, activation="swiglu")["down", "init"] == 1  # a product of two
    by_width = MUP.replace("embedding", lr=1 / width)
    assert predicted(by_width)["embedding", "update"] == -1


def synthetic(slopes, widths=(64, 128, 256), seeds=(0, 1)):
    rows = [
        {"parametrization": "t", "width": w, "seed": s, "step": step, "layer": 0, "tensor": tensor, "quantity": quantity,
         "rms": (1 + 0.01 * s) * w**slope, "alignment": 0.5, "predicted": 0.0}
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
    for tensor in OUTPUTS:
        table = exponents(synthetic({(tensor, "init"): 0.5, (tensor, "update"): 0.0}))
        assert table.verdict.tolist() == ["explodes", "holds"]


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


def test_bad_frames(corpus):
    frame = synthetic({("q", "init"): 0.5, ("q", "update"): 0.5})
    with pytest.raises(ValueError, match="needs at least two"):
        exponents(frame[frame.width == 64])
    with pytest.raises(ValueError, match="step=3: the frame has the steps 1, 2"):
        exponents(frame, step=3)
    with pytest.raises(ValueError, match="the frame has no rows"):
        exponents(frame.head(0))


def test_figure_shows_every_tensor_and_colours_what_is_broken(corpus):
    frame = coordinate_check(["mup", "sp"], corpus=corpus, **TINY)
    table = exponents(frame)
    figure = coordinate_curves(frame)
    for part, name in zip(figure.subfigs, ("mup", "sp"), strict=True):
        assert name in part.get_suptitle()
        titles = {axes.get_title().split("\n")[0].split(",")[0]: axes for axes in part.axes}
        assert list(titles) == list(TENSORS)
        own = table[table.parametrization == name]
        for tensor, axes in titles.items():
            shown = own[(own.tensor == tensor) & own.quantity.isin(("init", "update"))]
            broken = shown.verdict.isin(("explodes", "shrinks")).any()
            assert (axes.title.get_color() == "#c1121f") == broken
            assert axes.get_ylim() == part.axes[0].get_ylim()  # flat is seen to be flat
    coordinate_curves(frame[frame.parametrization == "sp"], layer=1)
    with pytest.raises(ValueError, match="layer=7"):
        coordinate_curves(frame, layer=7)
