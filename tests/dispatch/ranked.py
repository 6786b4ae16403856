"""Tokens dealt out over ranks, sent to experts and back, against whole experts on one rank."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from expertmesh.dispatch import LocalDispatcher
from expertmesh.experts import GatedMLPExperts
from expertmesh.layer import MoE
from expertmesh.parallel.experts import place_experts
from expertmesh.parallel.mesh import Mesh
from expertmesh.routing import Routing, TopKRouter
from expertmesh.shards import shard_of
from expertmesh.testing import relative_error

DIM, HIDDEN, EXPERTS = 6, 4, 4


@dataclass(frozen=True)
class Case:
    """Tokens and where they go.

    Attributes:
        sizes: Tokens of each rank.
        k: Choices of a token.
        kept: Part of the choices that are carried out.
        only: The one expert that is chosen; None for any.
        dtype: Of the tokens.
    """

    sizes: tuple[int, ...]
    k: int = 2
    kept: float = 0.8
    only: int | None = None
    dtype: torch.dtype = torch.float64

    @property
    def num_tokens(self) -> int:
        return sum(self.sizes)

    def own(self, rank: int) -> slice:
        start = sum(self.sizes[:rank])
        return slice(start, start + self.sizes[rank])

    def tokens(self) -> Tensor:
        return self._normal(0, self.num_tokens, DIM).to(self.dtype)

    def weights(self) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        return torch.where(
            self.choices() < EXPERTS, self._normal(1, self.num_tokens, self.k), 0
        ).to(wide)

    def choices(self) -> Tensor:
        """Different experts for each token; E where a choice is not carried out."""
        expert_TK = self._normal(2, self.num_tokens, EXPERTS).argsort(dim=1)[:, : self.k]
        if self.only is not None:
            expert_TK = torch.full_like(expert_TK, EXPERTS)
            expert_TK[:, -1] = self.only
        dropped_TK = self._normal(3, self.num_tokens, self.k) > torch.special.ndtri(
            torch.tensor(self.kept, dtype=torch.float64)
        )
        return expert_TK.masked_fill(dropped_TK, EXPERTS)

    def most_per_expert(self, rank: int) -> int:
        own_TK = self.choices()[self.own(rank)]
        return int(own_TK.flatten().bincount(minlength=EXPERTS + 1)[:EXPERTS].max())

    def _normal(self, seed: int, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64)


@dataclass(frozen=True)
class Seen:
    """One case on one rank.

    Attributes:
        errors: Relative to whole experts, by what is compared.
        num_rows: Rows that came here.
        bytes_sent: By kind.
    """

    errors: dict[str, float]
    num_rows: int
    bytes_sent: dict[str, int]


def routing(expert_TK: Tensor, weight_TK: Tensor, most: int | None = None) -> Routing:
    return Routing(
        num_experts=EXPERTS,
        expert_TK=expert_TK,
        weight_TK=weight_TK,
        chosen_TK=expert_TK,
        load_E=expert_TK.flatten().bincount(minlength=EXPERTS + 1)[:EXPERTS],
        most_per_expert=most,
    )


def layer(k: int, dtype: torch.dtype = torch.float64) -> MoE:
    """A layer whose biases are not zero."""
    experts = GatedMLPExperts(DIM, HIDDEN, EXPERTS, bias=True, seed=0)
    with torch.no_grad():
        for bias in (experts.gate_up_bias, experts.down_bias):
            assert bias is not None
            bias.copy_(torch.linspace(-1, 1, bias.numel()).view_as(bias))
    return MoE(TopKRouter(DIM, EXPERTS, k, seed=0), experts).to(dtype)


def compared(axes: dict[str, Any], dispatch: str, cases: list[Case]) -> list[Seen]:
    """On a rank: every case through experts that are dealt out, against whole ones."""
    mesh = Mesh(**axes)
    return [_compare(mesh, dispatch, case) for case in cases]


def _compare(mesh: Mesh, dispatch: str, case: Case) -> Seen:
    whole = layer(case.k, case.dtype)
    dealt = copy.deepcopy(whole)
    place_experts(dealt, mesh, dispatch=dispatch)
    group = mesh.group(("ep", "etp"))
    group.traffic.bytes_sent.clear()
    assert isinstance(whole.dispatcher, LocalDispatcher)

    everything = slice(0, case.num_tokens)
    expected = _pass(whole, case, everything, None)
    own = case.own(group.index)
    actual = _pass(dealt, case, own, case.most_per_expert(group.index))
    errors = {
        name: relative_error(actual[name], expected[name][own])
        for name in ("output", "x gradient", "weight gradient")
    }
    for (name, param), (_, reference) in zip(
        dealt.experts.named_parameters(), whole.experts.named_parameters(), strict=True
    ):
        assert param.grad is not None
        assert reference.grad is not None
        box = shard_of(param.grad)
        ends = zip(box.offset, box.local.shape, strict=True)
        part = reference.grad[tuple(slice(begin, begin + size) for begin, size in ends)]
        errors[name] = relative_error(box.local, part)
    return Seen(errors, int(actual["rows"]), dict(group.traffic.bytes_sent))


def _pass(moe: MoE, case: Case, own: slice, most: int | None) -> dict[str, Tensor]:
    x_TD = case.tokens()[own].requires_grad_()
    weight_TK = case.weights()[own].requires_grad_()
    sent = moe.dispatcher.dispatch(x_TD, routing(case.choices()[own], weight_TK, most))
    y_RD = moe.experts(sent.x_RD, sent.expert_RK, sent.weight_RK)
    y_TD = moe.dispatcher.combine(y_RD, sent.context)
    assert y_TD.dtype == case.dtype
    y_TD.backward(torch.sin(3 * case.tokens()[own]))
    assert x_TD.grad is not None
    assert weight_TK.grad is not None
    return {
        "output": y_TD.detach(),
        "x gradient": x_TD.grad,
        "weight gradient": weight_TK.grad,
        "rows": torch.tensor(len(sent.x_RD)),
    }


class HostAsked(Exception):
    """The host waited for the device."""


class _NoScalars(TorchDispatchMode):
    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = function.name()
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"):
            raise HostAsked(name)
        return function(*args, **(kwargs or {}))


@contextmanager
def without_host() -> Iterator[None]:
    """Raises where a tensor's values, or a shape that depends on them, are asked for."""

    def refuse(*_: Any, **__: Any) -> None:
        raise HostAsked

    with _NoScalars(), mock.patch.multiple(Tensor, tolist=refuse, cpu=refuse, numpy=refuse):
        yield
