"""A bare MoE layer on a mesh, its tokens dealt out over the ranks of a stage in order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh.dispatch.collectives import split_sizes
from expertmesh.experts import GatedMLPExperts
from expertmesh.layer import MoE
from expertmesh.parallel.clip import clip_grad_norm_
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.random import RandomKey, normal
from expertmesh.routing import TopKRouter
from expertmesh.shards import Shard
from expertmesh.testing import assert_close
from expertmesh.testing.equivalence import assemble, by_name, pieces

DIM, HIDDEN = 8, 8


@dataclass(frozen=True)
class Seen:
    """What a rank saw of one forward and backward pass of the layer.

    Attributes:
        y_TD: Output of its own tokens.
        dx_TD: Gradient of its own tokens.
        gradients: Its pieces of gradients.
        norm: Their global norm.
        load_E: Choices of its own tokens, per expert.
        dropped: Choices of its own tokens that overflowed.
    """

    y_TD: Tensor
    dx_TD: Tensor
    gradients: dict[str, Shard]
    norm: float
    load_E: Tensor
    dropped: int


def layer(num_experts: int = 8, k: int = 2, *, seed: int = 1, **router: Any) -> MoE:
    """A layer in float64 whose values depend on the seed only."""
    return MoE(
        TopKRouter(DIM, num_experts, k, init_std=1.0, seed=seed, **router),
        GatedMLPExperts(DIM, HIDDEN, num_experts, init_std=0.5, seed=seed),
    ).double()


def tokens(count: int) -> Tensor:
    """``(count, D)`` in float64."""
    return normal(11, torch.arange(count * DIM), torch.float64).view(count, DIM)


def own_slice(mesh: Mesh, count: int, sizes: Sequence[int] | None = None) -> slice:
    """This rank's tokens out of ``count``: even parts, or those of ``sizes``."""
    sizes = split_sizes(count, mesh.stage.size) if sizes is None else sizes
    assert sum(sizes) == count
    start = sum(sizes[: mesh.stage.index])
    return slice(start, start + sizes[mesh.stage.index])


def pass_through(
    moe: MoE, mesh: Mesh, count: int, sizes: Sequence[int] | None = None, *, clip: float = 1e9
) -> Seen:
    """One forward and backward pass of ``count`` tokens, under a loss that is a mean over them."""
    own = own_slice(mesh, count, sizes)
    x_TD = tokens(count)[own].requires_grad_()
    key = RandomKey.of(3, 1, torch.arange(count)[own])
    y_TD, routing = moe(x_TD, key=key, return_routing=True)
    (y_TD * torch.sin(tokens(count)[own])).sum().div(count).backward()
    assert x_TD.grad is not None
    norm = clip_grad_norm_(moe, clip, mesh)
    return Seen(
        y_TD=y_TD.detach(),
        dx_TD=x_TD.grad,
        gradients=pieces((n, p.grad) for n, p in moe.named_parameters() if p.grad is not None),
        norm=float(norm),
        load_E=routing.load_E,
        dropped=int(routing.num_dropped),
    )


def on_mesh(
    axes: dict[str, int],
    count: int,
    sizes: Sequence[int] | None = None,
    zero: int = 2,
    options: dict[str, Any] | None = None,
) -> Seen:
    """``pass_through`` of a layer laid out over a mesh of these axes."""
    mesh = Mesh(**axes)
    moe = parallelize(layer(**(options or {})), mesh, zero=zero)
    return pass_through(moe, mesh, count, sizes)


def alone(count: int, options: dict[str, Any] | None = None) -> Seen:
    """The same in one process, without any mesh."""
    return pass_through(layer(**(options or {})), Mesh(), count)


def assert_same(views: Sequence[Seen], expected: Seen, tol: float = 1e-12) -> None:
    """Ranks saw, together, what one process saw."""
    assert_close("output", torch.cat([v.y_TD for v in views]), expected.y_TD, tol)
    assert_close("input gradient", torch.cat([v.dx_TD for v in views]), expected.dx_TD, tol)
    assert sum(v.load_E for v in views).tolist() == expected.load_E.tolist()
    assert sum(v.dropped for v in views) == expected.dropped
    errors = by_name(gradients_of(views), gradients_of([expected]))
    assert max(errors.values()) <= tol, errors
    assert [v.norm for v in views] == pytest.approx([expected.norm] * len(views), rel=tol)


def gradients_of(views: Sequence[Seen]) -> dict[str, Tensor]:
    """Whole gradients by name."""
    return assemble([view.gradients for view in views])
