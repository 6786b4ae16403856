"""What is chosen, what is refused, and what is said about it."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from expertmesh.kernels.backends import Problem, choose, explain
from expertmesh.kernels.moe_mlp import MLP_BACKENDS

CPU = Problem(
    device=torch.device("cpu"),
    dtype=torch.float32,
    num_experts=8,
    num_assignments=4096,
    dim=64,
    hidden=128,
    needs_grad=True,
)


def test_auto_on_cpu_is_the_loop() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for compiling in (False, True):
            problem = replace(CPU, dtype=dtype, compiling=compiling)
            assert choose(MLP_BACKENDS, problem).name == "loop"


def test_auto_on_cuda(monkeypatch: pytest.MonkeyPatch, forget_gpus: Callable[[], None]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = replace(CPU, device=torch.device("cuda"), dtype=torch.bfloat16)
    assert choose(MLP_BACKENDS, cuda).name == "triton"
    assert choose(MLP_BACKENDS, replace(cuda, activation=None)).name == "grouped_mm"
    assert choose(MLP_BACKENDS, replace(cuda, dtype=torch.float32)).name == "loop"
    assert choose(MLP_BACKENDS, replace(cuda, dim=63)).name == "loop"
    few = replace(cuda, num_assignments=8, needs_grad=False, dtype=torch.float32)
    assert choose(MLP_BACKENDS, few).name == "gather"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    forget_gpus()
    assert choose(MLP_BACKENDS, cuda).name == "grouped_mm"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    forget_gpus()
    assert choose(MLP_BACKENDS, cuda).name == "loop"


def test_auto_in_a_recorded_graph(
    monkeypatch: pytest.MonkeyPatch, forget_gpus: Callable[[], None]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    sizes = {"num_assignments": 262_144, "dim": 2048, "hidden": 1024, "num_experts": 64}
    recorded = replace(CPU, device=torch.device("cuda"), capturing=True, **sizes)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert choose(MLP_BACKENDS, replace(recorded, dtype=dtype)).name == "triton"
    # Nothing else can be recorded: few choices have their matrices copied, many are an error.
    wide = replace(recorded, dtype=torch.float64)
    assert choose(MLP_BACKENDS, replace(wide, num_assignments=512)).name == "gather"
    with pytest.raises(
        ValueError, match=r"in a recorded CUDA graph; .*gather: .*12288 GiB.*loop: "
    ):
        choose(MLP_BACKENDS, wide)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    forget_gpus()
    half = replace(recorded, dtype=torch.float16)
    assert choose(MLP_BACKENDS, half).name == "block_sparse"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "gather",
            {"num_assignments": 2_000_000},
            "copies the matrices of each of 2000000 choices",
        ),
        (
            "decode",
            {"needs_grad": False, "num_assignments": 8, "hidden": 65_536},
            "dim, hidden and num_experts must be at most 65535",
        ),
        (
            "triton",
            {"num_assignments": 2**29 + 1},
            r"at most 2\^29 choices of experts, got 536870913",
        ),
        ("grouped_mm", {"dtype": torch.float64}, "takes float32, float16 and bfloat16"),
        ("grouped_mm", {"dim": 63}, "dim must be a multiple of 4 for torch.float32, got 63"),
        ("grouped_mm", {"hidden": 7}, "hidden must be a multiple of 4"),
        ("grouped_mm", {"compiling": True}, "traces grouped_mm for bfloat16 only"),
        ("grouped_mm", {"device": torch.device("meta")}, "no kernel for meta"),
        ("loop", {"capturing": True}, "row counts are read on the host"),
        ("reference", {"compiling": True}, "torch.compile cannot trace it"),
    ],
)
def test_forced_but_impossible(name: str, change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"backend '{name}' cannot run this: .*{message}"):
        choose(MLP_BACKENDS, replace(CPU, **change), name)


def test_auto_asks_no_further_than_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question costs the host time at every call of a layer."""
    asked = []
    for backend in MLP_BACKENDS:
        monkeypatch.setattr(type(backend), "refusal", lambda self, problem: asked.append(self.name))
    monkeypatch.setattr(type(MLP_BACKENDS[0]), "suits", lambda self, problem: True)
    assert choose(MLP_BACKENDS, CPU) is MLP_BACKENDS[0]
    assert asked == [MLP_BACKENDS[0].name]


def test_auto_takes_the_first_that_can_where_none_suits(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in MLP_BACKENDS:
        monkeypatch.setattr(type(backend), "suits", lambda self, problem: False)
    assert choose(MLP_BACKENDS, CPU).name == "gather"


def test_nothing_that_can_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in MLP_BACKENDS:
        monkeypatch.setattr(type(backend), "refusal", lambda self, problem: "no")
    with pytest.raises(ValueError, match=r"no backend runs torch\.float32 on cpu"):
        choose(MLP_BACKENDS, CPU)


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"one of auto, .*gather.*got 'lop'; did you mean 'loop'"):
        choose(MLP_BACKENDS, CPU, "lop")


def test_explain_gives_a_reason_for_each_other() -> None:
    explanation = explain(MLP_BACKENDS, replace(CPU, dtype=torch.float64))
    assert explanation.chosen.name == "loop"
    others = {"block_sparse", "decode", "gather", "grouped_mm", "quack", "reference", "triton"}
    assert explanation.reasons.keys() == others
    assert "not torch.float64" in explanation.reasons["grouped_mm"]
    assert explanation.reasons["gather"] == "can run, expected to be slower"
