"""Errors where torch's own wrappers are put round, or into, a model that lies on many ranks.

Such a wrapper would copy one rank's parts to all others, average what is summed already, or fail in
terms of its own. The modules of a placed model therefore look who asks: wrappers walk over a
model's modules, and read what is noted of other wrappers, before they touch a parameter.
"""

import sys
from collections import OrderedDict
from collections.abc import Iterator
from types import CodeType, FrameType
from typing import Any

from torch import nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from expertmesh.errors import UserError
from expertmesh.shards import is_sharded

_WALK = "named_modules"


def check_free(model: nn.Module, call: str) -> None:
    """Refuse a model of which some part has been laid out before, by this package or by torch.

    Args:
        model: Any module.
        call: Who asks, for the message.

    Raises:
        UserError: Naming the part.
    """
    for name, module in model.named_modules():
        part = f"its {name}" if name else "it"
        if _WALK in vars(module):
            raise UserError(
                f"expertmesh.{call} was given a model, and {part} has been laid out over ranks "
                "before; build the model anew, or leave the second call out"
            )
        wrapper = _wrapper_of(module)
        if wrapper is not None:
            raise UserError(
                f"expertmesh.{call} was given a model, and {part} is within torch's {wrapper}, "
                f"which brings gradients together too; leave {wrapper} out and give the plain "
                f"model to expertmesh.{call}"
            )
    for name, param in model.named_parameters():
        if is_sharded(param):
            raise UserError(
                f"expertmesh.{call} was given a model whose {name} is a DTensor already; give it "
                "the model as it was built, of plain tensors"
            )


def _wrapper_of(module: nn.Module) -> str | None:
    if isinstance(module, DistributedDataParallel | FullyShardedDataParallel):
        return type(module).__name__
    return "fully_shard" if isinstance(module, FSDPModule) else None


def refuse_wrappers(model: nn.Module, placed_by: str) -> None:
    """Make DDP and FSDP, put round any part of a model or round it, a ``UserError``.

    Args:
        model: Laid out over ranks; every module in it is told.
        placed_by: The function of this package that did it.
    """
    for module in list(model.modules()):
        setattr(module, _WALK, _Walk(module, placed_by))
        for key in (STATE_KEY, REGISTRY_KEY):
            module.__dict__[key] = _Notes(module.__dict__.get(key, {}), placed_by)


class _Walk:
    """Stands for a module's ``named_modules``."""

    def __init__(self, module: nn.Module, placed_by: str) -> None:
        self._module = module
        self._placed_by = placed_by

    def __call__(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        for wrapper in (DistributedDataParallel, FullyShardedDataParallel):
            if _within(wrapper.__init__.__code__):
                raise _refusal(wrapper.__name__, self._placed_by)
        return type(self._module).named_modules(self._module, *args, **kwargs)


class _Notes(OrderedDict[Any, Any]):
    """Stands for what torch notes of a module's composable wrappers, by function or its name."""

    def __init__(self, items: Any, placed_by: str) -> None:
        super().__init__(items)
        self._placed_by = placed_by

    def __contains__(self, wrapper: object) -> bool:
        name = getattr(wrapper, "__name__", wrapper)
        # One piece of code is the outside of all composable wrappers.
        if name in ("fully_shard", "replicate") and _within(fully_shard.__code__):
            raise _refusal("fully_shard or replicate", self._placed_by)
        return super().__contains__(wrapper)

    def __reduce__(self) -> Any:
        return type(self), (dict(self), self._placed_by)


def _within(code: CodeType) -> bool:
    """Whether a function is being run by this thread."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None


def _refusal(wrapper: str, placed_by: str) -> UserError:
    return UserError(
        f"{wrapper} was put round modules that expertmesh.{placed_by} has laid out over ranks, and "
        "would overwrite or average what differs between them; leave it out: give the whole model "
        "to expertmesh.ddp(model, mesh) or expertmesh.parallelize(model, mesh), which take care of "
        "all parameters"
    )
