"""The backend ``quack`` without the package: a plain product stands where QuACK's would."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from expertmesh.kernels.backends import Problem, choose, explain
from expertmesh.kernels.moe_mlp import MLP_BACKENDS, quack
from expertmesh.kernels.moe_mlp.fused import run as fused_run
from expertmesh.kernels.moe_mlp.fused.plan import Quack, plan_for
from expertmesh.kernels.moe_mlp.quack import QuackMLP
from tests.kernels.cases import Case, assert_equal_to_reference, make_case
from tests.kernels.test_fused_mlp import PLAN

TRAINING = Problem(
    device=torch.device("cuda", 0),
    dtype=torch.bfloat16,
    num_experts=8,
    num_assignments=4096,
    dim=128,
    hidden=256,
    needs_grad=True,
)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, Triton and QuACK as far as refusals ask."""
    monkeypatch.setattr(quack, "QUACK_MISSING", None)
    monkeypatch.setattr(quack.FusedMLP, "refusal", lambda self, problem: None)
    monkeypatch.setattr(quack, "capability", lambda device: (9, 0))


def plain_gemm(
    a_OR: Tensor,
    b_HN: Tensor,
    out_EOH: Tensor,
    added: None,
    semaphore: None,
    *,
    cu_seqlens_k: Tensor,
    A_idx: Tensor,
    **tiles: int,
) -> None:
    """What ``quack.gemm.gemm`` does with these arguments, by its documentation."""
    assert added is None
    assert semaphore is None
    assert a_OR.stride(0) == b_HN.stride(0) == 1, "it takes no other order of the operands"
    assert cu_seqlens_k.dtype == A_idx.dtype == torch.int32
    assert 1 in out_EOH.stride()[1:]
    assert set(tiles) == {"tile_M", "tile_N", "cluster_M", "cluster_N", "pingpong"}
    for expert, out_OH in enumerate(out_EOH):
        rows = slice(*cu_seqlens_k[expert : expert + 2].tolist())
        product = a_OR[:, A_idx[rows]].double() @ b_HN[:, rows].double().T
        out_OH.copy_(product)


@pytest.fixture
def plain_quack(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Its calls are counted."""
    calls = []

    def gemm(*operands: Tensor, **options: Tensor) -> None:
        calls.append(1)
        plain_gemm(*operands, **options)

    module = ModuleType("quack.gemm")
    module.gemm = gemm
    monkeypatch.setitem(sys.modules, "quack.gemm", module)
    monkeypatch.setattr(quack, "QUACK_MISSING", None)
    monkeypatch.setattr(
        fused_run,
        "_plan",
        lambda *operands, quack=False: replace(PLAN, dup=Quack(), ddown=Quack()) if quack else PLAN,
    )
    return calls


def case_of(**changes: object) -> Case:
    return make_case(**{"dim": 40, "hidden": 24, "dtype": torch.float16, **changes})


@pytest.mark.parametrize(
    "shape",
    [
        {"rows": 40},
        {"rows": 40, "gated": 0},
        {"rows": 1, "k": 1, "sentinels": 0.0},
        {"num_experts": 1, "sentinels": 0.0},
        {"sentinels": 1.0},
        {"dim": 8, "hidden": 80, "bias": False},
    ],
    ids=str,
)
def test_matches_reference(plain_quack: list[int], shape: dict[str, object]) -> None:
    assert_equal_to_reference(case_of(**shape), "quack", 2e-3)
    assert sum(plain_quack) == 2


def test_nothing_to_do_asks_nothing_of_it(plain_quack: list[int]) -> None:
    assert_equal_to_reference(case_of(rows=0), "quack", 2e-3)
    assert not plain_quack


def test_triton_stays_without_it(plain_quack: list[int]) -> None:
    assert_equal_to_reference(case_of(rows=9), "triton", 2e-3)
    assert not plain_quack


@pytest.mark.parametrize(("hidden", "narrow"), [(256, True), (2048, False)])
def test_plan_takes_it_for_narrow_experts(hidden: int, narrow: bool) -> None:
    sizes = {"num_experts": 8, "num_assignments": 8192, "dim": 128, "hidden": hidden, "parts": 2}
    cpu = torch.device("cpu")
    rule = plan_for(cpu, torch.bfloat16, **sizes, packed=True)
    chosen = plan_for(cpu, torch.bfloat16, **sizes, packed=True, quack=True)
    assert chosen == (replace(rule, dup=Quack(), ddown=Quack()) if narrow else rule)


@pytest.mark.parametrize("change", [{"packed": False}, {"num_assignments": 64}], ids=str)
def test_plan_without_it_where_it_cannot_run(change: dict[str, object]) -> None:
    sizes = {"num_experts": 8, "num_assignments": 8192, "dim": 128, "hidden": 256, "parts": 2}
    given = {"device": torch.device("cpu"), "dtype": torch.bfloat16, "packed": True}
    given |= sizes | change
    assert plan_for(**given, quack=True) == plan_for(**given)


@pytest.mark.usefixtures("on_hopper")
def test_auto_takes_it_in_training_alone() -> None:
    fused = [backend for backend in MLP_BACKENDS if backend.name in ("quack", "triton")]
    assert choose(fused, TRAINING).name == "quack"
    assert choose(fused, replace(TRAINING, needs_grad=False)).name == "triton"
    assert "earlier in the list" in explain(fused, TRAINING).reasons["triton"]


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("version", "dtype", "capability", "reason"),
    [
        (None, torch.bfloat16, (8, 0), "for compute capability 9.0, this device has 8.0"),
        (None, torch.bfloat16, (9, 0), "not installed; run: pip install 'expertmesh[hopper]'"),
        ("0.6.5", torch.bfloat16, (9, 0), "as of 0.3.11, installed is 0.6.5; run: pip install"),
        ("0.3.11", torch.float32, (9, 0), "it takes bfloat16 and float16, not torch.float32"),
        ("0.3.11", torch.bfloat16, (9, 1), "for compute capability 9.0, this device has 9.1"),
        ("0.3.11", torch.bfloat16, (9, 0), None),
        ("0.3.11", torch.float16, (9, 0), None),
    ],
)
def test_refusals(
    monkeypatch: pytest.MonkeyPatch,
    version: str | None,
    dtype: torch.dtype,
    capability: tuple[int, int],
    reason: str | None,
) -> None:
    def installed(package: str) -> str:
        if version is None:
            raise quack.metadata.PackageNotFoundError(package)
        return version

    monkeypatch.setattr(quack.metadata, "version", installed)
    monkeypatch.setattr(quack, "QUACK_MISSING", quack._missing())
    monkeypatch.setattr(quack, "capability", lambda device: capability)
    refusal = QuackMLP().refusal(replace(TRAINING, dtype=dtype))
    assert (refusal is None) if reason is None else (reason in (refusal or ""))


def test_without_a_gpu_nobody_is_asked_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quack, "QUACK_MISSING", "run: pip install")
    monkeypatch.setattr(quack, "capability", lambda device: (9, 0))
    on_cpu = replace(TRAINING, device=torch.device("cpu"))
    assert "pip install" in (QuackMLP().refusal(TRAINING) or "")
    monkeypatch.delenv("TRITON_INTERPRET")
    assert QuackMLP().refusal(on_cpu) == "Triton has no kernels for the CPU"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "pip install" in (QuackMLP().refusal(on_cpu) or "")
