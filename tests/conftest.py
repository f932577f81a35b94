import random

import pytest
import torch

from browser import chromium
from minimoe import load_corpus, make_corpus


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def pydocs(_private_cache):
    return load_corpus("pydocs")


@pytest.fixture(scope="session")
def corpus():
    """A small text with something to learn, of 96 symbols like pydocs."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 6))) for _ in range(30)]
    from minimoe.corpus import PRINTABLE

    return make_corpus("words", " ".join(draw.choices(words, k=4000)), PRINTABLE)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return str(path)


@pytest.fixture(scope="module")
def browser():
    """A real browser; see browser.py."""
    with chromium() as browser:
        yield browser
