"""LRs of single roles, at the peak and at the end of the schedule: RLRS (arXiv 2507.03526)."""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from transformers import MixtralConfig

from minimoe import (
    PARAMETRIZATIONS,
    RELATIVE_RATES,
    Config,
    Rule,
    TrainOptions,
    adopt,
    adopted_sweep,
    explain,
    fan_in,
    growing,
    read_sweep,
    relative_rates,
    sweep,
    train,
)
from minimoe.arms import HORIZON_ARMS, VARIED, embedding_times, one_varied, rate_arms, with_factors
from minimoe.batched import BatchedRuns
from minimoe.explanations import side_by_side
from minimoe.identity import run_key
from minimoe.model import MiniMoE
from minimoe.step import SingleRun, lr_factor, lr_factors
from minimoe.training import Kind

MOE = RELATIVE_RATES["moe"]
FIELDS = {"width": 32, "context": 16, "n_experts": 4}
OPTIONS = TrainOptions(batch_size=4, eval_batches=2, evals=2)
MUP = PARAMETRIZATIONS["mup"]
STEPS = 20


def at_the_end(table, lr=1.0):
    """role -> its LR in the last step, as torch's optimizer has it."""
    run = SingleRun([MiniMoE(Config(table, **FIELDS))], [lr], OPTIONS, STEPS)
    tokens = torch.randint(96, (1, 4, 17), generator=torch.Generator().manual_seed(0))
    run.step(tokens, lr_factors(STEPS - 1, STEPS, OPTIONS, run.finals))
    return {role: group["lr"] for group in run.optimizer.torchs.param_groups for role in group["members"]}


def key(table, **options):
    return run_key(Config(table, **FIELDS), 0.01, STEPS, replace(OPTIONS, **options), "text")


def test_both_readings_of_the_end():
    own, base = (at_the_end(relative_rates("mup", MOE, "rates", end)) for end in ("own", "base"))
    for role, (peak, last) in MOE.items():
        assert own[role] == pytest.approx(peak * 0.1 * last)  # the authors' scheduler
        assert base[role] == pytest.approx(0.1 * last)  # the formula as printed
    assert own["experts_up"] == pytest.approx(0.03375)  # flat: 0.3375 of the usual end, after 0.3 of the usual peak
    assert own["attention_out"] == own["attention"]


def test_both_readings_have_one_peak_and_one_warm_up():
    own, base = (relative_rates("mup", MOE, "rates", end) for end in ("own", "base"))
    assert all(own[role].lr == base[role].lr for role in MOE)
    warm = round(OPTIONS.warmup * STEPS)
    for table in (own, base):
        finals = table.final_lrs(MOE)
        assert set(lr_factors(warm - 1, STEPS, OPTIONS, finals).values()) == {1.0}


def test_between_peak_and_end_there_is_one_cosine():
    for step in range(2, STEPS):
        usual, doubled = (lr_factor(step, STEPS, OPTIONS, final) for final in (1, 2))
        progress = (step - 1) / (STEPS - 2)
        assert doubled - usual == pytest.approx(0.1 * (1 - (1 + math.cos(math.pi * progress)) / 2))


def test_factors_of_1_are_the_same_training_bit_for_bit(corpus):
    ones = relative_rates("mup", dict.fromkeys(MOE, (1, 1)), "ones")
    assert key(ones) == key(MUP)
    runs = train([Config(table, **FIELDS) for table in (MUP, ones)], 0.01, 0, corpus, STEPS, OPTIONS)
    for own, other in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(own, other)


def test_a_constant_factor_is_a_cell_of_the_table():
    assert key(embedding_times("mup", 5)) == key(MUP.replace("embedding", "by hand", lr=5))


def test_an_end_counts_in_a_runs_identity_only_where_it_is_another():
    slower = MUP.replace("router", "slower", final_lr=0.5)
    assert key(slower) != key(MUP)
    assert key(slower, final_lr=0.0) == key(MUP, final_lr=0.0)  # half of nothing


def test_many_runs_at_once_take_the_same_steps(corpus):
    table = relative_rates("mup", MOE, "rates")
    config = Config(table, **FIELDS)
    alone, together = (train(config, 0.01, [0, 1], corpus, STEPS, OPTIONS, "cpu", at_once=n) for n in (1, 2))
    for one, other in zip(alone, together, strict=True):
        assert other.val_loss == pytest.approx(one.val_loss, abs=1e-4)
    held = train(replace(config, parametrization=MUP), 0.01, 0, corpus, STEPS, OPTIONS)[0]
    assert abs(held.val_loss - alone[0].val_loss) > 1e-3  # the schedule matters


