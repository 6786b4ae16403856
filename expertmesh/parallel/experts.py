"""Experts dealt out over the expert grid: which rank holds what, and the layers' way to it."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from expertmesh.dispatch import Dispatcher
from expertmesh.dispatch.all_to_all import AllToAllDispatcher
from expertmesh.dispatch.static import StaticDispatcher
from expertmesh.errors import UserError
from expertmesh.experts import Experts
from expertmesh.experts.stacked import StackedMLPExperts
from expertmesh.layer import MoE
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.population import RankPopulation

DISPATCHERS: dict[str, type[AllToAllDispatcher] | type[StaticDispatcher]] = {
    "all_to_all": AllToAllDispatcher,
    "static": StaticDispatcher,
}
"""Ways of moving tokens between ranks, by name."""


def distinct_moe_layers(model: nn.Module) -> list[MoE]:
    """Every MoE layer once, also one that is used at several depths."""
    return [module for module in model.modules() if isinstance(module, MoE)]


def check_experts(model: nn.Module, mesh: Mesh, dispatch: str) -> None:
    """Refuse a model whose experts do not fit the mesh, and an unknown way of moving tokens.

    Raises:
        UserError: Naming the layer's numbers and what would work.
    """
    if dispatch not in DISPATCHERS:
        raise UserError(f"dispatch must be one of {', '.join(DISPATCHERS)}, got {dispatch!r}")
    ep, etp = mesh.degree("ep"), mesh.degree("etp")
    for moe in distinct_moe_layers(model):
        experts = moe.experts
        mesh.grid.check_experts(experts.num_experts)
        kind = type(experts).__name__
        if experts.hidden_dims is None and ep * etp > 1:
            raise UserError(
                f"{kind} does not stack its experts, so they cannot be dealt out over ranks; "
                f"set ep=1 and etp=1, got ep={ep}, etp={etp}"
            )
        if etp > 1 and not experts.hidden_separable:
            raise UserError(
                f"{kind} cannot be cut into hidden slices, got etp={etp}; set etp=1, and ep or "
                "edp to use the ranks"
            )
        for name, tensor, dim in _stacked(experts):
            if dim is not None and tensor.shape[dim] % etp:
                raise UserError(
                    f"etp must divide the hidden width of {name}, got etp={etp} for "
                    f"{tensor.shape[dim]} hidden units; set etp to a divisor of it"
                )


def place_experts(
    model: nn.Module, mesh: Mesh, *, dispatch: str = "all_to_all", averaged: int = 1
) -> None:
    """Keep of every layer's experts this rank's part, and connect the layers to the mesh.

    Stacked parameters become ``DTensor``s over ``(ep, etp)``. Every rank cuts its part from its
    own values, which must be the same everywhere; on the meta device nothing is cut.

    Args:
        model: Holds MoE layers; changed in place.
        mesh: Every rank's place.
        dispatch: A key of ``DISPATCHERS``.
        averaged: Ranks over which gradients will be averaged (DDP); 1 where they are summed.
    """
    check_experts(model, mesh, dispatch)
    if mesh.world == 1:
        return
    for moe in distinct_moe_layers(model):
        moe.router.population = RankPopulation(
            mesh.stage, mesh.group(("cp", "tp")), averaged=averaged
        )
        moe.dispatcher = _dispatcher(moe, mesh, dispatch)
        if mesh.degree("ep") * mesh.degree("etp") > 1:
            _shard(moe.experts, mesh.submesh(("ep", "etp")))


def _dispatcher(moe: MoE, mesh: Mesh, dispatch: str) -> Dispatcher:
    group = mesh.group(("ep", "etp"))
    if group.size == 1:
        return moe.dispatcher
    rounded = isinstance(moe.experts, StackedMLPExperts)
    num_experts, etp = moe.experts.num_experts, mesh.degree("etp")
    return DISPATCHERS[dispatch](group, num_experts, etp, rounded=rounded)


def _stacked(experts: Experts) -> Iterator[tuple[str, Tensor, int | None]]:
    """Name, tensor and hidden dim of everything that is stacked."""
    for name, dim in (experts.hidden_dims or {}).items():
        module_name, _, leaf = name.rpartition(".")
        tensor = getattr(experts.get_submodule(module_name), leaf)
        if tensor is not None:
            yield name, tensor, dim


@torch.no_grad()
def _shard(experts: Experts, mesh: DeviceMesh) -> None:
    made: dict[int, Tensor] = {}  # by identity, so that tied tensors stay tied
    for name, tensor, dim in list(_stacked(experts)):
        module_name, _, leaf = name.rpartition(".")
        owner = experts.get_submodule(module_name)
        part = made.setdefault(id(tensor), tensor)
        if part is tensor:
            part = made[id(tensor)] = _cut(tensor, mesh, dim)
        if isinstance(part, nn.Parameter):
            owner.register_parameter(leaf, part)
        else:
            owner.register_buffer(leaf, part)


def _cut(tensor: Tensor, mesh: DeviceMesh, hidden_dim: int | None) -> Tensor:
    """This rank's part of a stacked tensor that every rank has whole."""
    placements: tuple[Placement, Placement] = (
        Shard(0),
        Replicate() if hidden_dim is None else Shard(hidden_dim),
    )
    part = tensor.detach()
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            size = part.shape[placement.dim] // mesh.size(axis)
            part = part.narrow(placement.dim, mesh.get_local_rank(axis) * size, size)
    # A copy, so that the whole can be freed.
    part = part.contiguous() if tensor.is_meta else part.clone()
    whole: Tensor = DTensor.from_local(
        part, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )
    return nn.Parameter(whole, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole
