"""``torch.compile`` of the model, or a clear word on why it cannot be had here."""

import os
import shutil
import sys
from collections.abc import Callable
from typing import Any

import torch

from expertmesh.errors import UserError

_DEFAULT_COMPILERS = {"darwin": "clang++", "win32": "cl"}


def compile_model(model: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The compiled model; code is made at its first call.

    Args:
        model: A module, or one of its methods.
        device: Where it runs; on a CPU torch writes C++, which needs a compiler.

    Raises:
        UserError: If there is no compiler.
    """
    name = os.environ.get("CXX", _DEFAULT_COMPILERS.get(sys.platform, "g++"))
    if device.type == "cpu" and shutil.which(name) is None:
        raise UserError(
            f"train.compile needs a C++ compiler on a CPU, and {name!r} is not found; install it, "
            "set CXX to the one that you have, or set train.compile = false"
        )
    compiled: Callable[..., Any] = torch.compile(model)
    return compiled
