"""Experts: stacked weights behind one call."""

from expertmesh.experts.base import Experts
from expertmesh.experts.doubly_gated import DoublyGatedMLPExperts
from expertmesh.experts.gated import GatedMLPExperts
from expertmesh.experts.heterogeneous import HeterogeneousExperts
from expertmesh.experts.mlp import MLPExperts
from expertmesh.experts.module import ModuleExperts
from expertmesh.experts.scaled_input import ScaledInputExperts
from expertmesh.experts.unequal import UnequalGatedMLPExperts, UnequalMLPExperts

__all__ = [
    "DoublyGatedMLPExperts",
    "Experts",
    "GatedMLPExperts",
    "HeterogeneousExperts",
    "MLPExperts",
    "ModuleExperts",
    "ScaledInputExperts",
    "UnequalGatedMLPExperts",
    "UnequalMLPExperts",
]
