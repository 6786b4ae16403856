"""Tensor-parallel attention: heads are dealt out, and tokens outside attention too.

Between attentions every rank of ``tp`` computes its own contiguous part of the sequence. Attention
gathers the parts, computes the rank's own heads for all positions, and sums and deals out the
result in one reduce-scatter (Korthikanti et al., 2022, arXiv 2205.05198). Activations are plain
tensors and the collectives are ours; only the divided weights are ``DTensor``.

Everything else keeps whole weights: embedding, norms, routers, the output layer, and dense MLPs,
which have no more tokens per rank than experts have. Their gradients are sums over this rank's
tokens, and those of whole weights inside attention are sums over this rank's heads: parts of one
sum in either case, which is complete after a sum over all ranks.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from expertmesh.dispatch.collectives import (
    Group,
    all_gather,
    all_reduce,
    own_range,
    reduce_scatter,
    split_sizes,
)
from expertmesh.errors import UserError
from expertmesh.models.attention import GroupedAttention
from expertmesh.models.config import DecoderConfig
from expertmesh.models.context import BlockContext
from expertmesh.models.decoder import DecoderLM
from expertmesh.models.latent_attention import LatentAttention
from expertmesh.models.norm import RMSNorm
from expertmesh.parallel.mesh import Mesh
from expertmesh.shards import is_sharded, local


def shard_attention(model: nn.Module, mesh: Mesh) -> None:
    """Deal the heads of every attention out over ``tp``, in place. One rank changes nothing.

    Each rank keeps its rows or columns of the weights it has, so all ranks must hold the same
    model; on the meta device too. Names in the state dict do not change. The model is called with
    whole sequences and answers for ``model.own_part(tokens_BS, 1)``: contiguous, as equal as can
    be, empty where there are fewer positions than ranks.

    Args:
        model: A ``DecoderLM``, or a module around it, with whole weights; before ``fully_shard``.
        mesh: Its axis ``tp`` is used.

    Raises:
        UserError: If ``tp`` does not divide the heads and the key and value heads, or there is no
            ``DecoderLM``.
    """
    group = mesh.group("tp")
    if group.size == 1:
        return
    decoders = [module for module in model.modules() if isinstance(module, DecoderLM)]
    if not decoders:
        raise UserError(
            f"tp must be 1 for models other than expertmesh.models.DecoderLM, got tp={group.size} "
            f"and a {type(model).__name__}; set tp=1, and dp, cp or ep instead"
        )
    for decoder in decoders:
        _check_heads(decoder.config, group.size)
    # Of the mesh whose other axes FSDP shards attention over.
    split = Split(group, mesh.attention["tp"])
    for decoder in decoders:
        _shard_decoder(decoder, split)


@dataclass(frozen=True)
class TensorParallelGroup:
    """An attention whose weights are divided over ``tp``, and how to shard it further.

    ``fully_shard`` goes over each of ``whole`` and all ranks of the stage first, then over
    ``attention`` and ``(dp, cp)``. Not over a list of its linears at once: torch 2.11 then reduces
    the list's gradients as soon as that of the first one's input is known, whichever are missing.

    Attributes:
        attention: Holds the divided weights, directly or in submodules.
        whole: Modules in it whose parameters are not divided.
    """

    attention: nn.Module
    whole: tuple[nn.Module, ...]


def tensor_parallel_groups(model: nn.Module) -> list[TensorParallelGroup]:
    """The attentions that ``shard_attention`` divided, in the model's order."""
    groups = []
    for attention in _attentions(model):
        holders = [m for m in attention.modules() if list(m.parameters(recurse=False))]
        whole = tuple(m for m in holders if not _is_divided(m))
        if len(whole) < len(holders):
            groups.append(TensorParallelGroup(attention, whole))
    return groups


