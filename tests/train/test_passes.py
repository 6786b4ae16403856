"""Passes over a batch on several ranks, against one process; steps are compared elsewhere."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh.data import Batch
from expertmesh.data.dataset import IGNORE
from expertmesh.errors import UserError
from expertmesh.kernels.cross_entropy import token_loss
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.models.stages import Stages, keep_stages
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.pipeline import Pipeline
from expertmesh.shards import shard_of
from expertmesh.testing import assert_close, run_on_ranks
from expertmesh.testing.equivalence import assemble, pieces
from expertmesh.train.optimizer import OptimConfig, build_optimizer
from expertmesh.train.passes import OneByOne, Passes, ThroughPipeline
from expertmesh.train.precision import LossScale, Precision, PrecisionName
from expertmesh.train.step import Stepper
from tests.train.test_step import make_batch
from tests.train.tiny import MODEL

CONFIG = DecoderConfig(**MODEL | {"num_layers": 3, "first_dense": 1, "moe_every": 1})
CPU = torch.device("cpu")


def passes_of(
    degrees: dict[str, Any],
    sequences: int,
    dtype: torch.dtype = torch.float64,
    precision: PrecisionName = "fp32",
) -> Passes:
    mesh = Mesh(**degrees)
    model = DecoderLM(CONFIG, seed=5).to(dtype)
    common: dict[str, Any] = {
        "precision": Precision(precision),
        "device": CPU,
        "sequences": sequences,
    }
    if mesh.world == 1:
        return OneByOne(model, **common)
    common["mesh"] = mesh
    if mesh.degree("pp") == 1:
        return OneByOne(parallelize(model, mesh), **common)
    stages = Stages.of(CONFIG, mesh.degree("pp"))
    keep_stages(model, stages, mesh.coordinates["pp"])
    parallelize(model, mesh)
    autocast = partial(Precision(precision).autocast, CPU)
    pipeline = Pipeline(model, stages, mesh.group("pp"), autocast=autocast)
    return ThroughPipeline(model, pipeline=pipeline, **common)


def batches() -> list[Batch]:
    """More rows than ranks, fewer rows, padding, and a row that is all padding."""
    return [
        make_batch(5, 7),
        make_batch(1, 6),
        make_batch(4, 8, lengths=[8, 3, 0, 1]),
    ]


def passed(degrees: dict[str, Any], even: int) -> dict[str, Any]:
    passes = passes_of(degrees, 2)
    passes.model.train()
    # Micro-batches of a pipeline have one shape; others need not.
    batch = make_batch(5 if even == 1 else 4, 7)
    loss = passes.backward(batch, seed=1, step=2, scale=4.0)
    gradients = pieces(
        (n, p.grad) for n, p in passes.model.named_parameters() if p.grad is not None
    )
    passes.model.eval()
    return {
        "loss": float(loss),
        "gradients": gradients,
        "nats": [passes.nats(batch) for batch in batches()],
    }


@pytest.mark.parametrize(
    "degrees",
    [{"ep": 2}, {"cp": 2, "tp": 2, "ep": 2, "etp": 2}, {"pp": 2, "ep": 2}],
    ids=str,
)
def test_loss_nats_and_gradients(degrees: dict[str, Any]) -> None:
    even = degrees.get("pp", 1)
    expected = passed({}, even)
    views = run_on_ranks(4, passed, degrees, even)
    for view in views:
        assert view["loss"] == pytest.approx(expected["loss"], rel=1e-12)
        assert view["nats"] == pytest.approx(expected["nats"], rel=1e-12)
        assert view["loss"] == views[0]["loss"]
    got = assemble([view["gradients"] for view in views])
    whole = assemble([expected["gradients"]])
    assert got.keys() == whole.keys()
    for name, gradient in whole.items():
        assert_close(name, got[name], gradient, 1e-11)


def uneven() -> str:
    """Five rows in micro-batches of three: the second data rank has one row of each."""
    with pytest.raises(UserError) as caught:
        passes_of({"pp": 2}, 3).backward(make_batch(5, 7), seed=1, step=2, scale=1.0)
    return str(caught.value)


def test_uneven_micro_batches_of_a_pipeline_are_refused_on_every_rank() -> None:
    for message in run_on_ranks(4, uneven, timeout=30):
        assert "got 5 sequences in micro-batches of 3; set train.micro_batch" in message


def stepped(degrees: dict[str, Any], scale: float) -> tuple[list[float | None], float, bool]:
    passes = passes_of(degrees, 2, torch.float32, "fp16")
    stepper = Stepper(passes, build_optimizer(passes.model, OptimConfig(lr=1e-2)), seed=1, clip=1.0)
    stepper.loss_scale = LossScale(scale=scale)
    norms = [stepper.step(number, make_batch(4, 7)).grad_norm for number in range(1, 5)]
    finite = all(bool(shard_of(p).local.isfinite().all()) for p in passes.model.parameters())
    return norms, stepper.loss_scale.scale, finite


@pytest.mark.parametrize("degrees", [{"ep": 2}, {"pp": 2}], ids=str)
def test_ranks_skip_a_step_of_float16_together(degrees: dict[str, Any]) -> None:
    """On one rank the gradient may be finite still, where another's overflowed."""
    views = run_on_ranks(2, stepped, degrees, 2.0**30)
    assert all(view[:2] == views[0][:2] and view[2] for view in views)
    norms, scale, _ = views[0]
    assert norms[0] is None
    assert scale == 2.0 ** (30 - norms.count(None))
    (good,) = {view[1] for view in run_on_ranks(2, stepped, degrees, 2.0**10)}
    assert good == 2.0**10


def test_nats_are_those_of_the_whole_model_at_once() -> None:
    passes = passes_of({}, 2)
    passes.model.eval()
    for batch in batches():
        logits_BSV: Tensor = passes.model(batch.tokens_BS, padding_mask=batch.padding_mask_BS)
        expected = float(token_loss(logits_BSV, batch.targets_BS).detach())
        assert passes.nats(batch) == pytest.approx(expected, rel=1e-12)


def test_the_loss_is_a_sum_in_float32_or_wider() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.bfloat16)
    targets = torch.tensor([[0, 1, IGNORE], [4, IGNORE, 2]])
    loss = token_loss(logits, targets)
    assert loss.dtype == torch.float32
    log_p = logits.float().log_softmax(-1)
    expected = -sum(log_p[b, s, t] for b, row in enumerate(targets.tolist())
                    for s, t in enumerate(row) if t != IGNORE)  # fmt: skip
    torch.testing.assert_close(loss, torch.as_tensor(expected))
    assert token_loss(logits.double(), targets).dtype == torch.float64
    assert token_loss(logits[:0], targets[:0]) == 0
