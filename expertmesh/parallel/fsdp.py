"""A model over a mesh: every parameter's owner, and how its gradient comes together.

FSDP2 keeps each parameter in pieces and sums its gradients. Which ranks share the pieces depends
on what the parameter sees: experts those that hold copies of them (``edp``), tensor-parallel
attention the data ranks ``(dp, cp)``, and all else every rank of the stage, since tokens outside
attention are cut over ``tp`` too. Gradients are plain sums: the loss is divided by the global
number of target tokens, and nothing else divides.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard as ShardPlacement
from torch.utils._pytree import tree_map

from expertmesh.errors import UserError
from expertmesh.experts import Experts
from expertmesh.experts.stacked import StackedMLPExperts
from expertmesh.models.decoder import DecoderLM
from expertmesh.parallel.alike import same_placement
from expertmesh.parallel.experts import check_experts, distinct_moe_layers, place_experts
from expertmesh.parallel.guard import check_free, refuse_wrappers
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.replaced import replacing
from expertmesh.parallel.tensor import shard_attention, tensor_parallel_groups
from expertmesh.shards import shard_of

ModelT = TypeVar("ModelT", bound=nn.Module)
ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class _Unit:
    """A module whose parameters, but those of units within it, FSDP gathers together.

    Attributes:
        module: The module.
        mesh: The ranks that share its parameters.
        zero: Stage.
        narrow: What parameters are rounded to before they are gathered; None leaves them.
    """

    module: nn.Module
    mesh: DeviceMesh
    zero: int
    narrow: torch.dtype | None = None


def parallelize(
    model: ModelT,
    mesh: Mesh,
    *,
    zero: int = 2,
    expert_zero: int | None = None,
    dispatch: str = "all_to_all",
    narrow: torch.dtype | None = None,
) -> ModelT:
    """Lay a model out over a mesh, in place. Make the optimizer afterwards.

    Ranks must have built the same model. One with values gets those of the stage's first rank;
    one on the meta device is given values afterwards (``to_empty``, ``init_weights``), each rank
    its own part.

    ZeRO stages say what ranks with the same parameters hold in pieces (Rajbhandari et al., arXiv
    1910.02054): 0 nothing; 1 the optimizer's state; 2 the gradients too; 3 the parameters too,
    which are gathered anew in backward. Stage 1 sums gradients once per optimizer step: call
    ``gradient_sync`` before each micro-batch.

    Args:
        model: A model with MoE layers. Tensor parallelism needs one of ``expertmesh.models``, and
            a pipeline one that ``keep_stages`` has cut.
        mesh: Every rank's place; this rank must be in it.
        zero: Stage of all parameters but the experts'.
        expert_zero: Stage of the experts; None is ``zero``.
        dispatch: ``"all_to_all"`` (dropless), or ``"static"`` (no host synchronisation; needs
            routers with a capacity).
        narrow: What ``torch.autocast`` will be on with in every forward pass, or None. Experts of
            stacked matrices round float32 weights to it anyway: with it their copies are rounded
            before they are gathered, half the bytes for the same numbers. Gradients are summed in
            float32 all the same.

    Returns:
        ``model``. DDP and FSDP put round it, round a part of it or round a larger module raise a
        ``UserError`` from then on.

    Raises:
        UserError: If the model does not fit the mesh, or lies on one already; on every rank, if
            ranks give different models or arguments.
    """
    expert_zero = zero if expert_zero is None else expert_zero
    if mesh.member and mesh.world > 1:
        options = {"zero": zero, "expert_zero": expert_zero, "dispatch": dispatch, "narrow": narrow}
        same_placement(model, mesh, "parallelize", **options)
    for name, stage in (("zero", zero), ("expert_zero", expert_zero)):
        if stage not in ZERO_STAGES or isinstance(stage, bool):
            raise UserError(f"{name} must be one of 0, 1, 2, 3, got {stage!r}; set {name} = 2")
    if not mesh.member:
        raise UserError(
            f"rank {mesh.rank} is not in {mesh}; parallelize the model on its ranks only"
        )
    if mesh.world == 1:
        place_experts(model, mesh, dispatch=dispatch)
        return model
    check_free(model, "parallelize")
    _check_stages(model, mesh.degree("pp"))
    check_experts(model, mesh, dispatch)
    copy_values_of_first_rank(model, mesh)
    with replacing(model, "parallelize"):
        if mesh.degree("tp") > 1:
            shard_attention(model, mesh)
        try:
            place_experts(model, mesh, dispatch=dispatch)
            _shard_storage(model, mesh, zero, expert_zero, narrow)
        finally:
            # Also of a model that is only half laid out: it must not be laid out again.
            refuse_wrappers(model, "parallelize")
    return model


def _check_stages(model: nn.Module, pp: int) -> None:
    """Ranks of a pipeline do not sum gradients of each other, so each must hold its own stages."""
    if pp == 1:
        return
    cut_for = [module.pipeline_ranks for module in model.modules() if isinstance(module, DecoderLM)]
    if not cut_for:
        raise UserError(
            f"pp must be 1 for models other than expertmesh.models.DecoderLM, got pp={pp} and a "
            f"{type(model).__name__}; set pp=1, and dp or ep instead"
        )
    if cut_for != [pp]:
        raise UserError(
            f"pp={pp} needs a model of which each rank holds its stages, got one that was cut for "
            f"{cut_for[0]}; call expertmesh.models.stages.keep_stages(model, Stages.of(model."
            f'config, {pp}), mesh.coordinates["pp"]) first, or set pp=1'
        )


def gradient_sync(model: nn.Module, *, last: bool) -> None:
    """Say before a micro-batch whether it is the last one of the optimizer step.

    Stages 0 and 1 sum gradients over ranks in the last one only; 2 and 3 in every one. Stages 0 to
    2 keep what they gathered of the parameters until the last one.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            once = getattr(module, _ONCE_PER_STEP)
            module.set_requires_gradient_sync(last or not once, recurse=False)
            whole = getattr(module, _KEEPS_WHOLE)
            module.set_reshard_after_backward(last or not whole, recurse=False)


