"""The public names, for type checkers; at run time ``__init__.py`` looks them up."""

from expertmesh.errors import MissingDependency, UserError
from expertmesh.experts import (
    Experts,
    GatedMLPExperts,
    HeterogeneousExperts,
    MLPExperts,
    ModuleExperts,
)
from expertmesh.layer import MoE, MoELoss, moe_layers, set_loss_scale
from expertmesh.metrics import Metric, RoutingSummary, summarize
from expertmesh.parallel.clip import clip_grad_norm_
from expertmesh.parallel.ddp import ddp
from expertmesh.parallel.fsdp import gradient_sync, parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.phases import time_phases
from expertmesh.random import RandomKey
from expertmesh.routing import (
    Capacity,
    GroupLimit,
    ImportanceLoss,
    InputJitter,
    LearnedNoise,
    LoadBalancingLoss,
    LoadLoss,
    NormalNoise,
    RandomSecond,
    Router,
    Routing,
    SelectionBias,
    ThresholdSecond,
    TopKRouter,
    UniformNoise,
    ZLoss,
    router_preset,
    update_selection_bias,
)

__version__: str

__all__ = [
    "Capacity",
    "Experts",
    "GatedMLPExperts",
    "GroupLimit",
    "HeterogeneousExperts",
    "ImportanceLoss",
    "InputJitter",
    "LearnedNoise",
    "LoadBalancingLoss",
    "LoadLoss",
    "MLPExperts",
    "Mesh",
    "Metric",
    "MissingDependency",
    "MoE",
    "MoELoss",
    "ModuleExperts",
    "NormalNoise",
    "RandomKey",
    "RandomSecond",
    "Router",
    "Routing",
    "RoutingSummary",
    "SelectionBias",
    "ThresholdSecond",
    "TopKRouter",
    "UniformNoise",
    "UserError",
    "ZLoss",
    "__version__",
    "clip_grad_norm_",
    "ddp",
    "gradient_sync",
    "moe_layers",
    "parallelize",
    "router_preset",
    "set_loss_scale",
    "summarize",
    "time_phases",
    "update_selection_bias",
]
