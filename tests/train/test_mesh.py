from typing import Any

import pytest
import torch

from expertmesh.errors import UserError
from expertmesh.train.mesh import MeshConfig

CPU = torch.device("cpu")


def test_one_process_has_no_mesh() -> None:
    assert MeshConfig().build(1, 8, CPU) is None
    assert MeshConfig(dp=1, ep=1).build(1, 8, CPU) is None


def test_degrees_beyond_one_process_are_named_with_what_to_do() -> None:
    with pytest.raises(UserError, match=r"ep=4.*one process was started: use torchrun"):
        MeshConfig(ep=4).build(1, 8, CPU)


@pytest.mark.parametrize(
    ("axis", "value"), [("tp", 0), ("tp", -1), ("dp", 0), ("dp", -2), ("edp", 0), ("stages", 0)]
)
def test_degrees_below_one_are_refused(axis: str, value: int) -> None:
    with pytest.raises(UserError, match=rf"mesh.{axis} must be at least 1.*got {value}"):
        MeshConfig(**{axis: value})


@pytest.mark.parametrize("field", ["zero", "expert_zero"])
def test_unknown_stages_are_refused(field: str) -> None:
    with pytest.raises(UserError, match=rf"mesh.{field} must be 0, 1, 2 or 3, got 4"):
        MeshConfig(**{field: 4})


def test_a_strategy_is_a_choice_of_degrees() -> None:
    resolved = MeshConfig(strategy="ep_zero", tp=1).resolve(8, 16)
    assert resolved == MeshConfig(ep=4, placement="outside", zero=1, expert_zero=1)
    assert MeshConfig(strategy="ep").resolve(8, 4).ep == 4
    hybrid = MeshConfig(strategy="hybrid").resolve(8, 16)
    assert (hybrid.pp, hybrid.ep, hybrid.zero) == (2, 4, 1)


@pytest.mark.parametrize("strategy", [None, "ep"])
def test_stages_without_a_pipeline_are_refused(strategy: Any) -> None:
    with pytest.raises(UserError, match=r"mesh.stages is of pipelines, got 2 with mesh.pp=1"):
        MeshConfig(strategy=strategy, stages=2).build(1, 8, CPU)
    assert MeshConfig(strategy="hybrid", stages=2).resolve(8, 16).stages == 2


def test_a_strategy_beside_its_own_degrees_is_refused() -> None:
    with pytest.raises(UserError, match=r"mesh.strategy='ep' sets mesh.ep, mesh.zero itself"):
        MeshConfig(strategy="ep", ep=2, zero=3)


@pytest.mark.parametrize("timeout", [0.0, float("nan"), float("inf"), 1e15])
def test_a_timeout_that_no_clock_counts_is_refused(timeout: float) -> None:
    with pytest.raises(UserError, match=r"mesh\.timeout must be above 0 .*set mesh\.timeout = 600"):
        MeshConfig(timeout=timeout)