class ShardedLinear(nn.Linear):
    """A linear layer of which this rank has some of the rows or columns.

    With rows (``dim`` 0) it makes this rank's part of the output from the whole input; with
    columns (``dim`` 1) this rank's addend of the output from its part of the input.
    """

    def __init__(self, whole: nn.Linear, split: "Split", dim: int) -> None:
        super().__init__(whole.in_features, whole.out_features, bias=False, device="meta")
        self.weight = split.parameter(whole.weight, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x ``(..., in)`` or this rank's part. Returns ``(..., out / tp)`` or an addend."""
        return F.linear(x, local(self.weight))


class ShardedRMSNorm(RMSNorm):
    """One RMS over a vector whose parts are on the ranks of a group, as is the scale."""

    def __init__(self, whole: RMSNorm, split: "Split") -> None:
        (width,) = whole.normalized_shape
        # Attention unflattens by this width: that of the part.
        super().__init__(width // split.group.size, whole.eps, device="meta")
        self.full_width = width
        self.group = split.group
        self.weight = split.parameter(whole.weight, 0)

    def forward(self, x: Tensor) -> Tensor:
        """Args: this rank's part, ``(..., width / tp)``. Returns the same shape."""
        assert self.eps is not None
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = all_reduce(wide.square().sum(-1, keepdim=True), self.group)
        normed = wide * torch.rsqrt(squares / self.full_width + self.eps)
        return (normed * local(self.weight).to(x.dtype)).to(x.dtype)


@dataclass(frozen=True, eq=False)
class Split:
    """How sequences and weights are cut over a group."""

    group: Group
    device_mesh: DeviceMesh

    def own_part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's positions of a tensor that has all of them along ``dim``."""
        start, end = own_range(x.shape[dim], self.group)
        return x.narrow(dim, start, end - start)

    def gather(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before attention: all positions, ``(B, s, D)`` to ``(B, S, D)``."""
        x_BSD, context = args
        whole_BSD = all_gather(x_BSD, self.group, 1, sizes=self._sizes(context))
        # Laid out once, rather than by each projection.
        return whole_BSD.contiguous(), context

    def scatter(self, _: nn.Module, args: tuple[Any, ...], y_BSD: Tensor) -> Tensor:
        """After attention: addends ``(B, S, D)`` to the own positions' sums ``(B, s, D)``."""
        own_BSD = reduce_scatter(y_BSD, self.group, 1, sizes=self._sizes(args[1]))
        # A view would be answered by FSDP with a warning.
        return own_BSD.clone(memory_format=torch.contiguous_format)

    def _sizes(self, context: BlockContext) -> list[int]:
        return split_sizes(context.seq_len, self.group.size)

    def parameter(self, whole: Tensor, dim: int) -> nn.Parameter:
        """This rank's part of a parameter along ``dim``, as a ``DTensor`` of the whole."""
        # A copy: a view would keep the memory of the whole.
        part = (
            whole.detach()
            .chunk(self.group.size, dim)[self.group.index]
            .clone(memory_format=torch.contiguous_format)
        )
        tensor = DTensor.from_local(part, self.device_mesh, [Shard(dim)], run_check=False)
        return nn.Parameter(tensor, requires_grad=whole.requires_grad)


def _shard_decoder(model: DecoderLM, split: Split) -> None:
    for attention in _attentions(model):
        if isinstance(attention, LatentAttention):
            _shard_latent(attention, split)
        else:
            _shard_grouped(attention, split, whole_norm=model.config.qk_norm == "full")
        # Hooks rather than a wrapper, which would change the parameters' names.
        attention.register_forward_pre_hook(split.gather)
        attention.register_forward_hook(split.scatter)
    model.own_part = split.own_part


def _attentions(model: nn.Module) -> list[GroupedAttention | LatentAttention]:
    kinds = GroupedAttention, LatentAttention
    return [module for module in model.modules() if isinstance(module, kinds)]


def _shard_grouped(attention: GroupedAttention, split: Split, *, whole_norm: bool) -> None:
    attention.q = ShardedLinear(attention.q, split, 0)
    attention.k = ShardedLinear(attention.k, split, 0)
    attention.v = ShardedLinear(attention.v, split, 0)
    attention.out = ShardedLinear(attention.out, split, 1)
    # A scale that all heads share stays whole.
    if whole_norm and attention.q_norm is not None and attention.k_norm is not None:
        attention.q_norm = ShardedRMSNorm(attention.q_norm, split)
        attention.k_norm = ShardedRMSNorm(attention.k_norm, split)


def _shard_latent(attention: LatentAttention, split: Split) -> None:
    # Every rank makes the latents of all positions: they are small, and all heads need them.
    if isinstance(attention.q, nn.Sequential):
        up = attention.q[2]
        assert isinstance(up, nn.Linear)
        attention.q[2] = ShardedLinear(up, split, 0)
    elif isinstance(attention.q, nn.Linear):
        attention.q = ShardedLinear(attention.q, split, 0)
    attention.kv_up = ShardedLinear(attention.kv_up, split, 0)
    attention.out = ShardedLinear(attention.out, split, 1)
    attention.num_heads //= split.group.size


def _check_heads(config: DecoderConfig, tp: int) -> None:
    kv_heads = config.kv_heads if config.attention == "gqa" else config.num_heads
    if config.num_heads % tp == 0 and kv_heads % tp == 0:
        return
    heads = f"num_heads={config.num_heads}"
    if config.attention == "gqa":
        heads += f" and num_kv_heads={kv_heads}"
    fitting = [d for d in range(1, kv_heads + 1) if config.num_heads % d == kv_heads % d == 0]
    raise UserError(f"tp must divide {heads}, got tp={tp}; set tp to one of {fitting}")


def _is_divided(module: nn.Module) -> bool:
    return any(is_sharded(parameter) for parameter in module.parameters(recurse=False))
