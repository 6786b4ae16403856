"""The routers of a whole decoder: putting others in their place, and what they let through."""

import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import nn

from expertmesh.errors import CausalityWarning, UserError
from expertmesh.layer import moe_layers
from expertmesh.routing import Router

_PACKAGE = str(Path(__file__).parents[1])


def replace_routers(model: nn.Module, build: Callable[[int], Router]) -> None:
    """Give every MoE layer of a causal decoder another router, of any family.

    The new routers keep the values that they were made with. They are not in the model's
    configuration: whoever loads its weights replaces the routers first.

    Args:
        model: Such as ``DecoderLM``, in one process.
        build: From the layer's number, counted over the MoE layers from 0, to its router; give the
            number on as ``layer``, which sets the layers' random draws apart.

    Raises:
        ValueError: If a router does not fit the layer's experts.
    """
    layers = moe_layers(model)
    for number, (name, moe) in enumerate(layers.items()):
        router = build(number)
        for field in ("num_experts", "dim"):
            ours, theirs = getattr(router, field), getattr(moe.experts, field)
            if ours != theirs:
                raise UserError(
                    f"the router of {name} must have the experts' {field}={theirs}, got {ours}"
                )
        weight = next(moe.experts.parameters(), None)
        router.population = moe.router.population
        router.train(moe.router.training)  # a new module trains: it would draw noise, and drop
        moe.router = router if weight is None else router.to(weight.device)
    warn_of_leaks(moe.router for moe in layers.values())


def warn_of_leaks(routers: Iterable[Router]) -> None:
    """Warn, once for each kind of leak, of routers that have no place in a causal decoder."""
    leaks = {(type(router).__name__, router.leaks): None for router in routers if router.leaks}
    for name, leak in leaks:
        warnings.warn(
            f"{name} in a causal decoder lets later tokens reach earlier ones: {leak}; its "
            "training loss is too good, and generation computes something else",
            CausalityWarning,
            stacklevel=_depth_of_caller(),
        )


def _depth_of_caller() -> int:
    """Frames between the warning and the code that uses this package."""
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, depth = frame.f_back, depth + 1
    return depth
