"""Routers: which experts take which tokens, and with what weight."""

from expertmesh.routing.base_layers import BaseRouter
from expertmesh.routing.batchwise import BatchwiseRouter, ThresholdLoss
from expertmesh.routing.bias import SelectionBias, update_selection_bias
from expertmesh.routing.capacity import Capacity
from expertmesh.routing.cosine import CosineRouter
from expertmesh.routing.entropy import GlobalEntropyLoss, LocalEntropyLoss
from expertmesh.routing.evidence import Evidence
from expertmesh.routing.expert_choice import ExpertChoiceRouter, TokenCap
from expertmesh.routing.fixed import FixedRouter, RoundRobinRouter, UniformRouter
from expertmesh.routing.granularity import PerSequence, PerTask
from expertmesh.routing.group_limit import GroupLimit
from expertmesh.routing.group_losses import CommunicationBalanceLoss, DeviceBalanceLoss
from expertmesh.routing.hash import HashRouter
from expertmesh.routing.hash_tables import (
    balanced_table,
    clustered_table,
    dispersed_table,
    random_table,
)
from expertmesh.routing.hierarchical import HierarchicalLoadLoss, HierarchicalRouter
from expertmesh.routing.losses import (
    BalanceLoss,
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
from expertmesh.routing.sinkhorn import SinkhornRouter
from expertmesh.routing.thor import ThorRouter, consistency_loss
from expertmesh.routing.token_choice import TokenChoice
from expertmesh.routing.topk import TopKRouter

__all__ = [
    "ROUTER_PRESETS",
    "BalanceLoss",
    "BaseRouter",
    "BatchwiseRouter",
    "Capacity",
    "CommunicationBalanceLoss",
    "CosineRouter",
    "DeviceBalanceLoss",
    "Evidence",
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
    "Noise",
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
]
