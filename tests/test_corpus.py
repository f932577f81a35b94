"""Corpora: made, read, downloaded from a local server; every way they can be wrong."""

import contextlib
import hashlib
import http.server
import os
import platform
import socket
import stat
import threading

import numpy as np
import pytest

from minimoe import corpus as module
from minimoe import load_corpus, make_corpus
from minimoe.corpus import PRINTABLE
from minimoe.files import write_whole


def test_pydocs_is_a_megabyte_of_english_in_96_symbols(pydocs):
    text = pydocs.decode(pydocs.train)
    assert len(text) + len(pydocs.val) >= 1_000_000
    assert pydocs.symbols == PRINTABLE
    assert pydocs.vocab_size == 96
    assert text.count(" the ") > 5000
    assert len(pydocs.val) == pytest.approx(0.1 * (len(pydocs.train) + len(pydocs.val)), abs=1)


@pytest.fixture
def _known(pydocs, monkeypatch):
    """The digest of this Python's text is in the code, as it is for some Pythons."""
    monkeypatch.setitem(module.PYDOCS_SHA256, platform.python_version(), (pydocs.digest,))


@pytest.mark.usefixtures("_known")
def test_pydocs_is_deterministic_cached_and_mended(pydocs, monkeypatch):
    load_corpus("pydocs")
    (path,) = module.cache_folder().glob("pydocs-*.txt")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == pydocs.digest
    made = []
    original = module._pydocs_text
    monkeypatch.setattr(module, "_pydocs_text", lambda: made.append(original()) or made[-1])
    assert load_corpus("pydocs").digest == pydocs.digest
    assert not made  # from the cache
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # damaged: made again, the same
    assert load_corpus("pydocs").digest == pydocs.digest
    assert len(made) == 1
    assert path.read_bytes() == whole


def test_pydocs_works_without_a_cache_folder(pydocs, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(module, "_pydocs_text", lambda: "some text\n")
    known = (hashlib.sha256(b"some text\n").hexdigest(),)
    monkeypatch.setitem(module.PYDOCS_SHA256, platform.python_version(), known)
    with pytest.warns(UserWarning, match="could not keep the pydocs corpus"):
        assert load_corpus("pydocs").decode(load_corpus("pydocs").train) == "some text"


@pytest.mark.parametrize("name", ["pydocs-{python}-1.txt", "pydocs-{python}-1-{digest}.txt"])
def test_a_planted_pydocs_is_not_trusted(name, pydocs, monkeypatch, tmp_path):
    """Its digest is its own, and in its name; the text is made again."""
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path))
    planted = b"Buy my words. " * 1000
    name = name.format(python=platform.python_version(), digest=hashlib.sha256(planted).hexdigest())
    (tmp_path / name).write_bytes(planted)
    assert load_corpus("pydocs").digest == pydocs.digest


def test_a_pydocs_of_an_unknown_python_is_made_each_time_and_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path))
    monkeypatch.setattr(module, "PYDOCS_SHA256", {})
    monkeypatch.setattr(module, "_pydocs_text", lambda: "some text\n")
    assert load_corpus("pydocs").digest == hashlib.sha256(b"some text\n").hexdigest()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="other systems have no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_says_who_may_read_a_cached_text(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_whole(tmp_path / "text.txt", b"text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "text.txt").stat().st_mode) == mode
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_training_and_validation_text_are_alike(pydocs):
    shares = [np.bincount(part, minlength=96) / len(part) for part in (pydocs.train, pydocs.val)]
    assert np.abs(shares[0] - shares[1]).sum() < 0.1


def test_any_utf8_file_is_a_corpus(tmp_path):
    text = "Grüße, 世界!\n" * 50
    (tmp_path / "greeting.txt").write_bytes(text.encode())
    corpus = load_corpus(tmp_path / "greeting.txt")
    assert corpus.name == "greeting.txt"
    assert corpus.symbols == "".join(sorted(set(text)))
    assert corpus.decode(np.concatenate([corpus.train, corpus.val])) == text
    assert corpus.digest == hashlib.sha256(text.encode()).hexdigest()
    assert corpus.encode("世ü").dtype == np.int64
    with pytest.raises(ValueError, match="outside the vocabulary: 'xz'"):
        corpus.encode("zx")


