"""The gradient's global norm, each logical parameter counted once."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expertmesh.gradients import clip_factor, gradients_of, norms, scale_
from expertmesh.parallel.mesh import Mesh
from expertmesh.shards import is_sharded


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, mesh: Mesh) -> Tensor:
    """Scale all gradients so that their global norm is at most ``max_norm``.

    The norm is the square root of the sum of squares over the logical parameters, however many
    ranks hold copies or pieces of each; a parameter that is used at several depths counts once.
    The host waits for it: gradients within the bound are then not touched.

    Args:
        model: Its gradients must be complete, that is, summed over ranks.
        max_norm: At least 0; infinite only measures.
        mesh: What the model was laid out over.

    Returns:
        The norm before clipping, the same on every rank; float32 or wider.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = grad_norm(parameters, mesh)
    scale_(gradients_of(parameters), clip_factor(float(norm), max_norm))
    return norm


@torch.no_grad()
def grad_norm(parameters: list[nn.Parameter], mesh: Mesh) -> Tensor:
    """The global norm of the gradients; all ranks of the mesh must ask together."""
    group = mesh.everyone
    dtype = torch.float64 if any(p.dtype == torch.float64 for p in parameters) else torch.float32
    square = torch.zeros((), dtype=dtype, device=group.device)
    alike: dict[int, list[nn.Parameter]] = {}
    for param in parameters:
        if param.grad is not None:
            alike.setdefault(copies(param, mesh.grid.stage_size), []).append(param)
    for number, params in sorted(alike.items()):
        square += norms(gradients_of(params)).square().sum() / number
    if group.process_group is not None:
        dist.all_reduce(square, group=group.process_group)
    return square.sqrt()


def copies(param: Tensor, stage_size: int) -> int:
    """On how many ranks of a stage the same numbers lie; a plain tensor is on all of them."""
    if not is_sharded(param):
        return stage_size
    mesh = param.device_mesh  # type: ignore[attr-defined]  # of a DTensor
    placements = param.placements  # type: ignore[attr-defined]
    pieces = math.prod(
        mesh.size(axis)
        for axis, placement in enumerate(placements)
        # FSDP's strided shards do not call themselves shards in every release of torch.
        if not placement.is_replicate()
    )
    return stage_size // pieces
