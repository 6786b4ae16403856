"""Optimizers that hold what a model was before it was laid out over ranks.

Laying out puts new parameters in the place of old ones. An optimizer made before would go on to
change the old ones, which nothing reads any more, and the model would not train.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from expertmesh.errors import UserError

# By the old parameter, which is not kept alive: the function of this package that replaced it.
_replaced_by = WeakIdKeyDictionary()
# How often parameters had been replaced when an optimizer was last looked at.
_seen: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
_times = 0


@contextmanager
def replacing(model: nn.Module, call: str) -> Iterator[None]:
    """Let an optimizer that holds parameters replaced inside raise at its next step.

    Args:
        model: Laid out inside.
        call: The function of this package that does it.
    """
    before = WeakIdKeyDictionary(dict.fromkeys(model.parameters()))
    yield
    for param in model.parameters():
        before.pop(param, None)
    if len(before) > 0:
        _remember(before, call)


def _remember(params: WeakIdKeyDictionary, call: str) -> None:
    """Those that somebody still holds; where nobody does, as is usual, steps cost nothing."""
    global _times
    if _times == 0:
        register_optimizer_step_pre_hook(_check)
    _times += 1
    for param in params:
        _replaced_by[param] = call


def _check(optimizer: Optimizer, *_: object) -> None:
    if torch.compiler.is_compiling() or _seen.get(optimizer) == _times:
        return
    held: list[Tensor] = [param for group in optimizer.param_groups for param in group["params"]]
    old = [_replaced_by[param] for param in held if param in _replaced_by]
    if old:
        raise UserError(
            f"{len(old)} of the {len(held)} parameters that {type(optimizer).__name__} was given "
            f"are no longer the model's: expertmesh.{old[0]} has put this rank's parts in their "
            "place, which a step would leave as they are; make the optimizer after that call, of "
            "the parameters that the model has then"
        )
    _seen[optimizer] = _times
