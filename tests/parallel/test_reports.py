"""Counters of all ranks against those of one process."""

from typing import Any

import pytest
import torch
from torch import nn

from expertmesh.layer import moe_layers
from expertmesh.metrics import Metric, summarize
from expertmesh.models import DecoderLM
from expertmesh.models.stages import Stages, keep_stages
from expertmesh.parallel.agreement import Agreement
from expertmesh.parallel.experts import place_experts
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.reports import anyone, largest, read_metrics
from expertmesh.routing import Capacity
from expertmesh.testing import run_on_ranks
from tests.parallel.test_experts import CONFIG
from tests.parallel.user_model import DIM, moe_of, own_tokens, tokens


class Layers(nn.Module):
    """Enough layers that their order by name is not their order by number."""

    def __init__(self) -> None:
        super().__init__()
        capacity = Capacity(factor=0.7, scope="sequence")
        self.layers = nn.ModuleList(moe_of("mlp", seed=s, capacity=capacity) for s in range(11))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def read(degrees: dict[str, Any]) -> list[dict[str, dict[str, Metric]]]:
    """Metrics of two forward passes, and of none after them."""
    mesh = Mesh(**degrees)
    model = Layers().train()
    place_experts(model, mesh)
    ranks = Agreement(mesh.everyone)
    own = own_tokens(mesh, 8)
    for start in (0, 100):
        model(tokens(8 * 5, start).view(8, 5, DIM)[own])
    return [read_metrics(model, mesh, ranks), read_metrics(model, mesh, ranks)]


def assert_equal(got: dict[str, dict[str, Metric]], expected: dict[str, dict[str, Metric]]) -> None:
    assert list(got) == list(expected)
    for name, metrics in expected.items():
        assert list(got[name]) == list(metrics)
        for key, metric in metrics.items():
            assert got[name][key].reduce == metric.reduce
            torch.testing.assert_close(got[name][key].value, metric.value, msg=f"{name} {key}")


@pytest.mark.parametrize("degrees", [{"ep": 2}, {"ep": 2, "etp": 2}], ids=str)
def test_counters_are_summed_and_maxima_taken(degrees: dict[str, Any]) -> None:
    (expected, _), views = read({}), run_on_ranks(4, read, degrees)
    assert summarize(expected["layers.10"]).dropped > 0
    for metrics, after in views:
        assert_equal(metrics, expected)
        assert all(int(m["tokens"].value) == 0 for m in after.values())


def over_stages(degrees: dict[str, Any]) -> list[str]:
    """Every rank hears of the layers of every stage, in the model's order."""
    mesh = Mesh(**degrees)
    model = DecoderLM(CONFIG)
    names = list(moe_layers(model))
    if mesh.degree("pp") > 1:
        keep_stages(model, Stages.of(CONFIG, mesh.degree("pp")), mesh.coordinates["pp"])
    for moe in moe_layers(model).values():
        moe(torch.ones(mesh.rank + 1, CONFIG.dim))
    found = read_metrics(model, mesh, Agreement(mesh.everyone))
    assert list(found) == names
    return [f"{name} {int(metrics['tokens'].value)}" for name, metrics in found.items()]


def test_stages_tell_each_other_of_their_layers() -> None:
    # Stage 0 is ranks 0 and 1 with 1 + 2 tokens, stage 1 ranks 2 and 3 with 3 + 4.
    blocks = Stages.of(CONFIG, 2).blocks
    expected = [f"blocks.{n}.moe {3 if n in blocks[0] else 7}" for n in (1, 2)]
    for found in run_on_ranks(4, over_stages, {"pp": 2}):
        assert [line.replace(".ffn", ".moe") for line in found] == expected


def told() -> tuple[bool, bool, float]:
    mesh = Mesh()
    ranks = Agreement(mesh.everyone)
    return anyone(mesh.rank == 1, mesh), anyone(False, mesh), largest(mesh.rank * 0.5, ranks)


def test_what_one_rank_says_all_hear() -> None:
    assert run_on_ranks(3, told) == [(True, False, 1.0)] * 3
    assert anyone(True, Mesh())
    assert not anyone(False, Mesh())
    assert largest(2.5, Agreement()) == 2.5
