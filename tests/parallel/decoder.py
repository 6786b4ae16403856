"""A language model laid out over meshes, for tests of what is saved and loaded."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from expertmesh.models.config import DecoderConfig
from expertmesh.models.decoder import DecoderLM
from expertmesh.models.stages import Stages, keep_stages
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.train.checkpoint import Checkpoint, CheckpointFolder
from expertmesh.train.optimizer import OptimConfig, build_optimizer
from expertmesh.train.tensors import model_tensors, optimizer_tensors
from tests.parallel.cuts import Values, whole

CONFIG = DecoderConfig(
    vocab_size=50,
    dim=16,
    num_layers=3,
    num_heads=4,
    max_seq_len=32,
    dense_hidden=24,
    first_dense=1,
    num_experts=4,
    experts_per_token=2,
    expert_hidden=12,
    mlp="doubly_gated",  # three projections in one stack
    extra_mlp=True,
)


def laid_out(seed: int, zero: int, degrees: dict[str, Any]) -> tuple[DecoderLM, Mesh]:
    mesh = Mesh(**degrees)
    with torch.device("meta"):
        model = DecoderLM(CONFIG, seed=seed)
    if mesh.degree("pp") > 1:
        keep_stages(model, Stages.of(CONFIG, mesh.degree("pp")), mesh.coordinates["pp"])
    parallelize(model, mesh, zero=zero)
    model.to_empty(device="cpu")
    model.init_weights(seed)
    return model, mesh


def trained(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer that took two steps, whose gradients are functions of the weights alone."""
    optimizer = build_optimizer(model, OptimConfig(lr=0.1))
    for _ in range(2):
        for param in model.parameters():
            param.grad = param.detach() * 0.5 + 1
        optimizer.step()
    return optimizer


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> Values:
    tensors = {**model_tensors(model), **optimizer_tensors(model, optimizer)}
    return {name: whole(tensor) for name, tensor in tensors.items()}


def one_process() -> Values:
    model = DecoderLM(CONFIG, seed=0)
    return values(model, trained(model))


def save(path: Path, zero: int, degrees: dict[str, Any]) -> None:
    model, mesh = laid_out(0, zero, degrees)
    CheckpointFolder(path, group=mesh.everyone).save(2, model, trained(model), {})


def load(path: Path, zero: int, degrees: dict[str, Any]) -> Values:
    model, mesh = laid_out(1, zero, degrees)
    optimizer = build_optimizer(model, OptimConfig(lr=0.1))
    checkpoint, _ = CheckpointFolder(path, group=mesh.everyone).newest_valid()
    assert checkpoint is not None
    return _loaded(checkpoint, model, optimizer)


def load_in_one_process(path: Path) -> Values:
    model = DecoderLM(CONFIG, seed=1)
    checkpoint, _ = CheckpointFolder(path).newest_valid()
    assert checkpoint is not None
    return _loaded(checkpoint, model, build_optimizer(model, OptimConfig(lr=0.1)))


def _loaded(checkpoint: Checkpoint, model: DecoderLM, optimizer: torch.optim.Optimizer) -> Values:
    checkpoint.load_model(model)
    checkpoint.load_optimizer(model, optimizer)
    return values(model, optimizer)
