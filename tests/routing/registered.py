"""Every router that a run file can name, in a tiny decoder: its shape, and a training run of it."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertmesh.data import Batch
from expertmesh.data.dataset import IGNORE
from expertmesh.errors import CausalityWarning, UserError
from expertmesh.models import DecoderConfig, DecoderLM, replace_routers
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.routing import PerSequence, PerTask, Router, TopKRouter
from expertmesh.routing.registry import router_names
from expertmesh.shards import Shard
from expertmesh.testing.equivalence import pieces
from expertmesh.train.optimizer import OptimConfig, build_optimizer
from expertmesh.train.passes import OneByOne
from expertmesh.train.precision import Precision
from expertmesh.train.step import Stepper

CPU = torch.device("cpu")
VOCAB, ROWS, LENGTH = 31, 4, 8
LENGTHS = (8, 3, 8, 6)
NAMES = router_names()

EXPERTS_PER_TOKEN = {
    **dict.fromkeys(("switch", "llama4", "deepspeed", "base", "hash", "thor"), 1),
    "hierarchical": 4,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"group_limit": {"num_groups": 4, "kept": 2}},
    # Zeros at first: far from them, content decides and not ties.
    "hierarchical": {"min_std": 0.5},
    "noisy_top_k": {"min_std": 0.5},
    "cosine": {"proj_dim": 6},
}


def _top_2(layer: int) -> Router:
    return TopKRouter(16, 8, 2, renormalize="chosen", init_std=0.3, seed=0, layer=layer)


WRAPPED: dict[str, Callable[[int], Router]] = {
    "PerSequence": lambda layer: PerSequence(_top_2(layer)),
    "PerTask": lambda layer: PerTask(_top_2(layer), VOCAB),
}
"""Routers that ``replace_routers`` puts in; the tasks of ``PerTask`` are token ids here."""


def shape(name: str, **options: Any) -> dict[str, Any]:
    """Fields of ``DecoderConfig``; options are the router's."""
    return {
        "vocab_size": VOCAB,
        "dim": 16,
        "num_layers": 2,
        "num_heads": 4,
        "max_seq_len": LENGTH,
        "num_experts": 8,
        "experts_per_token": EXPERTS_PER_TOKEN.get(name, 2),
        "expert_hidden": 8,
        "init_std": 0.3,
        "router": name,
        "router_options": {**OPTIONS.get(name, {}), **options},
    }


def decoder(name: str, mesh: Mesh | None = None, dispatch: str = "all_to_all") -> DecoderLM:
    """In float64, laid out on the meta device first, as the trainer lays it out over a mesh."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", CausalityWarning)
        model = DecoderLM(DecoderConfig(**shape(name if name in NAMES else "mixtral")))
        if name in WRAPPED:
            replace_routers(model, WRAPPED[name])
        model.double()
    if mesh is not None:
        parallelize(model, mesh, dispatch=dispatch)
    model.to_empty(device=CPU)
    model.init_weights(5)
    return model


def batch(step: int, *, padded: bool = True, filling: int = 0) -> Batch:
    """Rows of random tokens, some of them short, with ``filling`` in what is padding."""
    generator = torch.Generator().manual_seed(step)
    tokens_BS = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    targets_BS = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    mask_BS = None
    if padded:
        mask_BS = torch.arange(LENGTH) >= torch.tensor(LENGTHS)[:, None]
        tokens_BS = tokens_BS.masked_fill(mask_BS, filling)
        targets_BS = targets_BS.masked_fill(mask_BS, IGNORE)
    return Batch(tokens_BS, targets_BS, mask_BS, torch.arange(ROWS))


@dataclass(frozen=True)
class Trained:
    """What some steps showed on a rank: losses, norms of gradients, pieces of the parameters."""

    losses: list[float]
    norms: list[float]
    parameters: dict[str, Shard]


def stepper(model: DecoderLM, mesh: Mesh | None = None) -> Stepper:
    """Steps of one micro-batch."""
    passes = OneByOne(model, precision=Precision("fp32"), device=CPU, sequences=ROWS, mesh=mesh)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2))
    return Stepper(passes, optimizer, seed=7, clip=0.5)


def trained(
    model: DecoderLM, mesh: Mesh | None = None, *, steps: int = 2, padded: bool = True
) -> Trained:
    """Train a model for some steps."""
    taking = stepper(model, mesh)
    results = [taking.step(step, batch(step, padded=padded)) for step in range(1, steps + 1)]
    norms = [result.grad_norm for result in results]
    assert None not in norms
    found = pieces([*model.named_parameters(), *model.named_buffers()])
    return Trained([result.loss for result in results], norms, found)


def trained_on(
    axes: dict[str, int], names: Sequence[str], dispatch: str = "all_to_all"
) -> dict[str, Trained | str]:
    """The same of each on a rank of a mesh, or how it was refused."""
    mesh, found = Mesh(**axes), {}
    for name in names:
        try:
            found[name] = trained(decoder(name, mesh, dispatch), mesh)
        except UserError as error:
            found[name] = str(error)
    return found


def values(model: DecoderLM) -> Tensor:
    """All parameters in one row."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
