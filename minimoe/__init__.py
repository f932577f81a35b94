"""minimoe: muP for Mixture-of-Experts, in one readable model file and the tools that check it.

Start with `minimoe/model.py`; the rules are the tables in `minimoe/tables.py`.
"""

from importlib import import_module

__version__ = "0.1.0"

_HOMES = {
    "adoption": ("Plan", "adopt"),
    "adopted_sweeps": ("adopted_sweep", "read_adopted"),
    "allocation_figures": ("allocation_map", "learning_shares", "promise_and_fall"),
    "allocations": ("Ledger", "allocation"),
    "arms": ("ARMS", "BRIDGE_ARMS", "CAPACITY_ARMS", "EXPERT_ARMS", "REGIME_ARMS", "SHARE_ARMS", "labelled"),
    "causal": ("growing",),
    "comparison_figures": ("overlay_curves", "three_terms", "verdict_map"),
    "config": ("Config",),
    "coordinate_figures": ("coordinate_curves", "exponents_chart", "router_rules", "tensor_curves"),
    "coordinates": ("coordinate_check",),
    "corpus": ("Corpus", "check_tokens", "load_corpus", "make_corpus"),
    "depth_figures": ("linearisation_curves",),
    "diagnoses": ("diagnosis", "suspects"),
    "exercises": (
        "check_allocation",
        "check_budget",
        "check_coordinates",
        "check_deep_mended",
        "check_gates",
        "check_mended",
        "check_missed",
        "check_router_row",
        "check_sign_step",
        "shipped",
    ),
    "explanations": ("explain", "side_by_side"),
    "explorers": ("CoordinateExplorer", "TableExplorer"),
    "lr_explorer": ("LRExplorer",),
    "figures": ("drift_chart", "lr_curves"),
    "scaling_laws": ("joint_law",),
    "linearisations": ("linearisation",),
    "live": ("LiveSweep",),
    "model": ("MiniMoE", "Output"),
    "modules": ("check_module",),
    "mutations": ("deep_mystery", "mutants", "mystery"),
    "optima_figures": ("optima_curves",),
    "parametrization": (
        "Monomial",
        "Parametrization",
        "Rule",
        "active_width",
        "batch",
        "depth",
        "duration",
        "expert_width",
        "fan_in",
        "granularity",
        "n_experts",
        "top_k",
        "width",
    ),
    "power_figures": ("power", "power_curves"),
    "rate_figures": ("factor_curves", "gain_chart", "schedule_curves"),
    "roles": ("initialise", "param_groups", "parameter"),
    "roles_by_use": ("Refused",),
    "step": ("TrainOptions",),
    "sweeps": ("read_sweep", "sweep"),
    "tables": (
        "AS_IT_IS",
        "PARAMETRIZATIONS",
        "READINGS",
        "REGIMES",
        "RELATIVE_RATES",
        "ROUTER_RULES",
        "relative_rates",
        "shift",
        "square_root_rule",
    ),
    "theory": ("predicted_exponents", "predictions"),
    "training": ("Run", "train"),
    "transfer": ("at_best_lr", "beside", "drift_words", "losses_at", "regrets", "summary", "transfer_report"),
    "upcycling": ("first_losses", "upcycled"),
    "verdicts": ("exponents",),
    "weights": ("weight_sizes",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME_OF)


def __getattr__(name: str):
    """Names are imported when first used: a sweep's workers then start without pandas and matplotlib."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'minimoe' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
