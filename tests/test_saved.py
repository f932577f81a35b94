"""Saved models: whole or not there at all, checked before they are believed, and with the alphabet that they write."""

import io
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import kills
from minimoe import Config, MiniMoE, TrainOptions, load_corpus, train
from minimoe.__main__ import main
from minimoe.config import config_to_dict
from minimoe.corpus import make_corpus
from minimoe.files import write_whole

SMALL = Config(width=32, depth=1, n_experts=4, context=16)
KILLS = 10


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.fixture
def path(tmp_path):
    MiniMoE(SMALL).save(tmp_path / "model.pt")
    return tmp_path / "model.pt"


def saved_as(path, config, state, corpus=None):
    """A file as an older version wrote it: without a checksum."""
    torch.save({"config": config_to_dict(config), "state": state, **({"corpus": corpus} if corpus else {})}, path)


def test_a_model_comes_back_with_its_alphabet(corpus, tmp_path):
    (run,) = train(SMALL, 0.01, 0, corpus, 2, TrainOptions(batch_size=2))
    run.model.save(tmp_path / "model.pt")
    loaded = MiniMoE.load(tmp_path / "model.pt")
    assert same(loaded, run.model)
    assert loaded.config == SMALL
    assert loaded.alphabet == corpus.alphabet


def test_a_kill_while_saving_over_a_model_leaves_a_whole_model(tmp_path):
    """tools/kills.py does the same by the hundred."""
    found = kills.killed_while_saving(kills.fresh_processes(), tmp_path / "model.pt", random.Random(0), KILLS)
    assert sum(found) == KILLS


def test_a_full_disk_leaves_the_old_model(path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _handle: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        MiniMoE(replace(SMALL, seed=1)).save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_every_flipped_bit_is_found(path):
    data = path.read_bytes()
    generator = random.Random(0)
    for _ in range(100):
        damaged = bytearray(data)
        damaged[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is damaged: its checksum is wrong|is not a model saved by minimoe"):
            MiniMoE.load(path)


@pytest.mark.parametrize("kept", [0, 10, 100, 0.5, 0.99])
def test_a_cut_file_is_refused(path, kept):
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=r"is damaged|is not a model"):
        MiniMoE.load(path)


def test_shapes_are_compared_before_memory_is_taken(tmp_path):
    state = MiniMoE(SMALL).state_dict()
    for config in (replace(SMALL, width=2**20), replace(SMALL, depth=10**9), replace(SMALL, vocab_size=2**40)):
        saved_as(tmp_path / "huge.pt", config, state)
        with pytest.raises(ValueError, match=r"its tensors are not those of its config|the file has"):
            MiniMoE.load(tmp_path / "huge.pt")
    one = torch.zeros(())
    huge = {name: one.expand(tensor.shape) for name, tensor in state.items()}  # a few bytes that would become many
    saved_as(tmp_path / "views.pt", SMALL, huge)
    with pytest.raises(ValueError, match="not whole"):
        MiniMoE.load(tmp_path / "views.pt")


def test_an_older_file_is_read_and_needs_its_corpus(tmp_path, capsys, text):
    corpus = load_corpus(text)
    model = MiniMoE(replace(SMALL, vocab_size=corpus.vocab_size))
    saved_as(tmp_path / "old.pt", model.config, model.state_dict())
    assert same(MiniMoE.load(tmp_path / "old.pt"), model)
    assert main(["sample", str(tmp_path / "old.pt"), "--length", "3"]) == 2
    assert "--corpus=None: must name the corpus of this model" in capsys.readouterr().err
    assert main(["sample", str(tmp_path / "old.pt"), "--corpus", text, "--length", "3"]) == 0


def test_a_sample_has_the_models_own_alphabet(tmp_path, capsys):
    model = MiniMoE(replace(SMALL, vocab_size=4))
    model.alphabet = make_corpus("first", "abcd" * 100).alphabet
    model.save(tmp_path / "model.pt")
    assert main(["sample", str(tmp_path / "model.pt"), "--length", "20"]) == 0
    assert set(capsys.readouterr().out.strip()) <= set("abcd")
    (tmp_path / "other.txt").write_text("wxyz" * 100)
    assert main(["sample", str(tmp_path / "model.pt"), "--corpus", str(tmp_path / "other.txt")]) == 2
    assert "has other symbols than the corpus that the model was trained on" in capsys.readouterr().err


def test_other_files_are_not_models(tmp_path):
    content = io.BytesIO()
    torch.save({"weights": torch.zeros(3)}, content)
    for data in (b"text", content.getvalue(), b""):
        (tmp_path / "other").write_bytes(data)
        with pytest.raises(ValueError, match="is not a model saved by minimoe"):
            MiniMoE.load(tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        MiniMoE.load(tmp_path / "none")


def test_where_a_model_cannot_be_saved_is_said_before_the_training(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("minimoe.__main__.train", lambda *_: pytest.fail("it trains"))
    for target, words in ((str(tmp_path), "Is a directory"), ("", "must name a file"), ("/dev/null", "is a device")):
        assert main(["train", "--save", target]) == 2
        assert words in capsys.readouterr().err


def test_a_model_is_saved_before_the_first_word_is_printed(tmp_path, text):
    command = [sys.executable, "-m", "minimoe", "train", "--width", "32", "--steps", "2", "--corpus", text, "--context", "16"]
    command += ["--save", str(tmp_path / "model.pt")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()  # as `| head` does
    assert process.wait(120) == 141, process.stderr.read()
    assert MiniMoE.load(tmp_path / "model.pt").config.width == 32


def test_a_link_stays_a_link_and_a_file_keeps_its_mode(tmp_path):
    (tmp_path / "there").write_bytes(b"old")
    (tmp_path / "there").chmod(0o640)
    (tmp_path / "link").symlink_to("there")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "there").read_bytes() == b"new"
    assert (tmp_path / "there").stat().st_mode & 0o777 == 0o640
