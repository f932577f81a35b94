"""Odd values at every door: an error that names the field, or an object that its own JSON gives back. Nothing else."""

import json
import math
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from minimoe import Config, Monomial, Parametrization, TrainOptions, fan_in, param_groups, parameter, sweep, train
from minimoe.config import config_from_dict, config_to_dict
from minimoe.parametrization import Rule
from minimoe.tables import PARAMETRIZATIONS
from minimoe.transfer import optimum

REFUSED = (ValueError, TypeError)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**400, -(10**400), 2**63, 2**64, 0, -1]),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(0, 3), max_size=2),
    st.sampled_from(
        [np.int64(2), np.float64(0.5), np.float32("nan"), np.bool_(True), np.array(3), np.array([1, 2]), b"1", {}, {1: 2}]
    ),
)
MANY = settings(max_examples=400, deadline=None)


def named(error, name):
    """The error names the field, in a message that a terminal can show."""
    assert name in str(error)
    assert len(str(error)) < 600


@MANY
@given(st.sampled_from([f.name for f in fields(Config) if f.name != "parametrization"]), ODD)
def test_a_config_takes_a_value_or_names_it(name, value):
    try:
        config = Config(**{name: value})
    except REFUSED as error:
        if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
            return  # it may be named with what it does not go with, such as width and head_size
        return named(error, name)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


@MANY
@given(st.sampled_from([f.name for f in fields(TrainOptions)]), ODD)
def test_options_take_a_value_or_name_it(name, value):
    try:
        options = TrainOptions(**{name: value})
    except REFUSED as error:
        return named(error, name)
    assert TrainOptions(**json.loads(json.dumps(asdict(options)))) == options


@MANY
@given(ODD, ODD)
def test_a_monomial_takes_a_coefficient_and_powers_or_names_them(coefficient, power):
    try:
        cell = Monomial(coefficient, (("fan_in", power),))
    except REFUSED as error:
        return named(error, "cell" if "coefficient" in str(error) else "fan_in")
    table = PARAMETRIZATIONS["mup"].replace("router", "odd", lr=cell)
    assert Parametrization.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    assert math.isfinite(cell.coefficient)


@MANY
@given(st.sampled_from(["init_var", "multiplier", "lr", "eps", "weight_decay", "one_minus_beta"]), ODD)
def test_a_rule_takes_a_cell_or_names_it(name, value):
    try:
        Rule(**{name: value})
    except REFUSED as error:
        named(error, name)


@MANY
@given(st.sampled_from([("name",), ("rules",), ("rules", "router"), ("rules", "router", "lr")]), ODD)
def test_a_table_is_read_or_refused(place, value):
    data = json.loads(json.dumps(PARAMETRIZATIONS["mup"].to_dict()))
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    try:
        table = Parametrization.from_dict(data)
    except REFUSED:
        return
    assert Parametrization.from_dict(json.loads(json.dumps(table.to_dict()))) == table


@MANY
@given(st.sampled_from(["shape", "base_shape", "base_std", "ratios", "fan_in_axes", "start", "role"]), ODD)
def test_a_parameter_takes_a_value_or_names_it(name, value):
    given_values = {"role": "router", "shape": (4, 4), name: value}
    try:
        made = parameter(given_values.pop("role"), given_values.pop("shape"), **given_values)
    except REFUSED as error:
        return named(error, "shape" if "shape" in str(error) else name)
    assert math.isfinite(made.role.base_std)
    assert made.role.base_std >= 0


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = parameter("router", (4, 2))


@MANY
@given(st.sampled_from(["lr", "eps", "weight_decay", "betas"]), ODD)
def test_groups_take_a_number_or_name_it(name, value):
    settings_ = {"lr": 0.1, name: value}
    try:
        (group,) = param_groups(Router(), "mup", settings_.pop("lr"), **settings_)
    except REFUSED as error:
        return named(error, name)
    assert all(math.isfinite(group[key]) and group[key] >= 0 for key in ("lr", "eps", "weight_decay") if key in group)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["widths", "lrs", "seeds", "steps", "depth", "batch_size"]), ODD)
def test_an_axis_of_a_sweep_is_refused_by_name(name, value):
    """Values that would train are not tried here: tests/test_sweeps.py trains."""
    if isinstance(value, int | float | list | dict | np.ndarray | np.generic) or (value is None and name in ("widths", "steps")):
        return
    with pytest.raises(REFUSED, match=name.rstrip("s")):
        sweep(**{"widths": 32, "steps": 1, "lrs": 0.1, "seeds": 0, "progress": False, name: value})


def test_values_that_were_once_accepted():
    for bad in ({"depth": None}, {"context": None}, {"vocab_size": None}):
        with pytest.raises(TypeError, match=f"{next(iter(bad))}=None: must be an integer"):
            Config(**bad)
    with pytest.raises(REFUSED, match="lr='64': must be a number"):
        sweep(widths=32, lrs="64", steps=1)
    with pytest.raises(ValueError, match=r"eps=-1\.0: must be finite and not negative"):
        param_groups(Router(), "mup", 0.1, eps=-1)
    for std in (-1, math.nan):
        with pytest.raises(ValueError, match="base_std"):
            parameter("router", (4, 4), base_std=std)
    for power in (math.nan, None, "two"):
        with pytest.raises(REFUSED, match="the power of 'fan_in'"):
            Monomial(1, (("fan_in", power),))
        with pytest.raises(REFUSED, match="a cell's exponent"):
            fan_in**power
    assert json.loads(json.dumps(asdict(TrainOptions(batch_size=np.int64(2)))))["batch_size"] == 2


def test_a_loss_that_is_nan_is_no_optimum():
    lrs = np.array([0.1, 0.2, 0.4])
    assert optimum(lrs, np.array([math.nan, 2.0, 3.0]))["grid_lr"] == 0.2
    assert optimum(lrs, np.array([math.nan, 2.0, 3.0]))["on_edge"]
    assert math.isnan(optimum(lrs, np.full(3, math.nan))["best_lr"])


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_model_that_broke_has_diverged(corpus, at_once):
    """At this LR the residual stream overflows the mean square of the norms: all logits are 0, and the loss would be ln V."""
    config = Config(width=32, depth=2, n_experts=4, context=16)
    runs = train([config] * at_once, [3e8] * at_once, 0, corpus, 10, TrainOptions(batch_size=2), at_once=at_once)
    assert all(run.diverged for run in runs)
    assert {run.val_loss for run in runs} == {math.inf}


def test_the_default_dtype_of_torch_changes_no_run(corpus):
    config = Config(width=32, depth=1, n_experts=4, context=16)
    (before,) = train(config, 0.01, 0, corpus, 3, TrainOptions(batch_size=2))
    torch.set_default_dtype(torch.float64)
    try:
        (after,) = train(config, 0.01, 0, corpus, 3, TrainOptions(batch_size=2))
    finally:
        torch.set_default_dtype(torch.float32)
    assert after.history == before.history
