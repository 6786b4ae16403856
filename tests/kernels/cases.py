"""Random problems for the expert computation, shared by the tests of its backends."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.kernels.moe_mlp import moe_mlp
from expertmesh.testing import assert_close


@dataclass(frozen=True)
class Case:
    x: Tensor
    expert: Tensor
    weight: Tensor
    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None
    dy: Tensor
    activation: str = "silu"

    @property
    def tensors(self) -> dict[str, Tensor]:
        names = ("x", "weight", "up", "down", "up_bias", "down_bias")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    def to(self, dtype: torch.dtype | None = None, device: str = "cpu") -> "Case":
        moved = {name: value.to(device, dtype) for name, value in self.tensors.items()}
        return replace(self, **moved, expert=self.expert.to(device), dy=self.dy.to(device, dtype))


def make_case(
    rows: int = 13,
    dim: int = 5,
    hidden: int = 7,
    num_experts: int = 6,
    k: int = 3,
    *,
    gated: int = 1,
    bias: bool = True,
    sentinels: float = 0.2,
    activation: str = "silu",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    """Experts are drawn with repetition; expert 1 gets no rows where there are others.

    ``gated`` counts the gates: 0, 1, or 2 of doubly gated experts.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    expert = torch.randint(0, num_experts, (rows, k), generator=g)
    if num_experts > 1:
        expert[expert == 1] = 0
    expert[torch.rand(rows, k, generator=g) < sentinels] = num_experts
    up_shape = (num_experts, gated + 1, hidden) if gated else (num_experts, hidden)
    return Case(
        x=normal(rows, dim),
        expert=expert,
        weight=torch.rand(rows, k, generator=g, dtype=torch.float64).to(dtype),
        up=normal(*up_shape, dim) / dim**0.5,
        down=normal(num_experts, dim, hidden) / hidden**0.5,
        up_bias=normal(*up_shape) if bias else None,
        down_bias=normal(num_experts, dim) if bias else None,
        dy=normal(rows, dim),
        activation=activation,
    )


def run(case: Case, backend: str) -> dict[str, Tensor]:
    """The output and the gradient of every tensor."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in case.tensors.items()}
    y = call(case, leaves, backend)
    grads = torch.autograd.grad(y, list(leaves.values()), case.dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{n}": g for n, g in zip(leaves, grads, strict=True)}}


def call(case: Case, tensors: dict[str, Tensor], backend: str) -> Tensor:
    return moe_mlp(
        tensors["x"],
        case.expert,
        tensors["weight"],
        tensors["up"],
        tensors["down"],
        up_bias=tensors.get("up_bias"),
        down_bias=tensors.get("down_bias"),
        activation=case.activation,
        backend=backend,
    )


def strided(case: Case) -> Case:
    """The same values in other orders of memory, ``dy`` a column that is repeated."""
    return replace(
        case,
        x=case.x.t().contiguous().t(),
        weight=case.weight.t().contiguous().t(),
        expert=case.expert.t().contiguous().t(),
        up=case.up.mT.contiguous().mT,
        down=case.down.mT.contiguous().mT,
        dy=case.dy[:, :1].expand_as(case.dy),
    )


def interleaved(case: Case) -> Case:
    """The same values, each unit's gate beside its linear half in memory."""
    return replace(case, up=case.up.transpose(1, 2).contiguous().transpose(1, 2))


def assert_differentiable_once(case: Case, backend: str) -> None:
    """A second derivative would be wrong, so it is an error: of a sum too."""
    for loss in (torch.square, torch.nn.Identity()):
        x = case.x.clone().requires_grad_()
        y = call(case, {**case.tensors, "x": x}, backend)
        (dx,) = torch.autograd.grad(loss(y).sum(), x, create_graph=True)
        with pytest.raises(UserError, match="set backend='reference'"):
            dx.sum().backward()


def assert_equal_to_reference(case: Case, backend: str, tol: float | None = None) -> None:
    """The reference runs in float64; inputs are what the backend saw, rounded to its dtype."""
    expected = run(case.to(torch.float64, "cpu"), "reference")
    for name, actual in run(case, backend).items():
        assert_close(name, actual.cpu(), expected[name].to(actual.dtype), tol)
