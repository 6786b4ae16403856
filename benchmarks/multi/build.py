"""A trainer's step over a decoder, on one device or on a mesh."""

import torch

from expertmesh.layer import moe_layers
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.train.compilation import compiled_forward
from expertmesh.train.optimizer import OptimConfig, build_optimizer
from expertmesh.train.passes import OneByOne
from expertmesh.train.precision import Precision, PrecisionName
from expertmesh.train.step import Stepper


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
    mesh: Mesh | None = None,
    zero: int = 2,
    expert_zero: int | None = None,
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
        mesh: None is this process by itself.
        zero: Stage of all parameters but the experts', where there is a mesh.
        expert_zero: The experts'; None is ``zero``.
    """
    with torch.device("meta"):
        model = DecoderLM(config, seed=values).to(dtype)
        for moe in moe_layers(model).values():
            moe.router.float()
    if mesh is not None:
        parallelize(model, mesh, zero=zero, expert_zero=expert_zero)
    model.to_empty(device=device)
    model.init_weights(values)
    passes = OneByOne(
        model,
        forward=compiled_forward(model, device) if compiled else None,
        precision=Precision(precision),
        device=device,
        sequences=sequences,
        mesh=mesh,
    )
    return Stepper(passes, build_optimizer(model, OptimConfig(lr=lr)), seed=draws, clip=1.0)
