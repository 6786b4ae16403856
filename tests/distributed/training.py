"""Trains a setting in one process, or on a rank of a layout, and notes what it sees."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from expertmesh.data import Batch
from expertmesh.dispatch.collectives import own_range, total
from expertmesh.layer import set_loss_scale
from expertmesh.models import DecoderLM
from expertmesh.models.stages import Stages, keep_stages
from expertmesh.parallel.ddp import ddp
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.pipeline import Pipeline
from expertmesh.testing.equivalence import Observation, RankView, Watch, join, pieces, rows
from expertmesh.train.optimizer import OptimConfig, build_optimizer
from expertmesh.train.passes import OneByOne, Passes, ThroughPipeline, token_loss
from expertmesh.train.precision import Precision
from expertmesh.train.step import Stepper
from tests.distributed.layouts import Layout
from tests.distributed.settings import SETTINGS, Setting

STEPS = 5
CPU = torch.device("cpu")


def alone(name: str) -> Observation:
    """The setting in one process, without any mesh."""
    setting = SETTINGS[name]
    return join([_observe(setting, None, None)], setting.num_tokens)


def on_rank(layout: Layout, names: list[str]) -> list[RankView]:
    """The settings on this rank; each is trained twice, and must be the same to the bit.

    Raises:
        AssertionError: If it is not.
    """
    mesh = Mesh(**layout.axes, placement=layout.placement)
    views = []
    for name in names:
        view = _observe(SETTINGS[name], layout, mesh)
        again = _train(_stepper(SETTINGS[name], layout, mesh), SETTINGS[name], 2)
        assert again == list(zip(view.losses, view.norms, strict=True))[:2], name
        views.append(view)
    return views


def _observe(setting: Setting, layout: Layout | None, mesh: Mesh | None) -> RankView:
    stepper = _stepper(setting, layout, mesh)
    model, batch = stepper.model.train(), setting.batch(1)
    index = list(_own_tokens(setting, mesh))
    answers = model if getattr(model, "head", None) is not None else None
    with (
        Watch(getattr(model, "embedding", None), "forward") as inputs,
        Watch(answers, "logits") as outputs,
    ):
        stepper.accumulate(1, batch)
    input_gradients = inputs.gradients
    if layout is not None and layout.ddp:
        # DDP's backward pass is of a loss that is as many times larger as it averages over.
        input_gradients = [gradient / layout.world for gradient in input_gradients]
    gradients = pieces((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)

    stepper = _stepper(setting, layout, mesh)
    losses, norms = zip(*_train(stepper, setting, STEPS), strict=True)
    return RankView(
        outputs=rows(index, outputs.outputs) if answers is not None else [],
        input_gradients=rows(index, input_gradients) if inputs.outputs else [],
        gradients=gradients,
        norms=norms,
        losses=losses,
        parameters=pieces([*stepper.model.named_parameters(), *stepper.model.named_buffers()]),
    )


def _train(stepper: Stepper, setting: Setting, steps: int) -> list[tuple[float, float | None]]:
    results = [stepper.step(step, setting.batch(step)) for step in range(1, steps + 1)]
    return [(result.loss, result.grad_norm) for result in results]


def _stepper(setting: Setting, layout: Layout | None, mesh: Mesh | None) -> Stepper:
    if layout is None or mesh is None:
        model = setting.model(seed=5)
        setting.finish(model)
        passes: Passes = OneByOne(model, **_common(setting, None))
    else:
        passes = _laid_out(setting, layout, mesh)
    optimizer = build_optimizer(passes.model, OptimConfig(lr=1e-2))
    return Stepper(passes, optimizer, seed=7, clip=0.5)


def _laid_out(setting: Setting, layout: Layout, mesh: Mesh) -> Passes:
    """As the trainer does it: on the meta device first, then each rank's own values."""
    with torch.device("meta"):
        model = setting.model(seed=0)
    if layout.ddp:
        model.to_empty(device=CPU)
        model.init_weights(5)  # type: ignore[operator]  # both models have it
        setting.finish(model)
        return UnderDDP(ddp(model, mesh, dispatch=layout.dispatch), **_common(setting, mesh))
    stages = None
    if mesh.degree("pp") > 1:
        assert isinstance(model, DecoderLM)
        stages = Stages.of(model.config, mesh.degree("pp"), per_rank=layout.per_rank)
        keep_stages(model, stages, mesh.group("pp").index)
    parallelize(
        model, mesh, zero=layout.zero, expert_zero=layout.expert_zero, dispatch=layout.dispatch
    )
    model.to_empty(device=CPU)
    model.init_weights(5)  # type: ignore[operator]  # both models have it
    setting.finish(model)
    if stages is None:
        return OneByOne(model, **_common(setting, mesh))
    pipeline = Pipeline(model, stages, mesh.group("pp"))
    return ThroughPipeline(model, pipeline=pipeline, **_common(setting, mesh))


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


def _common(setting: Setting, mesh: Mesh | None) -> dict[str, Any]:
    return {
        "precision": Precision("fp32"),
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
