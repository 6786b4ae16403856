"""What Triton can be used for here, asked without importing it."""

import functools
import importlib.util
import os
from collections.abc import Callable
from importlib import metadata
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

_Rest = ParamSpec("_Rest")
_Result = TypeVar("_Result")

_OLDEST = (3, 6)


def _installed() -> str | None:
    """Triton's version, "" if it does not say; None if there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    for package in ("triton", "pytorch-triton"):  # the latter comes with torch's nightly builds
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return ""


TRITON_VERSION = _installed()
"""Read once: what is traced by ``torch.compile`` asks for it."""


def triton_refusal(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device; None if they can.

    On a CPU they run under Triton's interpreter alone, which is for tests.
    """
    asked = (device, TRITON_VERSION, torch.version.hip)
    return known_refusal(*asked) if _remembered(device) else _refusal(*asked)


def _refusal(device: torch.device, version: str | None, hip: str | None) -> str | None:
    if version is None:
        return "triton is not installed; run: pip install 'expertmesh[gpu]'"
    if version and tuple(int(part) for part in version.split(".")[:2]) < _OLDEST:
        return (
            f"its kernels need Triton {_OLDEST[0]}.{_OLDEST[1]}, installed is {version}; "
            "run: pip install 'expertmesh[gpu]'"
        )
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "Triton has no kernels for the CPU"
    if device.type != "cuda":
        return f"Triton has no kernels for {device.type}"
    if hip is not None:
        return "its kernels are for NVIDIA's GPUs, this torch is built for AMD's"
    major, minor = _capability(device)
    if major < 8:
        return f"its kernels need compute capability 8.0, this device has {major}.{minor}"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU."""
    return known_capability(device) if _remembered(device) else _capability(device)


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


known_refusal, known_capability = functools.cache(_refusal), functools.cache(_capability)
"""What is asked before every launch on a GPU."""


def _remembered(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.compiler.is_compiling()


def has_dependent_launch(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before it ends (compute capability 9.0)."""
    return device.type == "cuda" and capability(device) >= (9, 0)


def on_its_device(
    run: Callable[Concatenate[Tensor, _Rest], _Result],
) -> Callable[Concatenate[Tensor, _Rest], _Result]:
    """A function that launches kernels, with its first argument's device as the current one.

    Triton launches on torch's current device, wherever the tensors lie: of a model whose layers
    are spread over the GPUs of one process, that is one GPU's.
    """

    @functools.wraps(run)
    def there(first: Tensor, *rest: _Rest.args, **options: _Rest.kwargs) -> _Result:
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return run(first, *rest, **options)
        with torch.cuda.device_of(first):
            return run(first, *rest, **options)

    return there
