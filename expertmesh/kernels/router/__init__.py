"""The dense part of a router: logits, scores, the k best, gates, counters."""

from expertmesh.kernels.router.op import (
    counts_few,
    router_choose,
    router_count,
    router_gates,
    router_logits,
    router_select,
    serves,
)

__all__ = [
    "counts_few",
    "router_choose",
    "router_count",
    "router_gates",
    "router_logits",
    "router_select",
    "serves",
]
