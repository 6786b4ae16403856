"""Trains a setting in one process, or on a rank of a layout, and notes what it sees."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from expertmesh.data import Batch
from expertmesh.dispatch.collectives import own_range, total
from expertmesh.kernels.cross_entropy import token_loss
from expertmesh.layer import moe_layers, set_loss_scale
from expertmesh.metrics import Metric
from expertmesh.models import DecoderLM
from expertmesh.models.decoder import OutputLayer
from expertmesh.models.stages import Stages, keep_stages
from expertmesh.parallel.ddp import ddp
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.pipeline import Pipeline
from expertmesh.shards import Shard
from expertmesh.testing.equivalence import Observation, RankView, Watch, join, pieces, rows
from expertmesh.train.checkpoint import CheckpointFolder
from expertmesh.train.optimizer import OptimConfig, build_optimizer
from expertmesh.train.passes import OneByOne, Passes, ThroughPipeline
from expertmesh.train.precision import Precision, PrecisionName
from expertmesh.train.step import Stepper
from tests.distributed.layouts import Layout
from tests.distributed.settings import SETTINGS, Setting

STEPS = 5
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Numbers:
    """What parameters are, and what the forward pass computes in."""

    dtype: torch.dtype = torch.float64
    precision: PrecisionName = "fp32"  # no autocast


FLOAT64 = Numbers()


def alone(name: str, numbers: Numbers = FLOAT64) -> Observation:
    """The setting in one process, without any mesh."""
    setting = SETTINGS[name]
    return join([_observe(setting, None, None, numbers)], setting.num_tokens)


def on_rank(layout: Layout, names: list[str], numbers: Numbers = FLOAT64) -> list[RankView]:
    """The settings on this rank; each is trained twice, and must be the same to the bit.

    Raises:
        AssertionError: If it is not.
    """
    mesh = Mesh(**layout.axes, placement=layout.placement)
    views = []
    for name in names:
        view = _observe(SETTINGS[name], layout, mesh, numbers)
        again = _train(_stepper(SETTINGS[name], layout, mesh, numbers), SETTINGS[name], range(1, 3))
        assert again == list(zip(view.losses, view.norms, strict=True))[:2], name
        views.append(view)
    return views


def counters(layout: Layout | None, name: str) -> dict[str, dict[str, Metric]]:
    """What each MoE layer counted in one step on this rank."""
    mesh = None if layout is None else Mesh(**layout.axes, placement=layout.placement)
    stepper = _stepper(SETTINGS[name], layout, mesh)
    _train(stepper, SETTINGS[name], range(1, 2))
    return {layer: moe.metrics() for layer, moe in moe_layers(stepper.model).items()}


def save_after(layout: Layout, name: str, folder: Path, steps: int) -> None:
    """Train some steps and save a checkpoint."""
    mesh = Mesh(**layout.axes, placement=layout.placement)
    stepper = _stepper(SETTINGS[name], layout, mesh)
    _train(stepper, SETTINGS[name], range(1, steps + 1))
    checkpoints = CheckpointFolder(folder, group=mesh.everyone)
    checkpoints.save(steps, stepper.model, stepper.optimizer, {})


def go_on(layout: Layout, name: str, folder: Path) -> tuple[list[float], dict[str, Shard]]:
    """Load the checkpoint and train on to the last step: losses, and pieces of the parameters."""
    mesh = Mesh(**layout.axes, placement=layout.placement)
    stepper = _stepper(SETTINGS[name], layout, mesh)
    checkpoint, _ = CheckpointFolder(folder, group=mesh.everyone).newest_valid()
    assert checkpoint is not None
    checkpoint.load_model(stepper.model)
    checkpoint.load_optimizer(stepper.model, stepper.optimizer)
    results = _train(stepper, SETTINGS[name], range(checkpoint.step + 1, STEPS + 1))
    model = stepper.model
    found = pieces([*model.named_parameters(), *model.named_buffers()])
    return [loss for loss, _ in results], found


def _observe(
    setting: Setting, layout: Layout | None, mesh: Mesh | None, numbers: Numbers
) -> RankView:
    stepper = _stepper(setting, layout, mesh, numbers)
    model = stepper.model
    answers = model if getattr(model, "head", None) is not None else None
    gradients: dict[str, Shard] = {}
    outputs: list[Tensor] = []
    with (
        Watch(getattr(model, "embedding", None), "forward") as inputs,
        _logits(answers, outputs),
        _gradients_before_clipping(stepper, gradients),
    ):
        results = _train(stepper, setting, range(1, 2))
    results += _train(stepper, setting, range(2, STEPS + 1))
    losses, norms = zip(*results, strict=True)
    index = list(_own_tokens(setting, mesh))
    input_gradients = inputs.gradients
    if layout is not None and layout.ddp:
        # DDP's backward pass is of a loss that is as many times larger as it averages over.
        input_gradients = [gradient / layout.world for gradient in input_gradients]
    return RankView(
        outputs=rows(index, outputs) if answers is not None else [],
        input_gradients=rows(index, input_gradients) if inputs.outputs else [],
        gradients=gradients,
        norms=norms,
        losses=losses,
        parameters=pieces([*model.named_parameters(), *model.named_buffers()]),
    )


@contextmanager
def _logits(model: Any, found: list[Tensor]) -> Iterator[None]:
    """Note the logits that each pass would give; the loss is made without them."""
    if model is None:
        yield
        return
    plain = model.logits

    def logits(hidden_BSD: Tensor, output: OutputLayer | None = None) -> Tensor:
        with torch.no_grad():
            found.append(plain(hidden_BSD).clone())
        result: Tensor = plain(hidden_BSD, output)
        return result

    model.logits = logits
    yield
    del model.logits


@contextmanager
def _gradients_before_clipping(stepper: Stepper, found: dict[str, Shard]) -> Iterator[None]:
    """Note a step's gradients when they are complete and not clipped yet."""
    accumulate = stepper.accumulate

    def noting(step: int, batch: Batch) -> Tensor:
        loss = accumulate(step, batch)
        params = stepper.model.named_parameters()
        found.update(pieces((name, p.grad) for name, p in params if p.grad is not None))
        return loss

    stepper.accumulate = noting
    try:
        yield
    finally:
        del stepper.accumulate


