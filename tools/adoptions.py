"""Write docs/architectures.md: what `adopt` makes of transformers' MoE models, each tiny and random.

python tools/adoptions.py    about ten seconds
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from architectures import FAMILIES, OTHERS, REFUSED, build, tokens  # noqa: E402
from minimoe import Refused, adopt  # noqa: E402

PAGE = ROOT / "docs" / "architectures.md"
HEAD = """# What `adopt` makes of transformers' MoE models

Made by `python tools/adoptions.py`, with transformers {version}. Each model is tiny and random: widths 64 and 128, 2 layers,
8 experts. The names leave out the layer. *Other kinds* are matrices between a fixed size and the width that are no router,
readout or embedding: muP gives them the row of an output or of an input weight. The eight models with a check mark keep all of
muP's desiderata over widths 32 to 256 with three seeds ([the test](../tests/test_adopted_families.py)).

| model | checked | router | experts | readout | other kinds |
|---|---|---|---|---|---|
"""
REFUSALS = """
## Refused

What the forward pass leaves open is an error that names the parameter and the remedy.

"""


def page() -> str:
    """The page, as it should be."""
    rows = [f"| {name} | {'✓' if name in FAMILIES else ''} | {' | '.join(_cells(name))} |" for name in (*FAMILIES, *OTHERS)]
    said = [f"* `{name}`: {_refusal(name)}" for name in REFUSED]
    return HEAD.format(version=transformers.__version__) + "\n".join(rows) + "\n" + REFUSALS + "\n".join(said) + "\n"


def _plan(name: str):
    torch.manual_seed(0)
    return adopt(lambda width: build(name, width), 128, 64, tokens())


def _cells(name: str) -> list[str]:
    """Router, experts, readout, other kinds."""
    plan = _plan(name)
    usual = {"hidden": None, "output": ("router", "unembedding", "tied"), "input": ("embedding", "gain", "bias")}
    other = {
        f"{own.tensor} ({own.kind})": None for own in plan.parameters if own.role not in (usual.get(own.kind) or (own.role,))
    }
    readout = f"tied, folded into {', '.join(plan.readout_norm)}" if plan.tied else _tensors(plan, "unembedding")
    return [_tensors(plan, "router"), _tensors(plan, "experts_up", "experts_down"), readout, _short(other)]


def _tensors(plan, *roles: str) -> str:
    return _short(dict.fromkeys(own.tensor for own in plan.parameters if own.role in roles))


def _short(names) -> str:
    return ", ".join(name.removeprefix("model.").removeprefix("layers.*.") for name in names)


def _refusal(name: str) -> str:
    try:
        _plan(name)
    except Refused as refused:
        lines = [line.replace("layers.0.", "layers.*.").replace("layers.1.", "layers.*.") for line in str(refused).splitlines()]
        return "; ".join(dict.fromkeys(lines))
    raise AssertionError(f"{name} was not refused")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
