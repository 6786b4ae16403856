"""Mixture-of-Experts for PyTorch: one layer, the same numbers on every mesh.

The public names are those of ``_PLACES``; models, data, training and reports live in the
sub-packages ``expertmesh.models``, ``expertmesh.parallel``, ``expertmesh.data``,
``expertmesh.train``, ``expertmesh.report``, ``expertmesh.hf`` and ``expertmesh.testing``.

Names are looked up when first used: the command line prints its help, and says how threads should
wait, before torch is imported. ``__init__.pyi`` holds the same names for type checkers.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PLACES = {
    "errors": ["CausalityWarning", "MissingDependency", "UserError"],
    "experts": [
        "DoublyGatedMLPExperts",
        "Experts",
        "GatedMLPExperts",
        "HeterogeneousExperts",
        "MLPExperts",
        "ModuleExperts",
        "ScaledInputExperts",
        "UnequalGatedMLPExperts",
        "UnequalMLPExperts",
    ],
    "layer": ["MoE", "MoELoss", "moe_layers", "set_loss_scale"],
    "metrics": ["Metric", "RoutingSummary", "summarize"],
    "parallel.clip": ["clip_grad_norm_"],
    "parallel.ddp": ["ddp", "param_groups"],
    "parallel.fsdp": ["gradient_sync", "parallelize"],
    "parallel.mesh": ["Mesh"],
    "parallel.together": ["together"],
    "phases": ["time_phases"],
    "random": ["RandomKey"],
    "residual_moe": ["GatedShared", "ResidualMoE"],
    "routing": [
        "BaseRouter",
        "BatchwiseRouter",
        "Capacity",
        "CommunicationBalanceLoss",
        "CosineRouter",
        "DeviceBalanceLoss",
        "ExpertChoiceRouter",
        "FixedRouter",
        "GlobalEntropyLoss",
        "GroupLimit",
        "HashRouter",
        "HierarchicalLoadLoss",
        "HierarchicalRouter",
        "ImportanceLoss",
        "InputJitter",
        "LearnedNoise",
        "LoadBalancingLoss",
        "LoadLoss",
        "LocalEntropyLoss",
        "NormalNoise",
        "PerSequence",
        "PerTask",
        "RandomSecond",
        "RoundRobinRouter",
        "Router",
        "Routing",
        "SelectionBias",
        "SinkhornRouter",
        "ThorRouter",
        "ThresholdLoss",
        "ThresholdSecond",
        "TokenCap",
        "TokenChoice",
        "TopKRouter",
        "UniformNoise",
        "UniformRouter",
        "ZLoss",
        "balanced_table",
        "clustered_table",
        "consistency_loss",
        "dispersed_table",
        "random_table",
        "router_preset",
        "update_selection_bias",
    ],
    "soft_moe": ["SoftMoE"],
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

__all__ = ["__version__", *_MODULES]


def __getattr__(name: str) -> Any:
    """Look a public name up, once."""
    if name not in _MODULES:
        raise AttributeError(f"module 'expertmesh' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"expertmesh.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What ``dir`` and completion show."""
    return sorted({*globals(), *__all__})
