"""Character corpora: text in, token arrays and a digest out.

`load_corpus("pydocs")` needs no network: it is the English that every Python installation carries, the help topics and
the docstrings of the standard library. `load_corpus("shakespeare")` downloads tiny Shakespeare once and checks it.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import platform
import sysconfig
import urllib.error
import urllib.request
import warnings
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from .files import write_whole
from .memory import require_room

PRINTABLE = "\n" + "".join(map(chr, range(32, 127)))  # 96 symbols: pydocs' vocabulary on every Python
VALIDATION_FRACTION = 0.1
PYDOCS_RECIPE = 1  # part of the cache file's name: raise it when `_pydocs_text` changes
PYDOCS_SHA256 = {  # of the texts that a cache may hold, by Python: anybody may have written the file
    "3.11.2": ("089a7a56baaffbe63d9a00f37c3a263dd4cd3d2c89aba19c0ab1bc93ae117894",),  # Debian's
    "3.11.7": ("64789c26d17d762609557f2d4e171b3c6fa9e51616fa14d0293a97a53c42bd58",),
    "3.12.1": ("b8d60813a7d9ecac6b610f1e184adf8865e4684124f6202dd1f0a2606bba154d",),
    "3.13.0": ("260d885fb424d1324bef7a06c687b8d26a1f2f4f82199ab45d68c305919920c9",),
}
PYDOCS_BYTES = 10_000_000  # at most
CHUNK = 1 << 20  # characters
COPIES = 3  # of a text, at least, are in memory while it is read: its bytes, its characters and its tokens

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TIMEOUT = 30  # seconds without a byte before a download counts as interrupted


@dataclass(frozen=True)
class Alphabet:
    """The characters of a corpus, and which corpus it was: what a trained model needs to read and write."""

    name: str
    symbols: str  # symbols[i] is the character of token i
    digest: str  # SHA-256 of the text as UTF-8

    @property
    def vocab_size(self) -> int:
        """V, the number of symbols."""
        return len(self.symbols)

    def encode(self, text: str) -> np.ndarray:
        """(len(text),) int64 tokens. Raises ValueError naming the characters outside the vocabulary."""
        return _tokens(text, self.symbols).astype(np.int64)

    def decode(self, tokens) -> str:
        """The text of a one-dimensional sequence of tokens."""
        return "".join(self.symbols[int(token)] for token in tokens)


@dataclass(frozen=True, eq=False)
class Corpus(Alphabet):
    """A text as tokens, split by position: the first 90% to train on, the rest to validate."""

    train: np.ndarray  # (n,) smallest unsigned integers that hold a token
    val: np.ndarray  # likewise

    def __post_init__(self):
        for split in (self.train, self.val):
            if split.size and not (split.min() >= 0 and split.max() < len(self.symbols)):
                raise ValueError(f"corpus {self.name!r} has tokens outside its {len(self.symbols)} symbols")

    @property
    def alphabet(self) -> Alphabet:
        """Without the text."""
        return Alphabet(self.name, self.symbols, self.digest)

    def require_context(self, context: int) -> None:
        """Raise ValueError unless both splits hold at least one sequence of `context` characters and its targets."""
        if min(len(self.train), len(self.val)) <= context:
            sizes = f"{len(self.train)} training and {len(self.val)} validation characters"
            raise ValueError(f"corpus {self.name!r} is too short for context={context}: it has {sizes}")


def load_corpus(corpus: str | os.PathLike | Corpus) -> Corpus:
    """The corpus called "pydocs" or "shakespeare", or any UTF-8 text file, by its path.

    Raises FileNotFoundError (no such name or file), ValueError (empty, not UTF-8, wrong digest) or ConnectionError (the
    download failed; says what to do offline). Made or downloaded texts are kept in the folder $MINIMOE_CACHE (default:
    minimoe in the user's cache folder); nothing half-written stays there.
    """
    if isinstance(corpus, Corpus):
        return corpus
    if corpus == "pydocs":
        return make_corpus("pydocs", _cached_pydocs(), PRINTABLE)
    if corpus == "shakespeare":
        return make_corpus("shakespeare", _cached_shakespeare())
    path = Path(corpus)
    if not path.is_file():
        raise FileNotFoundError(f"no corpus {str(corpus)!r}: give pydocs, shakespeare, or the path of a UTF-8 text file")
    require_room("corpus", path, COPIES)
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text (byte {error.start}): convert it first") from error
    return make_corpus(path.name, text)


def make_corpus(name: str, text: str, symbols: str | None = None) -> Corpus:
    """A Corpus from a text; symbols default to the text's own characters, sorted. Raises ValueError if it is empty."""
    if not text:
        raise ValueError(f"corpus {name!r} is empty")
    symbols = "".join(sorted(set(text if symbols is None else symbols)))
    tokens = _tokens(text, symbols)
    split = len(tokens) - int(len(tokens) * VALIDATION_FRACTION)
    return Corpus(name, symbols, hashlib.sha256(text.encode()).hexdigest(), tokens[:split], tokens[split:])


def _tokens(text: str, symbols: str) -> np.ndarray:
    alphabet = _codes(symbols)  # sorted
    tokens = np.empty(len(text), np.min_scalar_type(len(alphabet) - 1))
    for start in range(0, len(text), CHUNK):  # all at once would take twenty times the text's memory
        codes = _codes(text[start : start + CHUNK])
        found = np.searchsorted(alphabet, codes).clip(max=len(alphabet) - 1)
        unknown = alphabet[found] != codes
        if unknown.any():
            strangers = "".join(sorted(set(map(chr, codes[unknown]))))
            raise ValueError(f"characters outside the vocabulary: {strangers[:20]!r}")
        tokens[start : start + CHUNK] = found
    return tokens


def _codes(text: str) -> np.ndarray:
    """The characters' numbers; half a surrogate pair, as a terminal may pass it on, is a character too."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def cache_folder() -> Path:
    """Where made and downloaded texts are kept."""
    if "MINIMOE_CACHE" in os.environ:
        return Path(os.environ["MINIMOE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minimoe"


def _cached_pydocs() -> str:
    """The pydocs text: from the cache, where the file is one whose digest this module knows, or made again, in seconds."""
    version = platform.python_version()
    path, known = cache_folder() / f"pydocs-{version}-{PYDOCS_RECIPE}.txt", PYDOCS_SHA256.get(version, ())
    if known and (data := _bytes_of(path, PYDOCS_BYTES)) and hashlib.sha256(data).hexdigest() in known:
        return data.decode("ascii")
    text = _pydocs_text()
    data = text.encode("ascii")
    if hashlib.sha256(data).hexdigest() in known:  # another text would not be read again
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, data)
        except OSError as error:  # the text is here all the same; next time it is made again
            warnings.warn(f"could not keep the pydocs corpus in {path.parent}: {error}", stacklevel=3)
    return text


def _bytes_of(path: Path, most: int) -> bytes:
    """The file's bytes; none if it is not there, cannot be read, or is larger than `most`."""
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except OSError:
        return b""
    return data if len(data) <= most else b""


def _pydocs_text() -> str:
    """Help topics and docstrings of the standard library, as newline and printable ASCII.

    The documents stand in the order of a hash of their names, so that a split by position gives both parts the same mix.
    """
    documents = [_ascii(text) for _, text in sorted(_pydocs_documents(), key=lambda item: _hash(item[0]))]
    return "\n".join(documents)


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _ascii(text: str) -> str:
    kept = "".join(c for c in text.expandtabs() if c == "\n" or " " <= c <= "~")
    return "\n".join(line.rstrip() for line in kept.split("\n")).strip("\n") + "\n"


def _pydocs_documents() -> list[tuple[str, str]]:
    """(name, text) of every help topic and of every documented module of the standard library; nothing is imported."""
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3"}
    documents = []
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if skipped & set(name.parts) or str(name).startswith("_sysconfigdata"):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)  # of other people's escape sequences
                warnings.simplefilter("ignore", DeprecationWarning)
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a template or a bad-syntax example
            continue
        if name.as_posix() == "pydoc_data/topics.py":
            documents += [(f"topic {topic}", text) for topic, text in _topics(tree).items()]
        elif texts := _docstrings(tree):
            documents.append((f"module {name.as_posix()}", "\n\n".join(texts)))
    return documents