def _train(stepper: Stepper, setting: Setting, steps: range) -> list[tuple[float, float]]:
    found = []
    for step in steps:
        result = stepper.step(step, setting.batch(step))
        assert result.grad_norm is not None
        found.append((result.loss, result.grad_norm))
    return found


def _stepper(
    setting: Setting, layout: Layout | None, mesh: Mesh | None, numbers: Numbers = FLOAT64
) -> Stepper:
    if layout is None or mesh is None:
        model = setting.model(seed=5, dtype=numbers.dtype)
        setting.finish(model)
        passes: Passes = OneByOne(model, **_common(setting, None, numbers))
    else:
        passes = _laid_out(setting, layout, mesh, numbers)
    optimizer = build_optimizer(passes.model, OptimConfig(lr=1e-2))
    return Stepper(passes, optimizer, seed=7, clip=0.5)


def _laid_out(setting: Setting, layout: Layout, mesh: Mesh, numbers: Numbers) -> Passes:
    """As the trainer does it: on the meta device first, then each rank's own values."""
    with torch.device("meta"):
        model = setting.model(seed=0, dtype=numbers.dtype)
    if layout.ddp:
        model.to_empty(device=CPU)
        model.init_weights(5)
        setting.finish(model)
        return UnderDDP(
            ddp(model, mesh, dispatch=layout.dispatch), **_common(setting, mesh, numbers)
        )
    stages = None
    if mesh.degree("pp") > 1:
        assert isinstance(model, DecoderLM)
        stages = Stages.of(model.config, mesh.degree("pp"), per_rank=layout.per_rank)
        keep_stages(model, stages, mesh.group("pp").index)
    parallelize(
        model,
        mesh,
        zero=layout.zero,
        expert_zero=layout.expert_zero,
        dispatch=layout.dispatch,
        narrow=Precision(numbers.precision).narrow,
    )
    model.to_empty(device=CPU)
    model.init_weights(5)
    setting.finish(model)
    if stages is None:
        return OneByOne(model, **_common(setting, mesh, numbers))
    pipeline = Pipeline(model, stages, mesh.group("pp"))
    return ThroughPipeline(model, pipeline=pipeline, **_common(setting, mesh, numbers))


class UnderDDP(Passes):
    """A training loop as a DDP script has it: mean losses, gradients averaged in the last pass."""

    def __init__(self, wrapped: DistributedDataParallel, **others: Any) -> None:
        super().__init__(wrapped.module, **others)
        self.wrapped = wrapped

    def backward(self, batch: Batch, *, seed: int, step: int, scale: float) -> Tensor:
        assert self.mesh is not None
        loss = torch.zeros((), dtype=torch.float64)
        parts = list(self.parts(batch))
        for part in parts:
            set_loss_scale(self.model, scale * part.share)
            with nullcontext() if part is parts[-1] else self.wrapped.no_sync():
                logits_BSV = self.wrapped(part.tokens_BS, **part.arguments(seed, step))
                addend = token_loss(logits_BSV, part.targets_BS) / batch.num_targets
                # DDP divides by the number of ranks.
                (addend * scale * self.mesh.world).backward()
            loss += addend.detach()
        return total(loss, self.mesh.everyone)

    def nats(self, batch: Batch) -> float:
        raise NotImplementedError


def _common(setting: Setting, mesh: Mesh | None, numbers: Numbers) -> dict[str, Any]:
    return {
        "precision": Precision(numbers.precision),
        "device": CPU,
        "sequences": setting.sequences,
        "mesh": mesh,
    }


def _own_tokens(setting: Setting, mesh: Mesh | None) -> Iterator[Tensor]:
    """Of each micro-batch, the indices of the tokens that are this rank's to compute."""
    index_BS = torch.arange(setting.num_tokens).view(setting.rows, setting.seq_len)
    for part in index_BS.split(setting.sequences):
        if mesh is not None:
            for axis, dim in (("dp", 0), ("cp", 1), ("tp", 1)):
                start, stop = own_range(part.shape[dim], mesh.group(axis))
                part = part.narrow(dim, start, stop - start)
        yield part
