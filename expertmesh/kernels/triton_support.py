"""What Triton can be used for here, asked without importing it."""

import importlib.util
import os

import torch

_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_refusal(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device; None if they can.

    On a CPU they run under Triton's interpreter alone, which is for tests.
    """
    if not _INSTALLED:
        return "triton is not installed; run: pip install 'expertmesh[gpu]'"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "Triton has no kernels for the CPU"
    if device.type != "cuda":
        return f"Triton has no kernels for {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "its kernels need compute capability 8.0"
    return None


def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before it ends (compute capability 9.0)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
