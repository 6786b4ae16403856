from pathlib import Path
from typing import Any

import pytest
import torch

from expertmesh.errors import UserError
from expertmesh.parallel.mesh import Mesh
from expertmesh.shards import is_sharded
from expertmesh.testing import run_on_ranks
from expertmesh.testing.equivalence import assemble, pieces
from expertmesh.train.build import build_model, build_passes, passes_over
from expertmesh.train.config import RunFile
from expertmesh.train.passes import OneByOne, ThroughPipeline
from tests.train.tiny import make_run

CPU = torch.device("cpu")


def test_one_process_gets_the_whole_model(tmp_path: Path) -> None:
    run = make_run(tmp_path, "--train.checkpoint_activations=true", "--train.micro_batch=2")
    passes = build_passes(run, CPU)
    assert isinstance(passes, OneByOne)
    assert (passes.mesh, passes.sequences, passes.device) == (None, 2, CPU)
    expected = dict(build_model(run, CPU).named_parameters())
    for name, param in passes.model.named_parameters():
        assert torch.equal(param, expected[name])
        assert not is_sharded(param)
    again = passes_over(build_model(run, CPU), run, CPU)
    assert isinstance(again, OneByOne)
    assert again.sequences == 2


def on_mesh(run: RunFile) -> dict[str, Any]:
    mesh = run.mesh.build(4, run.model.num_experts, CPU)
    assert isinstance(mesh, Mesh)
    passes = build_passes(run, CPU, mesh)
    assert passes.mesh is mesh
    zero = {name: is_sharded(param) for name, param in passes.model.named_parameters()}
    return {
        "type": type(passes).__name__,
        "values": pieces([*passes.model.named_parameters(), *passes.model.named_buffers()]),
        "sharded": all(zero.values()),
    }


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (["--mesh.ep=2", "--mesh.zero=3", "--mesh.expert_zero=1"], OneByOne),
        (["--mesh.strategy=ep_zero"], OneByOne),
        (["--mesh.pp=2", "--mesh.tp=2", "--mesh.etp=2"], ThroughPipeline),
    ],
    ids=str,
)
def test_ranks_hold_the_values_of_one_process(
    tmp_path: Path, overrides: list[str], kind: type
) -> None:
    run = make_run(tmp_path, *overrides)
    views = run_on_ranks(4, on_mesh, run)
    assert {view["type"] for view in views} == {kind.__name__}
    assert all(view["sharded"] for view in views)
    values = assemble([view["values"] for view in views])
    model = build_model(run, CPU)
    expected = dict([*model.named_parameters(), *model.named_buffers()])
    assert values.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(values[name], tensor.detach()), name


def refusal(run: RunFile) -> str:
    with pytest.raises(UserError) as caught:
        build_passes(run, CPU, Mesh())
    return str(caught.value)


def test_compiling_on_a_mesh_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, "--train.compile=true")
    for message in run_on_ranks(2, refusal, run):
        assert "train.compile is for one process" in message
        assert "set train.compile = false" in message
