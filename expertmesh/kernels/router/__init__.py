"""The dense part of a router: logits, scores, the k best, gates, losses, counters."""

from expertmesh.kernels.router.op import (
    router_balance,
    router_choose,
    router_count,
    router_gates,
    router_logits,
    router_select,
    router_sums,
    router_z,
)
from expertmesh.kernels.router.support import counts, logits_refusal, serves, statistics_refusal

__all__ = [
    "counts",
    "logits_refusal",
    "router_balance",
    "router_choose",
    "router_count",
    "router_gates",
    "router_logits",
    "router_select",
    "router_sums",
    "router_z",
    "serves",
    "statistics_refusal",
]
