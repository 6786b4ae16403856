"""What the layers counted, on all ranks together."""

import torch
import torch.distributed as dist
from torch import nn

from expertmesh.dispatch.collectives import Group
from expertmesh.layer import moe_layers
from expertmesh.metrics import Metric
from expertmesh.parallel.agreement import Agreement
from expertmesh.parallel.mesh import Mesh

_OPERATIONS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}


def read_metrics(model: nn.Module, mesh: Mesh, ranks: Agreement) -> dict[str, dict[str, Metric]]:
    """Counters of every MoE layer by its name, since the last reading; the same on every rank.

    Args:
        model: What this rank has of it.
        mesh: What it was laid out over.
        ranks: All ranks of the mesh.
    """
    own = {name: moe.metrics(reset=True) for name, moe in moe_layers(model).items()}
    for metrics in own.values():
        for name, metric in metrics.items():
            metrics[name] = _reduced(metric, mesh.stage)
    if mesh.degree("pp") == 1:
        return own
    # Other stages have other layers; the ranks of one stage now agree.
    layers: dict[str, dict[str, Metric]] = {}
    for part in ranks.gather(own):
        layers |= part
    return dict(sorted(layers.items(), key=lambda item: _place(item[0])))


def _reduced(metric: Metric, group: Group) -> Metric:
    if group.process_group is None:
        return metric
    value = metric.value.to(group.device, copy=True)
    dist.all_reduce(value, op=_OPERATIONS[metric.reduce], group=group.process_group)
    return Metric(value.to("cpu"), metric.reduce)


def _place(name: str) -> list[tuple[int, str]]:
    """Sorts layer 10 behind layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def largest(value: float, ranks: Agreement) -> float:
    """The largest of the ranks' values."""
    return max(ranks.gather(value))


def anyone(flag: bool, mesh: Mesh) -> bool:
    """Whether the flag is set on any rank."""
    group = mesh.everyone
    if group.process_group is None:
        return flag
    raised = torch.tensor(int(flag), device=group.device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=group.process_group)
    return bool(raised)