def test_runs_with_other_ends_are_other_programs(corpus):
    tables = [relative_rates("mup", MOE, end, end) for end in ("own", "base")]
    models = [MiniMoE(Config(table, **FIELDS)) for table in tables]
    with pytest.raises(ValueError, match="must agree in final_lr"):
        BatchedRuns(models, [0.01, 0.01], OPTIONS, STEPS)
    runs = train([model.config for model in models], 0.01, 0, corpus, 4, OPTIONS, at_once=2)
    assert [run.config.parametrization.name for run in runs] == ["own", "base"]


def test_a_finer_role_with_an_end_of_its_own_is_another_program(corpus):
    whole = MUP.replace("attention", "whole", final_lr=0.5)
    finer = whole.replace("attention_out", "finer", final_lr=1)
    runs = train([Config(table, **FIELDS) for table in (whole, finer)], 0.01, 0, corpus, 4, OPTIONS, "cpu", at_once=2)
    assert runs[0].val_loss != runs[1].val_loss
    written = whole.replace("attention_out", "written", final_lr=0.5)  # the family's end, written twice
    kinds = [Kind(Config(table, **FIELDS), OPTIONS, 4).key for table in (whole, written, finer)]
    assert kinds[0] == kinds[1] != kinds[2]


def test_a_store_keeps_the_ends(corpus, tmp_path):
    store, tables = tmp_path / "runs.jsonl", rate_arms("mup")
    fields = {name: value for name, value in FIELDS.items() if name != "width"}
    made = sweep((32,), tables, (0.01,), (0,), 4, corpus, options=OPTIONS, store=store, n_jobs=1, progress=False, **fields)
    assert made.key.nunique() == len(tables)
    read = read_sweep(store).set_index("parametrization").loc[[table.name for table in tables]].reset_index()
    assert list(read.val_loss) == list(made.val_loss)
    text = store.read_text().splitlines()
    assert ['"final_lr": [' in line for line in text if '"history"' in line].count(True) == 2  # the two readings


def test_rates_reach_finer_roles_and_only_roles_that_are_there():
    finer = MUP.replace("attention_out", "finer", eps=2)
    moved = relative_rates(finer, {"attention": (2, 0.5)}, "moved")
    assert (moved["attention_out"].lr, moved["attention_out"].eps) == (2 / fan_in, Rule(eps=2).eps)
    assert moved["attention_out"].final_lr.coefficient == 0.5
    assert relative_rates("mup", {"shared_up": (2, 1)}, "shared")["experts_up"] == MUP["experts_up"]
    with pytest.raises(KeyError, match="has no role 'experts'"):
        relative_rates("mup", {"experts": (0.3, 1)}, "unknown")
    with pytest.raises(ValueError, match="end='mine': must be one of own, base"):
        relative_rates("mup", MOE, "rates", "mine")
    assert relative_rates("mup", {"embedding": (5, 1)}, "gains")["gain"].lr.coefficient == 5  # a gain goes with the embedding
    with pytest.raises(ValueError, match="rates='residual': has no weight, and so no LR"):
        relative_rates("completep", {"residual": (3, 1)}, "scale")
    with pytest.raises(ValueError, match=r"rates\['router'\]=\(-1, 1\): must not be negative"):
        relative_rates("mup", {"router": (-1, 1)}, "negative")
    for rates, message in (({"router": 5}, r"rates\['router'\]=5: must be a pair"), ("moe", "rates='moe': must be role ->")):
        with pytest.raises(TypeError, match=message):
            relative_rates("mup", rates, "no pairs")
    with pytest.raises(ValueError, match="needs a peak above 0"):
        relative_rates("mup", {"router": (0, 1)}, "frozen", "base")


def test_an_end_is_a_number():
    with pytest.raises(ValueError, match=r"final_lr=1/fan_in: must be a number"):
        Rule(final_lr=1 / fan_in)


