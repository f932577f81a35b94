"""minimoe: muP for Mixture-of-Experts, in one readable model file and the tools that check it.

Start with `minimoe/model.py`; the rules are the tables in `minimoe/parametrization.py`.
"""

__version__ = "0.1.0"

from .corpus import Corpus, load_corpus, make_corpus
from .explain import explain
from .figures import lr_curves
from .model import Config, MiniMoE, Output, check_tokens
from .parametrization import (
    PARAMETRIZATIONS,
    Monomial,
    Parametrization,
    Rule,
    fan_in,
    initialise,
    param_groups,
    parameter,
    width,
)
from .sweeps import read_sweep, sweep
from .training import Run, TrainOptions, train
from .transfer import transfer_report

__all__ = [
    "PARAMETRIZATIONS",
    "Config",
    "Corpus",
    "MiniMoE",
    "Monomial",
    "Output",
    "Parametrization",
    "Rule",
    "Run",
    "TrainOptions",
    "check_tokens",
    "explain",
    "fan_in",
    "initialise",
    "load_corpus",
    "lr_curves",
    "make_corpus",
    "param_groups",
    "parameter",
    "read_sweep",
    "sweep",
    "train",
    "transfer_report",
    "width",
]
