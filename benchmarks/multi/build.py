"""A trainer's step over a decoder, on one device or on a mesh."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from expertmesh.layer import moe_layers
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.models.stages import Stages, keep_stages
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.pipeline import Pipeline
from expertmesh.train.compilation import compiled_forward
from expertmesh.train.optimizer import OptimConfig, build_optimizer
from expertmesh.train.passes import OneByOne, Passes, ThroughPipeline
from expertmesh.train.precision import Precision, PrecisionName
from expertmesh.train.step import Stepper


@dataclass(frozen=True)
class Place:
    """Where a model lies.

    Attributes:
        mesh: With ``pp`` above 1 the model runs as a pipeline.
        zero: Stage of all parameters but the experts'.
        expert_zero: The experts'; None is ``zero``.
        per_rank: Pipeline stages of each rank.
    """

    mesh: Mesh
    zero: int = 2
    expert_zero: int | None = None
    per_rank: int = 1

    def lay_out(self, model: DecoderLM, narrow: torch.dtype | None) -> Stages | None:
        """Leave a model on the meta device what is this rank's, in place.

        Args:
            model: Of whole blocks.
            narrow: What autocast will be on with.

        Returns:
            The pipeline's cut; None where there is no pipeline.
        """
        stages, ranks = None, self.mesh.degree("pp")
        if ranks > 1:
            stages = Stages.of(model.config, ranks, per_rank=self.per_rank)
            keep_stages(model, stages, self.mesh.group("pp").index)
        parallelize(model, self.mesh, zero=self.zero, expert_zero=self.expert_zero, narrow=narrow)
        return stages


def make_stepper(
    config: DecoderConfig,
    device: torch.device,
    *,
    precision: PrecisionName,
    sequences: int,
    lr: float,
    values: int = 0,
    draws: int = 0,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    place: Place | None = None,
) -> Stepper:
    """AdamW, clipped at norm 1.

    Args:
        config: The model's shape.
        device: This process's.
        precision: Of the products.
        sequences: Rows of a micro-batch, on the whole mesh.
        lr: Learning rate.
        values: Seed of the initial values.
        draws: Seed of what steps draw.
        dtype: Of parameters, gradients and moments; routers stay in float32.
        compiled: Whether the blocks are, as by ``train.compile``; without a mesh.
        place: None is this process by itself.
    """
    with torch.device("meta"):
        model = DecoderLM(config, seed=values).to(dtype)
        for moe in moe_layers(model).values():
            moe.router.float()
    stages = None if place is None else place.lay_out(model, Precision(precision).narrow)
    model.to_empty(device=device)
    model.init_weights(values)
    common: dict[str, Any] = {
        "precision": Precision(precision),
        "device": device,
        "sequences": sequences,
        "mesh": None if place is None else place.mesh,
    }
    passes: Passes
    if place is None or stages is None:
        forward = compiled_forward(model, device) if compiled else None
        passes = OneByOne(model, forward=forward, **common)
    else:
        autocast = partial(common["precision"].autocast, device)
        pipeline = Pipeline(model, stages, place.mesh.group("pp"), autocast=autocast)
        passes = ThroughPipeline(model, pipeline=pipeline, **common)
    return Stepper(passes, build_optimizer(model, OptimConfig(lr=lr)), seed=draws, clip=1.0)