def test_a_vocabulary_beyond_256_symbols():
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 400))) * 2
    corpus = make_corpus("han", text)
    assert corpus.vocab_size == 400
    assert corpus.decode(np.concatenate([corpus.train, corpus.val])) == text


def test_bad_files_are_one_clear_error_each(tmp_path):
    with pytest.raises(FileNotFoundError, match="give pydocs, shakespeare, or the path"):
        load_corpus(tmp_path / "missing.txt")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"'empty.txt' is empty"):
        load_corpus(tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text \(byte 2\)"):
        load_corpus(tmp_path / "latin.txt")
    (tmp_path / "short.txt").write_text("abc" * 20)
    with pytest.raises(ValueError, match="too short for context=64: it has 54 training and 6 validation"):
        load_corpus(tmp_path / "short.txt").require_context(64)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local server for the download; `answer` says how it behaves. The expected digest is that of `body`."""
    body = b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 2000

    class Handler(http.server.BaseHTTPRequestHandler):
        answer = "whole"
        requests, sent = 0, 0

        def do_GET(self):
            Handler.requests += 1
            if self.answer == "missing":
                self.send_error(404)
                return
            self.send_response(200)
            if self.answer == "endless":
                self.end_headers()
                with contextlib.suppress(OSError):
                    while Handler.sent < 1e9:
                        self.wfile.write(body)
                        Handler.sent += len(body)
                return
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[::-1] if self.answer == "altered" else body if self.answer == "whole" else body[:5000])

        def log_message(self, *_):
            pass

    http_server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http_server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MINIMOE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SHAKESPEARE_URL", f"http://127.0.0.1:{http_server.server_port}/input.txt")
    monkeypatch.setattr(module, "SHAKESPEARE_BYTES", len(body))
    monkeypatch.setattr(module, "SHAKESPEARE_SHA256", hashlib.sha256(body).hexdigest())
    Handler.body, Handler.cache = body, tmp_path / "cache"
    yield Handler
    http_server.shutdown()


def test_shakespeare_is_downloaded_once_and_checked(server):
    first, second = load_corpus("shakespeare"), load_corpus("shakespeare")
    assert server.requests == 1
    assert first.digest == second.digest == hashlib.sha256(server.body).hexdigest()
    assert first.decode(first.train[:13]) == "First Citizen"


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ("missing", ConnectionError, "404.*--corpus pydocs, which needs no network"),
        ("cut", ConnectionError, "interrupted after 5000 of .* bytes"),
        ("altered", ValueError, "is not the expected file: .* bytes with SHA-256"),
    ],
)
def test_a_failed_download_leaves_nothing_behind(server, answer, error, message):
    server.answer = answer
    with pytest.raises(error, match=message):
        load_corpus("shakespeare")
    assert not list(server.cache.glob("*"))
    server.answer = "whole"
    assert load_corpus("shakespeare").vocab_size > 10


def test_a_download_that_does_not_end_is_cut_off(server):
    server.answer = "endless"
    with pytest.raises(ValueError, match="sends more than the expected"):
        load_corpus("shakespeare")
    assert server.sent < 100e6  # what the sockets hold, and not a gigabyte
    assert not list(server.cache.glob("*"))


def test_offline_says_what_to_do(server, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setattr(module, "SHAKESPEARE_URL", f"http://127.0.0.1:{port}/input.txt")
    with pytest.raises(
        ConnectionError, match=r"could not download .*use --corpus pydocs.*or put the file at .*tinyshakespeare.txt"
    ):
        load_corpus("shakespeare")


def test_a_damaged_download_is_named(server):
    load_corpus("shakespeare")
    (server.cache / "tinyshakespeare.txt").write_bytes(b"short")
    with pytest.raises(ValueError, match="delete it to download it again"):
        load_corpus("shakespeare")


def test_the_real_digest_is_the_published_one():
    assert module.SHAKESPEARE_BYTES == 1_115_394
    assert module.SHAKESPEARE_SHA256 == "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
