"""A run's identity: shipped runs keep theirs, whatever is added to the code."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from minimoe import PARAMETRIZATIONS, Config, Parametrization, Rule, TrainOptions, batch, duration, fan_in, width
from minimoe import config as configs
from minimoe.config import config_from_dict, config_to_dict
from minimoe.identity import run_key, tensor_numbers

SWEEPS = Path(__file__).parent.parent / "data" / "sweeps"
USUAL = {"lr": 0.01, "steps": 6, "options": TrainOptions(), "corpus_digest": "text"}


def shipped():
    """Every line of the shipped sweeps that were there before any field was added: 3,184 cells."""
    names = ("transfer", "router_rules", "expert_count", "granularity")
    return [json.loads(line) for name in names for line in (SWEEPS / f"{name}.jsonl").read_text().splitlines()]


def key(cell, config):
    return run_key(config, cell["lr"], cell["steps"], TrainOptions(**cell["options"]), cell["corpus_digest"])


@dataclass(frozen=True)
class Wider(Config):
    """Config as a later version might have it."""

    novelty: float = 0.5


def wider(config, **fields):
    return Wider(**{name: getattr(config, name) for name in Config.__dataclass_fields__}, **fields)


def finely(table):
    """The same table, with a row for each finer role."""
    rules = dict(table.rules)
    return Parametrization(table.name, rules | {"attention_out": rules["attention"], "gain": rules["embedding"]})


def test_every_shipped_cell_keeps_its_key():
    cells = shipped()
    assert len(cells) == 3184
    assert all(key(cell, config_from_dict(cell["config"])) == cell["key"] for cell in cells)


def test_a_new_field_leaves_every_key_until_it_is_used(monkeypatch):
    monkeypatch.setitem(configs.NEUTRAL, "novelty", 0.5)
    cells = shipped()
    assert all(key(cell, wider(config_from_dict(cell["config"]))) == cell["key"] for cell in cells)
    assert not any(key(cell, wider(config_from_dict(cell["config"]), novelty=1)) == cell["key"] for cell in cells[::100])


def test_a_new_field_that_is_not_declared_neutral_would_retrain_everything():
    cells = shipped()[::100]
    assert not any(key(cell, wider(config_from_dict(cell["config"]))) == cell["key"] for cell in cells)


def test_splitting_roles_leaves_every_key():
    for cell in shipped():
        config = config_from_dict(cell["config"])
        assert key(cell, replace(config, parametrization=finely(config.parametrization))) == cell["key"]


def test_a_line_that_lacks_a_field_means_its_neutral_value_and_not_todays_default(monkeypatch):
    data = config_to_dict(Config(width=64))
    del data["z_weight"]
    monkeypatch.setitem(configs.NEUTRAL, "z_weight", 0.25)
    assert config_from_dict(data | {"seed": 7}).z_weight == 0.25


def test_a_line_from_before_balance_times_k_was_dropped():
    data = config_to_dict(Config(width=64, granularity=4, top_k=2))
    assert config_from_dict(data | {"balance_times_k": True}).balance_weight == 0.01 * 8
    assert config_from_dict(data | {"balance_times_k": False}) == Config(width=64, granularity=4)


@pytest.mark.parametrize(("renormalize", "gates"), [(False, "softmax"), (True, "renormalized")])
def test_a_line_from_before_the_gates_had_one_field(renormalize, gates):
    data = config_to_dict(Config(width=64, gates=gates))
    del data["gates"], data["bias_rate"], data["gains"], data["base_expert_ratio"]
    older = config_from_dict(data | {"renormalize": renormalize})
    assert older == Config(width=64, gates=gates)
    assert run_key(older, **USUAL) == run_key(Config(width=64, gates=gates), **USUAL)


@pytest.mark.parametrize("row", [{"lr": 1 / batch**0.5}, {"eps": duration}, {"one_minus_beta": batch}])
def test_cells_of_the_training_count_where_they_are_not_1(row):
    table = PARAMETRIZATIONS["mup"].replace("router", **row)
    plain, edited = Config(width=64), Config(table, width=64)
    at_base, larger = TrainOptions(), TrainOptions(batch_size=32, base_batch_size=16, base_steps=3)
    assert run_key(edited, **USUAL | {"options": at_base}) == run_key(plain, **USUAL | {"options": at_base})
    assert run_key(edited, **USUAL | {"options": larger}) != run_key(plain, **USUAL | {"options": larger})


def test_ratios_of_the_training_by_hand():
    assert TrainOptions().ratios(100) == {"batch": 1, "duration": 1}
    options = TrainOptions(batch_size=64, base_batch_size=16, base_steps=50)
    assert options.ratios(200) == {"batch": 4, "duration": 16}  # four times the sequences in four times the steps
    numbers = tensor_numbers(Config(PARAMETRIZATIONS["mup"].replace("router", lr=(batch / duration) ** 0.5)), options.ratios(200))
    assert numbers["blocks.0.moe.router"].lr == 0.5


def test_the_base_of_the_training_itself_is_no_part_of_a_run():
    with_base = TrainOptions(base_batch_size=4, base_steps=2)
    assert run_key(Config(width=64), **USUAL) == run_key(Config(width=64), **USUAL | {"options": with_base})


def test_a_model_cannot_be_made_by_its_training():
    with pytest.raises(ValueError, match="init_var cannot depend on batch: the model is made before its training"):
        Rule(init_var=1 / batch)
    assert Rule(lr=fan_in * batch).ratios == {"fan_in", "batch"}
    assert (
        tensor_numbers(Config(PARAMETRIZATIONS["mup"].replace("router", lr=1 / width), width=64))["blocks.0.moe.router"].lr == 0.5
    )
