"""The dense part of a router: logits, scores, the k best, gates, counters."""

from expertmesh.kernels.router.op import (
    counts,
    router_balance,
    router_choose,
    router_count,
    router_gates,
    router_logits,
    router_select,
    serves,
)

__all__ = [
    "counts",
    "router_balance",
    "router_choose",
    "router_count",
    "router_gates",
    "router_logits",
    "router_select",
    "serves",
]
