"""The arms of the ablations: what each changes, and what is one run under all."""

import pandas as pd
import pytest

from minimoe import Config, TrainOptions
from minimoe.arms import ARMS, EXPERT_ARMS, SHARE_ARMS, arm, labelled
from minimoe.identity import run_key, tensor_numbers
from minimoe.sweeps import sweep
from minimoe.theory import predicted_exponents

SIZES = {"width": 64, "base_width": 16, "base_granularity": 1}


def config(name, granularity=1, **sizes):
    return Config(ARMS[name].table, granularity=granularity, **ARMS[name].at(granularity=granularity), **SIZES | sizes)


def key(name, granularity=1):
    return run_key(config(name, granularity), 2**-5, 10, TrainOptions(), "text")


def test_at_granularity_1_arms_differ_in_gates_and_router_alone():
    runs = {}
    for name, (_, fields) in ARMS.items():
        router = tensor_numbers(config(name))["blocks.0.moe.router"]
        runs.setdefault((fields["gates"], router), set()).add(key(name))
    assert len(runs) == 6  # raw gates with four routers, renormalised ones with two
    assert [len(keys) for keys in runs.values()] == [1] * 6


def test_the_two_router_arms_change_one_effective_cell_of_simpleps_router_to_mups():
    mups, simpleps, lr, init = (
        effective_router(name) for name in ("router mup", "authors", "router mup's LR", "router mup's init")
    )
    assert mups == pytest.approx((1 / 2 * simpleps[0], 1 / 4 * simpleps[1]))  # at four times the base width
    assert lr == pytest.approx((simpleps[0], mups[1]))
    assert init == pytest.approx((mups[0], simpleps[1]))


def effective_router(name):
    """The std and the LR of the router's effective weight, multiplier times weight."""
    numbers = tensor_numbers(config(name, 4))["blocks.0.moe.router"]
    return numbers.multiplier * numbers.std, numbers.multiplier * numbers.lr


def test_at_granularity_4_every_arm_is_a_run_of_its_own():
    assert len({key(name, 4) for name in ARMS}) == len(ARMS)


def test_arms_at_the_base_width_have_the_plain_models_numbers():
    plain = tensor_numbers(Config("simplep", width=16, base_width=16))
    for name in ARMS:
        assert tensor_numbers(config(name, width=16)) == plain, name


def test_down_cells_by_hand():
    """At granularity 4 the down projection's fan_in is 32, from 128 at 1 and 32 at the base (width 16)."""

    def down(name):
        return tensor_numbers(config(name, 4))["blocks.0.moe.down"]

    base = 32**-0.5  # std at the base
    assert (down("authors").std, down("authors").lr, down("authors").multiplier) == pytest.approx((base / 2, 1 / 4, 1))
    assert (down("down by fan_in").std, down("down by fan_in").lr) == pytest.approx((base, 1))
    assert down("route sqrt(K)").multiplier == pytest.approx(2)
    assert down("route K").multiplier == pytest.approx(4)
    router = {name: tensor_numbers(config(name, 4))["blocks.0.moe.router"] for name in ARMS}
    assert router["route K + router LR"].lr == pytest.approx(router["route K"].lr / 2)
    assert router["router mup"].multiplier == pytest.approx(1 / 4)


def test_the_balance_loss_of_the_authors_grows_with_granularity():
    assert [config("authors", g).balance_weight for g in (1, 4, 16)] == pytest.approx([0.02, 0.08, 0.32])
    assert [config("balance 1", g).balance_weight for g in (1, 4, 16)] == [0.02] * 3


