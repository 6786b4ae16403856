"""The gradient's global norm, each logical parameter counted once."""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from expertmesh.parallel.mesh import Mesh
from expertmesh.shards import is_sharded, shard_of


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float, mesh: Mesh) -> Tensor:
    """Scale all gradients so that their global norm is at most ``max_norm``.

    The norm is the square root of the sum of squares over the logical parameters, however many
    ranks hold copies or pieces of each; a parameter that is used at several depths counts once.

    Args:
        model: Its gradients must be complete, that is, summed over ranks.
        max_norm: At least 0; infinite only measures.
        mesh: What the model was laid out over.

    Returns:
        The norm before clipping, the same on every rank; float32 or wider.
    """
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = grad_norm(parameters, mesh)
    if math.isfinite(max_norm):
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for param in parameters:
            grad = _local_grad(param)
            grad.mul_(factor.to(grad.dtype))
    return norm


@torch.no_grad()
def grad_norm(parameters: list[nn.Parameter], mesh: Mesh) -> Tensor:
    """The global norm of the gradients; all ranks of the mesh must ask together."""
    group = mesh.everyone
    square = torch.zeros((), dtype=_accumulator(parameters), device=group.device)
    for param in parameters:
        grad = _local_grad(param)
        if grad.numel():
            own = torch.linalg.vector_norm(grad, dtype=square.dtype).square()
            square += own / copies(param, mesh.grid.stage_size)
    if group.process_group is not None:
        dist.all_reduce(square, group=group.process_group)
    return square.sqrt()


def _accumulator(parameters: list[nn.Parameter]) -> torch.dtype:
    wide = any(param.dtype == torch.float64 for param in parameters)
    return torch.float64 if wide else torch.float32


def _local_grad(param: nn.Parameter) -> Tensor:
    assert param.grad is not None
    return shard_of(param.grad).local


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
