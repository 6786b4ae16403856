"""Plans of shapes, shipped and by rule."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from expertmesh.kernels.moe_mlp.fused import plan
from expertmesh.kernels.moe_mlp.fused.plan import (
    SHIPPED,
    Gather,
    Plan,
    Turns,
    default_plan,
    plan_for,
    specialised,
)

SHARED_MEMORY = 227 * 1024
TABLE = json.loads(SHIPPED.read_text(encoding="utf-8"))
SHAPES = [tuple(map(int, name.split("x"))) for name in TABLE["plans"]]


def plan_on(
    name: str,
    dtype: torch.dtype,
    rows: int,
    dim: int,
    hidden: int,
    *,
    packed: bool = True,
    turns: bool = True,
) -> Plan:
    plan._device_name.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda index: name)
        patch.setattr(plan, "_turns_refusal_here", lambda device: None if turns else "no")
        sizes = {"num_experts": 8, "num_assignments": 8 * rows, "dim": dim, "hidden": hidden}
        chosen = plan_for(torch.device("cuda", 0), dtype, parts=2, packed=packed, **sizes)
    plan._device_name.cache_clear()
    return chosen


def test_six_shapes_are_shipped() -> None:
    assert set(SHAPES) == {
        (2048, 1024), (2048, 768), (1536, 256), (4096, 14336), (2048, 1408), (2048, 8192)
    }  # fmt: skip


@pytest.mark.parametrize(("dim", "hidden"), SHAPES)
def test_shipped_plans_replace_the_rule(dim: int, hidden: int) -> None:
    chosen = plan_on(TABLE["device"], torch.bfloat16, 4096, dim, hidden)
    for product, fields in TABLE["plans"][f"{dim}x{hidden}"].items():
        assert getattr(chosen, product) == plan._tile(fields)
    rule = default_plan(torch.bfloat16, 128, dim=dim, hidden=hidden, parts=2)
    assert plan_on("another", torch.bfloat16, 4096, dim, hidden, turns=False) == rule
    assert plan_on("another", torch.bfloat16, 4096, dim, hidden) == specialised(
        rule, torch.bfloat16, hidden
    )


@pytest.mark.parametrize(
    ("dtype", "rows", "dim", "hidden", "able"),
    [
        (torch.bfloat16, 4096, 2048, 1024, {"packed": False}),
        (torch.bfloat16, 4096, 2048, 1024, {"turns": False}),
        (torch.bfloat16, 16, 2048, 1024, {}),
        (torch.bfloat16, 4096, 2048, 96, {}),
        (torch.float32, 4096, 2048, 1024, {}),
    ],
)
def test_no_specialised_warps_where_they_do_not_run(
    dtype: torch.dtype, rows: int, dim: int, hidden: int, able: dict[str, bool]
) -> None:
    chosen = plan_on(TABLE["device"], dtype, rows, dim, hidden, **able)
    assert not any(isinstance(tile, Turns | Gather) for tile in vars(chosen).values())
    assert isinstance(plan_on("another", torch.float16, 4096, 256, 512).dhidden, Turns)


@pytest.mark.parametrize(("hidden", "narrow"), [(384, True), (512, False)])
def test_rows_of_narrow_experts_are_gathered_on_the_way(hidden: int, narrow: bool) -> None:
    chosen = plan_on("another", torch.bfloat16, 4096, 256, hidden)
    assert chosen.dhidden == Turns(gather=narrow)
    assert chosen.dup == Gather()
    assert chosen.ddown == (Gather() if narrow else None), "wide ones share the copy"
    assert plan_on("another", torch.float16, 4096, 256, hidden).ddown == Gather()


def test_what_a_shipped_gather_gathers_is_cut_evenly() -> None:
    for name, products in TABLE["plans"].items():
        for product in ("dup", "ddown"):
            tile = plan._tile(products[product])
            if isinstance(tile, Gather):
                assert int(name.split("x")[0]) % tile.gathered == 0


def test_few_rows_take_low_tiles() -> None:
    dim, hidden = SHAPES[0]
    assert plan_on(TABLE["device"], torch.bfloat16, 16, dim, hidden).rows == 64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("dim", "hidden"), [*SHAPES, (16, 16), (96, 40)])
def test_tiles_fit_shared_memory(dtype: torch.dtype, parts: int, dim: int, hidden: int) -> None:
    for rows in (64, 128):
        chosen = default_plan(dtype, rows, dim=dim, hidden=hidden, parts=parts)
        assert 2 * Turns.rows * Turns.depth * 2 * Turns.stages <= SHARED_MEMORY
        assert (256 + 128) * Gather.depth * 2 * Gather.stages <= SHARED_MEMORY
        for product in ("up", "down", "dhidden", "dx", "dup", "ddown"):
            tile = getattr(chosen, product)
            if tile is None:
                continue
            buffers = tile.stages if product not in ("dup", "ddown") else (tile.stages + 1) // 2
            step = (tile.rows + tile.columns) * tile.depth * dtype.itemsize
            assert step * buffers * tile.per_sm <= SHARED_MEMORY, product
            assert tile.rows == chosen.rows or product in ("dup", "ddown")


def refusal_of(**changes: Any) -> str | None:
    given: dict[str, Any] = {
        "rows": 128,
        "dim": 256,
        "hidden": 512,
        "packed": True,
        "dtype": torch.bfloat16,
    }
    given |= changes
    return plan.turns_refusal(torch.device("cuda", 0), **given)


def test_turns_say_why_not(
    monkeypatch: pytest.MonkeyPatch, forget_gpus: Callable[[], None]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(plan, "TRITON_VERSION", "3.6.1")
    assert refusal_of() is None
    for change, reason in (
        ({"dtype": torch.float32}, "16 bits, not torch.float32"),
        ({"rows": 64}, "fewer than 64 rows"),
        ({"dim": 320}, "multiples of 128, got 320 and 512"),
        ({"hidden": 704}, "multiples of 128, got 256 and 704"),
        ({"packed": False}, "one after another in memory"),
    ):
        assert reason in str(refusal_of(**change))
    for version in ("3.7.0", "3.60.0", "", None):
        monkeypatch.setattr(plan, "TRITON_VERSION", version)
        assert "written in Gluon" in str(refusal_of())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    forget_gpus()
    assert "this device has 10.0" in str(refusal_of())


def test_turns_have_one_shape_of_tile() -> None:
    with pytest.raises(TypeError, match="columns"):
        plan._tile({"turns": {"columns": 256}})
