"""A model as a file: a line with the SHA-256 of all that follows, then what `torch.save` writes.

    minimoe model, sha256 5d41402abc...
    {"config": ..., "corpus": ..., "state": ...}     plain values and tensors, no pickled code

Whoever reads the file checks the bytes first, and then that its tensors have the shapes that its config declares, so that no
config takes more memory than the file itself. Files from before version 0.4 have no such line: of them only the shapes are
checked.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from .config import Config, config_from_dict, config_to_dict
from .corpus import Alphabet
from .files import write_whole
from .memory import require_room

if TYPE_CHECKING:
    from .model import MiniMoE

TITLE = b"minimoe model, sha256 "
HEAD = len(TITLE) + 64 + 1  # bytes of the first line
ZIP = b"PK"  # what torch.save begins with
COPIES = 4  # of a file, at least, are in memory while it is read: its bytes, torch's, the tensors and the model


def save(model: MiniMoE, path: str | os.PathLike) -> None:
    """Write the model to one file, whole or not at all. Raises OSError if it cannot be written."""
    content, corpus = io.BytesIO(), model.alphabet and asdict(model.alphabet)
    torch.save({"config": config_to_dict(model.config), "corpus": corpus, "state": model.state_dict()}, content)
    data = content.getvalue()
    write_whole(path, _head(data) + data)


def load(kind: type[MiniMoE], path: str | os.PathLike) -> MiniMoE:
    """The model that `save` wrote, on the CPU. Raises OSError, or ValueError for another file, or a damaged one."""
    data = _checked_bytes(path)
    try:
        saved = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch says of it
        raise ValueError(f"{path} is not a model saved by minimoe: torch cannot read it") from error
    try:
        config, state, corpus = config_from_dict(saved["config"]), saved["state"], saved.get("corpus")
        _require_declared(kind, config, state)
        model = kind(config).to(next(iter(state.values())).dtype)
        model.load_state_dict(state)
        model.alphabet = corpus and Alphabet(**corpus)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is not a model saved by minimoe ({type(error).__name__}: {error})") from error
    return model


def _head(data: bytes) -> bytes:
    return TITLE + hashlib.sha256(data).hexdigest().encode() + b"\n"


def _checked_bytes(path: str | os.PathLike) -> bytes:
    """What torch.save wrote. Raises ValueError if it is something else, has changed since, or is larger than memory."""
    with open(path, "rb") as file:
        head = file.read(HEAD)
        if not head.startswith((TITLE, ZIP)):
            raise ValueError(f"{path} is not a model saved by minimoe")
        require_room("model", path, COPIES)
        data = file.read()
    if head.startswith(ZIP):
        return head + data
    if head != _head(data):
        raise ValueError(f"{path} is damaged: its checksum is wrong. Take another copy of it, or train the model again")
    return data


def _require_declared(kind: type[MiniMoE], config: Config, state: dict) -> None:
    """Raise ValueError unless the tensors are those that the config declares, all of one type, each with all its values."""
    if config.depth > len(state):  # before so many blocks are listed
        raise ValueError(f"depth={config.depth}: the file has {len(state)} tensors")
    with torch.device("meta"):  # shapes without values
        declared = {name: tensor.shape for name, tensor in kind(config).state_dict().items()}
    if declared != {name: tensor.shape for name, tensor in state.items()}:
        raise ValueError("its tensors are not those of its config")
    if len({tensor.dtype for tensor in state.values()}) > 1 or not all(tensor.is_contiguous() for tensor in state.values()):
        raise ValueError("its tensors are of several types, or not whole")
