"""Routers: which experts take which tokens, and with what weight."""

from expertmesh.routing.bias import SelectionBias, update_selection_bias
from expertmesh.routing.capacity import Capacity
from expertmesh.routing.group_limit import GroupLimit
from expertmesh.routing.losses import (
    BalanceLoss,
    Evidence,
    ImportanceLoss,
    LoadBalancingLoss,
    LoadLoss,
    ZLoss,
)
from expertmesh.routing.noise import InputJitter, LearnedNoise, Noise, NormalNoise, UniformNoise
from expertmesh.routing.presets import ROUTER_PRESETS, router_preset
from expertmesh.routing.router import Router
from expertmesh.routing.routing import Routing
from expertmesh.routing.second_choice import RandomSecond, ThresholdSecond
from expertmesh.routing.topk import TopKRouter

__all__ = [
    "ROUTER_PRESETS",
    "BalanceLoss",
    "Capacity",
    "Evidence",
    "GroupLimit",
    "ImportanceLoss",
    "InputJitter",
    "LearnedNoise",
    "LoadBalancingLoss",
    "LoadLoss",
    "Noise",
    "NormalNoise",
    "RandomSecond",
    "Router",
    "Routing",
    "SelectionBias",
    "ThresholdSecond",
    "TopKRouter",
    "UniformNoise",
    "ZLoss",
    "router_preset",
    "update_selection_bias",
]