_ONCE_PER_STEP = "_sums_gradients_once_per_step"
_KEEPS_WHOLE = "_keeps_parameters_whole_in_a_step"


def _shard_storage(
    model: nn.Module, mesh: Mesh, zero: int, expert_zero: int, narrow: torch.dtype | None
) -> None:
    outside: set[nn.Parameter] = set()
    units: list[_Unit] = []
    for moe in distinct_moe_layers(model):
        if mesh.degree("edp") > 1:
            copies = _storage(mesh.expert, "edp", expert_zero)
            rounded = narrow if _rounds_its_weights(moe.experts) else None
            units.append(_Unit(moe.experts, copies, expert_zero, rounded))
        else:
            outside.update(moe.experts.parameters())
    everyone = _storage(mesh.storage, "stage", zero)
    for group in tensor_parallel_groups(model):
        units.extend(_Unit(module, everyone, zero) for module in group.whole)
        units.append(_Unit(group.attention, _storage(mesh.attention, "data", zero), zero))
    units.extend(_Unit(block, everyone, zero) for block in _blocks(model))
    units.append(_Unit(model, everyone, zero))
    for unit in units:
        _fully_shard(unit, outside)


def _rounds_its_weights(experts: Experts) -> bool:
    """Whether autocast rounds every one of its parameters, in every use."""
    wide = all(param.dtype == torch.float32 for param in experts.parameters())
    return wide and isinstance(experts, StackedMLPExperts)


def _storage(root: DeviceMesh, axis: str, zero: int) -> DeviceMesh:
    """The ranks that share a parameter: in pieces, or, in stage 0, as copies of one whole piece."""
    return root[(axis, "own")] if zero == 0 else root[axis]


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The repeated parts of a model: children of its module lists that have parameters.

    Lists within experts are not looked at: an expert runs on those ranks that have rows for it.
    """
    experts = [module for module in model.modules() if isinstance(module, Experts)]
    seen = {id(part) for stack in experts for part in stack.modules()}
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or id(module) in seen:
            continue
        for child in module:
            lists = [part for part in child.modules() if isinstance(part, nn.ModuleList)]
            inner = any(id(part) not in seen for part in lists)
            fresh = id(child) not in seen
            if fresh and not inner and any(True for _ in child.parameters()):
                seen.add(id(child))
                yield child


def _fully_shard(unit: _Unit, outside: set[nn.Parameter]) -> None:
    size = unit.mesh.size(unit.mesh.ndim - 1)
    unit.module.register_forward_hook(_no_view)

    def placement(param: nn.Parameter) -> ShardPlacement:
        return ShardPlacement(_piece_dim(param, size))

    policy = MixedPrecisionPolicy()
    if unit.narrow is not None:
        policy = MixedPrecisionPolicy(unit.narrow, torch.float32, cast_forward_inputs=False)
    fully_shard(
        unit.module,
        mesh=unit.mesh,
        mp_policy=policy,
        reshard_after_forward=unit.zero == 3,
        shard_placement_fn=placement,
        ignored_params=outside,
    )
    setattr(unit.module, _ONCE_PER_STEP, unit.zero < 2)
    setattr(unit.module, _KEEPS_WHOLE, unit.zero < 3)
    assert isinstance(unit.module, FSDPModule)
    unit.module.set_gradient_divide_factor(1.0)
    unit.module.set_force_sum_reduction_for_comms(True)


def _no_view(_: nn.Module, args: Any, output: Any) -> Any:
    """Comes before FSDP's own hook, which warns of outputs that are views: it hangs hooks on them.

    An operation in place on a view would lose those hooks.
    """

    def own(value: Any) -> Any:
        is_view = isinstance(value, Tensor) and value.requires_grad and value._base is not None
        return _Own.apply(value) if is_view else value

    return tree_map(own, output)


class _Own(torch.autograd.Function):
    """The same values in the same place, but no view to autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _piece_dim(param: Tensor, pieces: int) -> int:
    """The dim along which FSDP cuts: the first, unless it is cut already and does not divide.

    Pieces of a tensor that other axes have cut must be equal; so must those along later dims.
    """
    box = shard_of(param)
    if pieces == 1 or tuple(box.local.shape) == box.shape:
        return 0
    for dim, length in enumerate(box.local.shape):
        if length % pieces == 0:
            return dim
    raise UserError(
        f"a part of shape {tuple(box.local.shape)}, of a parameter of shape {box.shape}, cannot "
        f"be cut into {pieces} equal pieces; choose widths or a mesh so that one of them divides"
    )


@torch.no_grad()
def copy_values_of_first_rank(model: nn.Module, mesh: Mesh) -> None:
    """Give every rank of a stage its first rank's values; nothing on the meta device."""
    group = mesh.stage
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    if group.process_group is None or any(t.is_meta for t in tensors.values()):
        return
    for tensor in tensors.values():
        dist.broadcast(tensor.detach(), src=group.ranks[0], group=group.process_group)