def test_predicted_exponents_in_granularity_by_hand():
    """Of the MoE's output at init, and of the shares of the learning of up and down projections.

    Nothing is predicted of the shares where the experts' output makes the residual stream grow.
    """
    expected = {
        "authors": (-1, -1, -1),
        "gates renormalised": (-1, -1, -1),
        "down by fan_in": (-0.5, -0.5, 0),
        "route sqrt(K)": (-0.5, -0.5, -0.5),
        "route K": (0, 0, 0),
        "fan_in + sqrt(K)": (0, 0, 0.5),
        "fan_in + K": (0.5, None, None),
        "all mended, fan_in": (-0.5, -0.5, 0),
        "all mended, route K": (0, 0, 0),
    }
    for name, exponents in expected.items():
        found = predicted_exponents(config(name), "granularity")
        keys = ("moe", "init"), ("up", "allocation"), ("down", "allocation")
        assert tuple(found.get(key) for key in keys) == exponents, name


def test_rows_find_their_arms(corpus):
    arms = {name: ARMS[name] for name in ("authors", "balance 1", "down by fan_in")}
    small = {"n_jobs": 1, "progress": False, "context": 16, "granularity": (1, 4), "base_granularity": 1}
    frames = {name: sweep((32,), a.table, 2**-5, 0, 2, corpus, **small, **a.fields) for name, a in arms.items()}
    for name, frame in frames.items():
        assert labelled(frame[frame.granularity == 4], arms).parametrization.tolist() == [name]
    assert labelled(frames["balance 1"][:1], arms).parametrization.tolist() == ["authors", "balance 1"]  # one run at 1
    assert labelled(frames["authors"].assign(top_k=1), arms).empty  # not an arm's


def test_expert_arms_hold_k_or_its_share():
    assert [EXPERT_ARMS["mup, raw, k=2"].at(n_experts=n)["top_k"] for n in (2, 8, 32)] == [2, 2, 2]
    assert [EXPERT_ARMS["mup, raw, k=E/4"].at(n_experts=n)["top_k"] for n in (4, 8, 32)] == [1, 2, 8]
    assert len(EXPERT_ARMS) == 13


def test_interventions_on_the_balance_change_the_balance_alone():
    plain = EXPERT_ARMS["mup, raw, k=2"]
    for weight in (0, 0.1, 1):
        dose = EXPERT_ARMS[f"mup, raw, k=2, balance {weight:g}"]
        assert dose.table is plain.table
        assert dose.fields == plain.fields | {"balance_weight": weight}
    for gates in ("raw", "renormalised"):
        forced, free = EXPERT_ARMS[f"mup, {gates}, k=2, forced balance"], EXPERT_ARMS[f"mup, {gates}, k=2"]
        assert forced.fields == free.fields | {"forced_balance": True}


@pytest.mark.parametrize(
    ("choice", "message"),
    [({"gates": "hard"}, "gates='hard': must be one of raw, renorm"), ({"route": "2"}, "route='2': must be one of 1, sqrt")],
)
def test_unknown_choices_are_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        arm(**choice)


def test_arms_of_the_share_meet_in_one_run():
    """32 experts, two of them active: an end of both of muP's arms; and eight experts under dmft."""
    rows = [
        {"parametrization": table, "n_experts": E, "top_k": k, "gates": gates, "forced_balance": False, "balance_weight": 0.01}
        for table, gates, E, k in (
            ("mup", "renormalized", 32, 2), ("mup", "renormalized", 32, 8), ("mup", "renormalized", 8, 2),
            ("mup", "softmax", 8, 2), ("dmft", "sigmoid", 8, 2), ("dmft", "sigmoid", 16, 4), ("dmft", "sigmoid", 16, 2),
        )
    ]  # fmt: skip
    found = labelled(pd.DataFrame(rows), SHARE_ARMS)
    sizes = {name: list(zip(own.n_experts, own.top_k, strict=True)) for name, own in found.groupby("parametrization")}
    assert sizes == {
        "dmft, k=E/4": [(8, 2), (16, 4)],
        "dmft, k=2": [(8, 2), (16, 2)],
        "mup, E=32, other k": [(32, 2), (32, 8)],
        "mup, k=2, other E": [(32, 2), (8, 2)],
    }
