"""Experts dealt out over ranks under ``DistributedDataParallel``."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from expertmesh.dispatch.collectives import Group
from expertmesh.errors import UserError
from expertmesh.parallel.experts import distinct_moe_layers, place_experts
from expertmesh.parallel.fsdp import copy_values_of_first_rank
from expertmesh.parallel.guard import check_free, refuse_wrappers
from expertmesh.parallel.mesh import Mesh
from expertmesh.routing import SelectionBias
from expertmesh.shards import is_sharded, shard_of


def ddp(
    model: nn.Module, mesh: Mesh, *, dispatch: str = "all_to_all", **options: Any
) -> DistributedDataParallel:
    """Wrap a model in DDP, with its experts dealt out over the mesh instead of copied.

    DDP averages gradients over all ranks. Experts are left out of that: each gradient is summed
    over the ranks that hold copies of the expert and divided by the number of all ranks, which
    gives what DDP would have given for an expert on every rank. ``no_sync`` works for both.
    Balance losses are taken over all ranks' tokens and count once, as in one process; in
    accumulation tell the layers each micro-batch's share with ``set_loss_scale``.

    Give the optimizer ``param_groups(model)``, and clip with ``clip_grad_norm_(model, max_norm,
    mesh)``: torch's own, given some parameters that are dealt out and some that are not, raises an
    error.

    Args:
        model: On this rank's device, the same on all ranks; those of the first rank count.
        mesh: Over all ranks of the process group; its axes pp, cp and tp are 1.
        dispatch: As for ``parallelize``.
        options: For ``DistributedDataParallel``.

    Returns:
        The wrapped model.

    Raises:
        UserError: If the mesh cuts more than experts, or the model does not fit it or lies on one
            already.
    """
    cut = [axis for axis in ("pp", "cp", "tp") if mesh.degree(axis) > 1]
    if cut:
        raise UserError(
            f"DDP copies everything but the experts, got a mesh with {', '.join(cut)} above 1; "
            "use expertmesh.parallelize for those"
        )
    if mesh.world == 1:
        raise UserError("DDP needs several processes, got a mesh of one; start with torchrun")
    check_free(model, "ddp")
    copy_values_of_first_rank(model, mesh)
    place_experts(model, mesh, dispatch=dispatch, averaged=mesh.world)
    _leave_to_us(model)
    # Known to be equal already; and of the experts DDP must not copy one rank's to all.
    wrapped = DistributedDataParallel(model, init_sync=False, **options)
    _Reduction(wrapped, mesh)
    refuse_wrappers(wrapped, "ddp")
    return wrapped


def param_groups(model: nn.Module) -> list[dict[str, list[nn.Parameter]]]:
    """A model's parameters for an optimizer: plain ones, and experts dealt out over ranks.

    torch steps all tensors of a group at once, which must then be of one kind; on a CPU, where it
    steps them one by one, ``model.parameters()`` does as well.

    Args:
        model: Wrapped or not.

    Returns:
        One or two groups, each in the model's order.
    """
    kinds: dict[bool, list[nn.Parameter]] = {False: [], True: []}
    for param in model.parameters():
        kinds[is_sharded(param)].append(param)
    return [{"params": params} for params in kinds.values() if params]


class _Reduction:
    """Brings the experts' gradients together whenever DDP does so with the others."""

    def __init__(self, wrapped: DistributedDataParallel, mesh: Mesh) -> None:
        self._wrapped = wrapped
        self._copies = mesh.group("edp")
        self._tokens_from = mesh.group(("ep", "etp")).size
        self._syncs = True
        # DDP decides at a forward pass whether the backward pass that follows brings together.
        wrapped.register_forward_pre_hook(self._remember)
        for param in _expert_parameters(wrapped.module):
            if param.requires_grad:
                param.register_hook(self._share)
                param.register_post_accumulate_grad_hook(self._average)

    def _remember(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._syncs = self._wrapped.require_backward_grad_sync

    def _share(self, grad: Tensor) -> Tensor:
        """An increment holds the sum over the ranks whose tokens came here."""
        return grad / self._tokens_from

    def _average(self, param: Tensor) -> None:
        if self._syncs and param.grad is not None:
            _average_over(shard_of(param.grad).local, self._copies)


@torch.no_grad()
def _average_over(grad: Tensor, group: Group) -> None:
    if group.process_group is not None:
        dist.all_reduce(grad, group=group.process_group)
        grad /= group.size


def _expert_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Each once, in an order that is the same on all ranks."""
    found: dict[int, nn.Parameter] = {}
    for moe in distinct_moe_layers(model):
        found |= {id(param): param for param in moe.experts.parameters()}
    return list(found.values())


def _leave_to_us(model: nn.Module) -> None:
    """Name to DDP the experts' parameters, and the counters that are each rank's own."""
    ours = {id(param) for param in _expert_parameters(model)}
    for moe in distinct_moe_layers(model):
        ours |= {id(buffer) for buffer in moe.experts.buffers()}
    for module in model.modules():
        if isinstance(module, SelectionBias):
            ours |= {id(buffer) for buffer in module.buffers()}
    tensors = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    names = [name for name, tensor in tensors if id(tensor) in ours]
    # DDP looks a root's own tensor up under a name that begins with a dot.
    names += [f".{name}" for name in names if "." not in name]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
