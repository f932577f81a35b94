"""Grids: any axis, paths of sizes that grow together, fields that are functions of the size."""

import pytest

from minimoe import Config, TrainOptions, sweep
from minimoe.config import points
from minimoe.grids import planned_runs

TINY = {"lrs": 0.01, "corpus": None, "context": 16, "n_jobs": 1, "progress": False,
        "options": TrainOptions(batch_size=2, eval_batches=1)}  # fmt: skip


def tiny(corpus, **more):
    return sweep(**TINY | {"corpus": corpus, "parametrizations": "mup", "steps": 2} | more)


def test_points_are_every_combination_the_last_axis_fastest():
    assert points({"width": (32, 64), "depth": 2, "n_experts": [4, 8]}) == [
        {"width": w, "depth": 2, "n_experts": e} for w in (32, 64) for e in (4, 8)
    ]
    assert points({"activation": "relu"}) == [{"activation": "relu"}]  # a text is one value
    assert points({"depth": (2, 2, 4)}) == [{"depth": 2}, {"depth": 4}]


def test_the_sizes_of_a_path_grow_together():
    path = {"width": (32, 64), "n_experts": (4, 8)}
    assert points({"depth": (1, 2)}, path) == [
        {"width": w, "n_experts": e, "depth": d} for w, e in ((32, 4), (64, 8)) for d in (1, 2)
    ]
    assert points({}, {"width": (32, 32), "depth": (1, 2)}) == [{"width": 32, "depth": 1}, {"width": 32, "depth": 2}]


def test_a_function_sees_the_other_sizes_and_the_defaults():
    found = points({"n_experts": (4, 8), "top_k": lambda size: size.n_experts // size.expert_ratio})
    assert [point["top_k"] for point in found] == [2, 4]


@pytest.mark.parametrize(
    ("axes", "path", "message"),
    [
        ({"depth": ()}, None, "depth is empty: give at least one value"),
        ({}, {"width": (32, 64), "depth": (1,)}, "as many values as the others: got 2 of width, 1 of depth"),
        ({"width": 32}, {"width": (32, 64)}, "width: give it on the path or by itself, not both"),
    ],
)
def test_bad_points_are_refused(axes, path, message):
    with pytest.raises(ValueError, match=message):
        points(axes, path)


@pytest.mark.parametrize(
    ("name", "values"), [("depth", (1, 2)), ("n_experts", (2, 4)), ("granularity", (1, 2)), ("context", (8, 16))]
)
def test_any_field_of_config_is_an_axis(name, values, corpus):
    frame = tiny(corpus, widths=32, **{name: values})
    assert frame[name].tolist() == list(values)
    assert frame.val_loss.nunique() == 2


def test_batch_size_and_steps_are_axes_and_each_run_is_trained_as_if_alone(corpus):
    frame = tiny(corpus, widths=32, batch_size=(2, 4), steps=(2, 3))
    assert frame[["batch_size", "steps"]].to_numpy().tolist() == [[2, 2], [2, 3], [4, 2], [4, 3]]
    for row in frame.itertuples():
        alone = tiny(corpus, widths=32, batch_size=row.batch_size, steps=row.steps)
        assert (alone.key[0], alone.val_loss[0], alone.history[0]) == (row.key, row.val_loss, row.history)
        assert [record["step"] for record in row.history][-1] == row.steps


def test_batched_programs_keep_different_trainings_apart(corpus, monkeypatch):
    from minimoe import training

    monkeypatch.setattr(training, "planned_size", lambda *_: 8)  # as on a GPU
    frame = tiny(corpus, widths=32, lrs=(0.01, 0.02), batch_size=(2, 4), steps=(2, 3))
    assert len(frame) == 8
    assert [history[-1]["step"] for history in frame.history] == frame.steps.tolist()


def test_a_path_trains_its_points_and_no_others(corpus):
    frame = tiny(corpus, path={"width": (32, 64), "n_experts": (2, 4), "steps": (2, 3)}, steps=None)
    assert frame[["width", "n_experts", "steps"]].to_numpy().tolist() == [[32, 2, 2], [64, 4, 3]]


def test_a_field_can_follow_the_size(corpus):
    frame = tiny(corpus, widths=32, n_experts=(4, 8), top_k=lambda size: size.n_experts // 4)
    assert frame.top_k.tolist() == [1, 2]


def test_a_store_knows_each_point(corpus, tmp_path):
    for _ in range(2):
        tiny(corpus, widths=32, depth=(1, 2), steps=(2, 3), store=tmp_path / "runs.jsonl")
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 4


def test_table_by_table_then_sizes_then_lrs_then_seeds(corpus):
    runs = planned_runs(("sp", "mup"), (0.1, 0.2), (0, 1), corpus, TrainOptions(), {"width": (32, 64), "steps": 5})
    labels = [(r.config.parametrization.name, r.config.width, r.lr, r.config.seed) for r in runs]
    assert labels == [(t, w, lr, s) for t in ("sp", "mup") for w in (32, 64) for lr in (0.1, 0.2) for s in (0, 1)]
    assert {r.steps for r in runs} == {5}


def test_unknown_fields_name_what_there_is(corpus):
    with pytest.raises(TypeError, match=r"unknown field 'n_expert': Config has .*n_experts.*; TrainOptions has batch_size"):
        tiny(corpus, n_expert=4)
    with pytest.raises(TypeError, match="unknown field 'lr': give lrs instead"):
        tiny(corpus, path={"lr": (0.1, 0.2)})
    with pytest.raises(TypeError, match="unknown field 'betas'"):
        tiny(corpus, betas=(0.9, 0.95))
    assert Config().depth == 2
