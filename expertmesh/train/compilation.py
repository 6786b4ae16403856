"""``torch.compile`` of the model, or a clear word on why it cannot be had here."""

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from expertmesh.errors import UserError
from expertmesh.models.decoder import DecoderLM, OutputLayer

_DEFAULT_COMPILERS = {"darwin": "clang++", "win32": "cl"}


def compiled_forward(model: DecoderLM, device: torch.device) -> Callable[..., Tensor]:
    """The model with its blocks compiled; code is made at the first call.

    The loss is outside: see ``linear_cross_entropy``.

    Args:
        model: Stays as it is.
        device: Where it runs; on a CPU torch writes C++, which needs a compiler.

    Returns:
        Takes the tokens, ``output`` and what else ``DecoderLM.hidden`` takes.

    Raises:
        UserError: If there is no compiler.
    """
    name = os.environ.get("CXX", _DEFAULT_COMPILERS.get(sys.platform, "g++"))
    if device.type == "cpu" and shutil.which(name) is None:
        raise UserError(
            f"train.compile needs a C++ compiler on a CPU, and {name!r} is not found; install it, "
            "set CXX to the one that you have, or set train.compile = false"
        )
    hidden: Callable[..., Tensor] = torch.compile(model.hidden)

    def forward(tokens_BS: Tensor, *, output: OutputLayer, **arguments: Any) -> Tensor:
        return model.logits(hidden(tokens_BS, **arguments), output)

    return forward