def _topics(tree: ast.Module) -> dict[str, str]:
    """The dict literal in `topics = {...}`."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return ast.literal_eval(node.value)
    return {}


def _docstrings(tree: ast.Module) -> list[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented))
    return [inspect.cleandoc(text) for text in texts if text and len(text) > 40]


def _cached_shakespeare() -> str:
    path = cache_folder() / "tinyshakespeare.txt"
    if not path.exists():
        data = _download(SHAKESPEARE_URL, SHAKESPEARE_BYTES)
        _check_digest(data, "the download of tiny Shakespeare")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
        return data.decode("utf-8")
    with open(path, "rb") as file:
        data = file.read(SHAKESPEARE_BYTES + 1)
    _check_digest(data, f"{path} (delete it to download it again)")
    return data.decode("utf-8")


def _check_digest(data: bytes, what: str) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if len(data) != SHAKESPEARE_BYTES or digest != SHAKESPEARE_SHA256:
        raise ValueError(
            f"{what} is not the expected file: {len(data)} bytes with SHA-256 {digest}, "
            f"expected {SHAKESPEARE_BYTES} bytes with SHA-256 {SHAKESPEARE_SHA256}"
        )


def _download(url: str, size: int) -> bytes:
    """The bytes behind `url`, with a progress bar. Raises ConnectionError if they do not all arrive."""
    from tqdm.auto import tqdm  # here, because it is slow to import and every worker imports this module

    received = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            with tqdm(total=size, unit="B", unit_scale=True, desc="tiny Shakespeare") as bar:
                while chunk := response.read(1 << 16):
                    received += chunk
                    bar.update(len(chunk))
                    if len(received) > size:
                        raise ValueError(f"{url} sends more than the expected {size} bytes: it is another file")
            announced = int(response.headers.get("Content-Length") or len(received))
        if len(received) < announced:
            raise ConnectionError(f"interrupted after {len(received)} of {announced} bytes")
    except (urllib.error.URLError, HTTPException, OSError) as error:
        raise ConnectionError(
            f"could not download {url}: {error}. Offline, use --corpus pydocs, which needs no network, "
            f"or put the file at {cache_folder() / 'tinyshakespeare.txt'}"
        ) from error
    return bytes(received)


def check_tokens(tokens: torch.Tensor, vocab_size: int) -> None:
    """Raise ValueError unless `tokens` are int64 numbers in [0, vocab_size). For where data enters: it reads the values."""
    if tokens.dtype != torch.int64:
        raise ValueError(f"tokens must be int64, got {tokens.dtype}")
    if tokens.numel() and not (0 <= int(tokens.min()) and int(tokens.max()) < vocab_size):
        low, high = int(tokens.min()), int(tokens.max())
        raise ValueError(f"tokens must lie in [0, {vocab_size}), got values from {low} to {high}")
