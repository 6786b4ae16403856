"""A run's model, laid out over its mesh, and how batches run through it."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from expertmesh.errors import UserError
from expertmesh.models.decoder import DecoderLM
from expertmesh.train.compilation import compiled_forward
from expertmesh.train.config import RunFile
from expertmesh.train.passes import OneByOne, Passes, ThroughPipeline
from expertmesh.train.precision import Precision

if TYPE_CHECKING:
    from expertmesh.parallel.mesh import Mesh


def build_model(run: RunFile, device: torch.device) -> DecoderLM:
    """The run's whole model with its initial values, which depend on its seed only."""
    with device:
        return DecoderLM(run.model, seed=run.run.seed)


def build_passes(run: RunFile, device: torch.device, mesh: "Mesh | None" = None) -> Passes:
    """The run's model and how batches run through it.

    Args:
        run: The run file.
        device: This process's.
        mesh: All processes; None is this one alone. Each rank then holds its part of the model,
            with the values that one process would have there.

    Raises:
        UserError: If the model does not fit the mesh.
    """
    if mesh is None:
        return _alone(run, device)
    if run.train.compile:
        raise UserError(
            "train.compile is for one process: on a mesh FSDP's hooks break the graph at every "
            "block; set train.compile = false"
        )
    from expertmesh.parallel.fsdp import parallelize
    from expertmesh.parallel.pipeline import Pipeline

    settings = run.mesh.resolve(mesh.world, run.model.num_experts)
    with torch.device("meta"):
        model = DecoderLM(run.model, seed=run.run.seed)
    stages = _cut(model, mesh, settings.stages)
    parallelize(
        model,
        mesh,
        zero=settings.zero,
        expert_zero=settings.expert_zero,
        dispatch=settings.dispatch,
        narrow=Precision(run.train.precision).narrow,
    )
    model.to_empty(device=device)
    model.init_weights(run.run.seed)
    if run.train.checkpoint_activations:
        model.checkpoint_blocks()
    common = _common(run, device) | {"mesh": mesh}
    if stages is None:
        return OneByOne(model, **common)
    pipeline = Pipeline(
        model,
        stages,
        mesh.group("pp"),
        autocast=partial(common["precision"].autocast, device),
    )
    return ThroughPipeline(model, pipeline=pipeline, **common)


def passes_over(model: DecoderLM, run: RunFile, device: torch.device) -> Passes:
    """How batches run through a model that is there already, in one process."""
    return OneByOne(model, **_common(run, device))


def _alone(run: RunFile, device: torch.device) -> Passes:
    model = build_model(run, device)
    if run.train.checkpoint_activations:
        model.checkpoint_blocks()
    forward = compiled_forward(model, device) if run.train.compile else None
    return OneByOne(model, forward=forward, **_common(run, device))


def _common(run: RunFile, device: torch.device) -> dict[str, Any]:
    return {
        "precision": Precision(run.train.precision),
        "device": device,
        "sequences": run.train.sequences,
        "loss": run.loss.kind,
    }


def _cut(model: DecoderLM, mesh: "Mesh", per_rank: int) -> Any:
    """Leave the model this rank's stages; None where there is no pipeline."""
    from expertmesh.models.stages import Stages, keep_stages

    ranks = mesh.degree("pp")
    if ranks == 1:
        return None
    stages = Stages.of(model.config, ranks, per_rank=per_rank)
    keep_stages(model, stages, mesh.coordinates["pp"])
    return stages
