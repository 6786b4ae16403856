"""Specialised warps wait for each other, and for nobody else: the kernels' roles as threads."""

import math
import random
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from expertmesh.kernels.layout import Layout
from expertmesh.kernels.moe_mlp.fused import dhidden_turns, dweight_gather, turns
from tests.kernels.gluon_on_threads import Descriptor, Stuck, launch

KINDS = ("any", "all skip", "one row", "every second expert empty", "one expert has all")
UNWRITTEN = 10**8
"""In tables, where nothing may be read."""


def routing(kind: str, rows: int, k: int, num_experts: int) -> Tensor:
    expert_RK = torch.randint(0, num_experts + 1, (rows, k))
    if kind in ("all skip", "one row"):
        expert_RK[:] = num_experts
    if kind == "one row":
        expert_RK[rows // 2, 0] = num_experts - 1
    if kind == "every second expert empty":
        expert_RK[expert_RK % 2 == 0] = num_experts
    if kind == "one expert has all":
        expert_RK[:] = 0
    return expert_RK


def layout_of(expert_RK: Tensor, num_experts: int) -> Layout:
    """As ``make_layout``'s, by definition; what it leaves unwritten would be out of bounds."""
    expert_N = expert_RK.flatten()
    count_E = expert_N.bincount(minlength=num_experts + 1)[:num_experts]
    ends = [0, *count_E.cumsum(0).tolist()]
    order_N = torch.full_like(expert_N, UNWRITTEN)
    order_N[: ends[-1]] = expert_N.sort(stable=True).indices[: ends[-1]]
    tiles = [
        (e, first, ends[e + 1])
        for e in range(num_experts)
        for first in range(ends[e], ends[e + 1], 128)
    ]
    tile_P3 = torch.full((len(tiles) + 3, 3), UNWRITTEN)
    tile_P3[: len(tiles)] = torch.tensor(tiles).view(-1, 3)
    longest_E = count_E.sort(descending=True, stable=True).indices
    return Layout(
        order_N, order_N, torch.tensor(ends), longest_E, tile_P3, torch.tensor([len(tiles)])
    )


def whole(*shape: int) -> Tensor:
    """Whole numbers, whose sums are exact."""
    return torch.randint(-3, 4, shape).float()


def seeded(*what: object) -> None:
    random.seed(str(what))
    torch.manual_seed(random.getrandbits(32))


def each_expert(layout: Layout) -> list[tuple[int, int, int]]:
    ends = layout.offset_E1.tolist()
    return [(e, first, stop) for e, (first, stop) in enumerate(pairwise(ends))]


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_by_turns(kind: str, transposed: bool) -> None:
    seeded(kind, transposed)
    experts, inner, outer = 5, random.choice((64, 192)), random.choice((128, 384))
    layout = layout_of(routing(kind, 700, 2, experts), experts)
    num_assignments = 1400
    rows, weight = whole(num_assignments, inner), whole(experts, inner, outer)
    stacked = (weight.mT if transposed else weight).flatten(0, 1)
    out = torch.full((num_assignments, outer), math.nan)
    launch(
        turns.rows_turns_kernel,
        random.choice((1, 3)),
        Descriptor(rows, [128, 64]),
        Descriptor(stacked, [128, 64] if transposed else [64, 128]),
        layout.tile_P3,
        layout.num_tiles_1,
        out,
        inner,
        outer,
        transposed,
        random.choice((2, 3, 6)),
        random.choice((1, 2, 8)),
    )
    for e, first, stop in each_expert(layout):
        assert torch.equal(out[first:stop], rows[first:stop] @ weight[e])
    assert out[int(layout.offset_E1[-1]) :].isnan().all(), "nobody's rows"


@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_the_pre_activation(kind: str, gathered: bool) -> None:
    seeded(kind, gathered)
    experts, k, rows, dim = 4, 3, 400, random.choice((64, 192))
    hidden, parts = random.choice((128, 256)), random.choice((1, 2))
    layout = layout_of(routing(kind, rows, k, experts), experts)
    valid = int(layout.offset_E1[-1])
    order = layout.order_N[:valid]
    dy, down, weight = whole(rows, dim), whole(experts, dim, hidden), whole(rows, k)
    pre = whole(rows * k, parts * hidden)
    grouped = whole(rows * k, dim)
    grouped[:valid] = dy[order // k]
    dpre, units = torch.full_like(pre, math.nan), torch.full((rows * k, hidden), math.nan)
    share = torch.full((rows * k, hidden // 128), math.nan)
    launch(
        dhidden_turns.dhidden_turns_kernel,
        random.choice((1, 3)),
        dy if gathered else Descriptor(grouped, [128, 64]),
        Descriptor(down.flatten(0, 1), [64, 128]),
        weight,
        layout.order_N,
        layout.offset_E1,
        layout.tile_P3,
        layout.num_tiles_1,
        pre,
        dpre,
        units,
        share,
        rows * k,
        experts,
        dim,
        hidden,
        parts,
        "silu",
        k if gathered else 0,
        128,
        random.choice((2, 3, 6)),
        random.choice((1, 2, 8)),
        _activate_with_slope=squared_with_slope,
    )
    dh = torch.cat([grouped[a:b] @ down[e] for e, a, b in each_expert(layout)])
    combine = weight.flatten()[order][:, None]
    gate, linear = pre[:valid, :hidden], pre[:valid, hidden:] if parts == 2 else torch.tensor(1.0)
    unit, slope = squared_with_slope(gate, "silu")
    wanted = [dh * combine * slope * linear, dh * combine * unit][:parts]
    assert torch.equal(dpre[:valid], torch.cat(wanted, dim=1))
    assert torch.equal(units[:valid], unit * linear * combine)
    shares = (dh * unit * linear).unflatten(1, (-1, 128)).sum(dim=2)
    assert torch.equal(share[:valid], shares)


def squared_with_slope(x: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """In the place of SiLU, which is not exact."""
    return x * x, 2 * x


@pytest.mark.parametrize("flipped", [True, False])
@pytest.mark.parametrize("shape", [(128, 256), (256, 128)])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_matrices(kind: str, shape: tuple[int, int], flipped: bool) -> None:
    seeded(kind, shape, flipped)
    experts, k, rows = 5, 2, 500
    height, width = random.choice((256, 384)), random.choice((256, 384))
    if flipped:
        height = shape[0] * random.choice((1, 2))
    else:
        width = shape[1] * random.choice((1, 2))
    layout = layout_of(routing(kind, rows, k, experts), experts)
    valid = int(layout.offset_E1[-1])
    by_token = whole(rows, height if flipped else width)
    grouped = whole(rows * k, width if flipped else height)
    grouped[valid:] = 0
    out = torch.full((experts, height, width), math.nan)
    launch(
        dweight_gather.dweight_gather_kernel,
        random.choice((1, 3)),
        Descriptor(grouped, [64, shape[1] if flipped else shape[0]]),
        by_token,
        layout.order_N,
        layout.offset_E1,
        layout.longest_E,
        out,
        *out.stride()[:1],
        0,
        width,
        experts,
        k,
        height,
        height,
        width,
        *shape,
        flipped,
        4,
        random.choice((1, 2, 8)),
    )
    for e, first, stop in each_expert(layout):
        gathered = by_token[layout.order_N[first:stop] // k]
        left, right = gathered, grouped[first:stop]
        assert torch.equal(out[e], left.T @ right if flipped else right.T @ left)


def test_a_role_that_stops_too_early_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.kernels.gluon_on_threads._PATIENCE_SECONDS", 0.5)
    layout = layout_of(torch.zeros(300, 1, dtype=torch.int64), 1)
    out = torch.empty(300, 128)
    with pytest.raises(Stuck):
        launch(
            turns.rows_turns_kernel,
            1,
            Descriptor(whole(300, 64), [128, 64]),
            Descriptor(whole(64, 128), [64, 128]),
            layout.tile_P3,
            layout.num_tiles_1,
            out,
            64,
            128,
            False,
            2,
            1,
            fetch=lambda *arguments: None,
        )
