"""Initial values of a model, each a function of the seed and the parameter's own name."""

from torch import nn

from expertmesh.experts import Experts
from expertmesh.models.norm import RMSNorm
from expertmesh.random import fill_normal_, fold
from expertmesh.routing import Router


def init_weights(model: nn.Module, seed: int, std: float) -> None:
    """Overwrite every parameter and buffer of a model.

    Linear and embedding weights are N(0, std), the output projections of residual branches
    included; norms are 1. Experts and routers draw by their own rule. Every module draws from
    ``fold(seed, its full name)``, so a value depends neither on the order of construction nor on
    the device.

    Args:
        model: On its final device.
        seed: Of the model.
        std: Standard deviation of dense weights.
    """
    for name, module in model.named_modules():
        key = fold(seed, name)
        if isinstance(module, nn.Linear | nn.Embedding):
            fill_normal_(module.weight, std, fold(key, "weight"))
        elif isinstance(module, RMSNorm):
            module.reset_parameters()
        elif isinstance(module, Experts | Router):
            module.reset_parameters(key)
