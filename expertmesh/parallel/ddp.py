"""Experts dealt out over ranks under ``DistributedDataParallel``."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from expertmesh.errors import UserError
from expertmesh.parallel.alike import same_placement
from expertmesh.parallel.experts import distinct_moe_layers, place_experts
from expertmesh.parallel.fsdp import copy_values_of_first_rank
from expertmesh.parallel.guard import check_free, refuse_wrappers
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.replaced import replacing
from expertmesh.routing import SelectionBias
from expertmesh.shards import is_sharded, shard_of


def ddp(
    model: nn.Module, mesh: Mesh, *, dispatch: str = "all_to_all", **options: Any
) -> DistributedDataParallel:
    """Wrap a model in DDP, with its experts dealt out over the mesh instead of copied.

    DDP averages gradients over all ranks. Experts are left out of that: each gradient is summed
    over the ranks that hold copies of the expert and divided by the number of all ranks, which
    gives what DDP would have given for an expert on every rank. That is done at the end of a
    backward pass, where a gradient that some ranks do not have counts as zero. ``no_sync`` works
    for both. Balance losses are taken over all ranks' tokens and count once, as in one process; in
    accumulation tell the layers each micro-batch's share with ``set_loss_scale``.

    Make the optimizer afterwards, of ``param_groups(model)``, and clip with
    ``clip_grad_norm_(model, max_norm, mesh)``: torch's own, given some parameters that are dealt
    out and some that are not, raises an error.

    Args:
        model: On this rank's device, the same on all ranks; those of the first rank count.
        mesh: Its axes pp, cp and tp are 1; this rank must be in it.
        dispatch: As for ``parallelize``.
        options: For ``DistributedDataParallel``; the process group is the mesh's.

    Returns:
        The wrapped model.

    Raises:
        UserError: If the mesh cuts more than experts, or the model does not fit it or lies on one
            already; on every rank, if ranks give different models or arguments.
    """
    cut = [axis for axis in ("pp", "cp", "tp") if mesh.degree(axis) > 1]
    if cut:
        raise UserError(
            f"DDP copies everything but the experts, got a mesh with {', '.join(cut)} above 1; "
            "use expertmesh.parallelize for those"
        )
    if "process_group" in options or "device_mesh" in options:
        raise UserError(
            "DDP averages over the ranks of the mesh, got process_group or device_mesh besides; "
            "leave it out, and give Mesh the ranks"
        )
    if mesh.world == 1:
        raise UserError("DDP needs several processes, got a mesh of one; start with torchrun")
    switches = {name: value for name, value in options.items() if isinstance(value, bool)}
    same_placement(model, mesh, "ddp", dispatch=dispatch, **switches)
    check_free(model, "ddp")
    copy_values_of_first_rank(model, mesh)
    with replacing(model, "ddp"):
        place_experts(model, mesh, dispatch=dispatch, averaged=mesh.world)
    _leave_to_us(model)
    # Known to be equal already; and of the experts DDP must not copy one rank's to all.
    wrapped = DistributedDataParallel(
        model, process_group=mesh.everyone.process_group, init_sync=False, **options
    )
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
    """Brings the experts' gradients together whenever DDP does so with the others.

    At the end of a backward pass, in one order: gradients come in an order that depends on which
    experts are idle on a rank, and some do not come at all, so none may be waited for as it comes.
    """

    def __init__(self, wrapped: DistributedDataParallel, mesh: Mesh) -> None:
        self._wrapped = wrapped
        self._copies = mesh.group("edp")
        self._tokens_from = mesh.group(("ep", "etp")).size
        self._experts = [p for p in _expert_parameters(wrapped.module) if p.requires_grad]
        self._syncs = True
        self._queued = False
        # DDP decides at a forward pass whether the backward pass that follows brings together.
        wrapped.register_forward_pre_hook(self._remember)
        for param in self._experts:
            param.register_hook(self._share)
        if self._copies.process_group is not None:
            # Of all parameters: a rank's experts may have no gradient where another's have one.
            for param in wrapped.module.parameters():
                if param.requires_grad:
                    param.register_post_accumulate_grad_hook(self._queue)

    def _remember(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._syncs = self._wrapped.require_backward_grad_sync

    def _share(self, grad: Tensor) -> Tensor:
        """An increment holds the sum over the ranks whose tokens came here."""
        return grad / self._tokens_from

    def _queue(self, _: Tensor) -> None:
        if self._syncs and not self._queued:
            self._queued = True
            Variable._execution_engine.queue_callback(self._average)

    @torch.no_grad()
    def _average(self) -> None:
        self._queued = False
        for param, used in zip(self._experts, self._used(), strict=True):
            if not used:
                continue
            if param.grad is None:
                param.grad = torch.zeros_like(param)
            grad = shard_of(param.grad).local
            dist.all_reduce(grad, group=self._copies.process_group)
            grad /= self._copies.size

    def _used(self) -> list[bool]:
        """Whether a parameter has a gradient on some rank; DDP asks that only if told to."""
        if not self._wrapped.find_unused_parameters:
            return [True] * len(self._experts)
        used = torch.tensor([p.grad is not None for p in self._experts], dtype=torch.uint8)
        used = used.to(self._copies.device)
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self._copies.process_group)
        return [bool(value) for value in used.tolist()]


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