def test_explain_shows_ends_where_there_are_some():
    config = Config(relative_rates("mup", MOE, "rates"), **FIELDS)
    assert explain(config).set_index("role").final_lr["unembedding"] == 0.444
    assert "final_lr" not in explain(replace(config, parametrization="mup"))
    assert "final_lr" in side_by_side(config, ["mup", config.parametrization]).differs.loc["unembedding"]


def a_mixtral(tied=False):
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    few = {"num_hidden_layers": 1, "vocab_size": 96, "num_local_experts": 4}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return adopt(growing(MixtralConfig(**sizes, **few, **ids, tie_word_embeddings=tied), *sizes), width=128, base_width=64)


def test_the_groups_of_an_adopted_model_carry_the_end():
    plan, table = a_mixtral(), relative_rates("mup", MOE, "rates")
    plan.initialise(table)
    ends = {group["role"]: group.get("final_lr", 1) for group in plan.param_groups(table, 0.01)}
    assert ends["router"] == 1
    assert ends["experts_down"] == 1.125
    assert ends["unembedding"] == 0.444
    written = {row["name"]: row.get("final_lr", 1) for row in json.loads(plan.to_json(table))}
    assert {written["model.embed_tokens.weight"], written["lm_head.weight"]} == {0.666, 0.444}
    halved = {row["role"]: row for row in json.loads(plan.to_json(MUP.replace("router", "halved", one_minus_beta=0.5)))}
    assert halved["router"]["one_minus_beta"] == 0.5
    assert "one_minus_beta" not in halved["unembedding"]
    assert plan.explain(table).set_index("role").final_lr["unembedding"] == 0.444
    assert "final_lr" not in plan.explain("mup")


def test_an_adopted_model_trains_with_its_ends(corpus):
    plan = a_mixtral()
    slow = MUP.replace("experts_up", "slow", final_lr=0.01).replace("attention", "slow", final_lr=0.01)
    fields = {"corpus": corpus, "options": OPTIONS, "n_jobs": 1}
    losses = adopted_sweep(plan, (128,), ("mup", slow), (2.0**-5,), (0,), 20, **fields).val_loss
    assert losses[0] != losses[1]


def test_a_tied_weight_with_two_ends_is_refused():
    plan = a_mixtral(tied=True)
    with pytest.raises(ValueError, match=r"final_lr 0\.666 as an embedding, 0\.444 as a readout"):
        plan.initialise(relative_rates("mup", MOE | {"embedding": (1, 0.666), "unembedding": (1, 0.444)}, "rates"))


def test_the_published_dense_rates_end_where_the_paper_says():
    ends = at_the_end(relative_rates("mup", RELATIVE_RATES["dense"], "dense"))
    usual = {"attention": 0.2, "unembedding": 0.4444, "embedding": 5 * 0.6666}  # of the base's end
    assert {role: ends[role] / 0.1 for role in usual} == pytest.approx(usual)


def test_the_betas_alone_are_one_cell_of_the_square_root_rule():
    none, ruled, betas = HORIZON_ARMS
    for role in none.roles:
        assert betas[role] == replace(none[role], one_minus_beta=ruled[role].one_minus_beta)
    assert ruled["embedding"].one_minus_beta({"batch": 1.0, "duration": 8.0}) == 1 / 8


def test_one_rate_at_a_time_is_changed_about_one_table():
    varied = one_varied("mup", (0.5, 1, 2))
    assert [(role, factor) for role, factor, _ in varied] == [(role, factor) for role in VARIED for factor in (0.5, 1, 2)]
    start = embedding_times("mup", 5)
    for role, factor, table in varied:
        changed = {own for own in start.roles if table[own] != start[own]}
        assert changed == (set(VARIED[role]) if factor != 1 else set())
        assert table[VARIED[role][0]].lr == start[VARIED[role][0]].lr * factor
    assert len({table.name for *_, table in varied}) == 11  # the five with a factor of 1 are one
    rows = pd.DataFrame({"parametrization": [start.name, f"{start.name}, router x 2", "mup"], "val_loss": [1.0, 2.0, 3.0]})
    found = with_factors(rows, "mup", (0.5, 1, 2))
    assert [*zip(found.role, found.factor, found.val_loss, strict=True)] == [
        ("embedding", 1, 1.0),
        ("unembedding", 1, 1.0),
        ("router", 1, 1.0),
        ("router", 2, 2.0),
        ("experts", 1, 1.0),
        ("attention", 1, 1.0),
    ]
