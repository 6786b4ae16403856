"""A model and its optimizer as named tensors, and back, with every difference named."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from expertmesh.errors import UserError

# A list of names in a message stops here; the rest is counted.
_MOST_NAMES = 6


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied tensor under its first name only."""
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def load_model_tensors(model: nn.Module, saved: Mapping[str, Tensor], source: str) -> None:
    """Copy saved tensors into a model, all of them or none.

    Args:
        model: Receives the values, in place.
        saved: As ``model_tensors`` gave them.
        source: Where they came from, for the message.

    Raises:
        UserError: Naming tensors that are missing, unexpected, or of another shape or dtype.
    """
    own = model_tensors(model)
    _check_same(own, saved, source, "was saved from another model")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(saved[name])


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``"parameter/state"``, for example ``"head.weight/exp_avg"``."""
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    return {
        f"{names[param]}/{key}": value
        for param, state in optimizer.state.items()
        for key, value in state.items()
    }


def load_optimizer_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Tensor],
    source: str,
) -> None:
    """Give an optimizer the state that ``optimizer_tensors`` took from its like.

    Args:
        model: Names the parameters.
        optimizer: Receives the state, on its parameters' devices.
        saved: As ``optimizer_tensors`` gave it; the optimizer takes the tensors, uncopied.
        source: Where it came from, for the message.

    Raises:
        UserError: Naming parameters without saved state, and saved state without a parameter.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for entry, tensor in saved.items():
        name, _, key = entry.rpartition("/")
        state.setdefault(name, {})[key] = tensor
    names = {param: name for name, param in model.named_parameters()}
    own = {names[p]: p for group in optimizer.param_groups for p in group["params"]}
    moments = {name: entries.get("exp_avg", torch.empty(0)) for name, entries in state.items()}
    _check_same(own, moments, source, "holds the optimizer state of another model", dtypes=False)

    whole: dict[str, Any] = optimizer.state_dict()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    whole["state"] = {index: state[names[param]] for index, param in enumerate(order)}
    optimizer.load_state_dict(whole)


def _check_same(
    own: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
    source: str,
    summary: str,
    *,
    dtypes: bool = True,
) -> None:
    """Raise unless both hold the same names with the same shapes and, if asked, dtypes."""
    faults = []
    if missing := [name for name in own if name not in saved]:
        faults.append(f"missing: {_listed(missing)}")
    if unexpected := [name for name in saved if name not in own]:
        faults.append(f"unexpected: {_listed(unexpected)}")
    both = [name for name in own if name in saved]
    if misshapen := [
        f"{name} (expected {_shape(own[name])}, got {_shape(saved[name])})"
        for name in both
        if own[name].shape != saved[name].shape
    ]:
        faults.append(f"misshapen: {_listed(misshapen)}")
    if dtypes and (
        other := [
            f"{name} (expected {own[name].dtype}, got {saved[name].dtype})"
            for name in both
            if own[name].dtype != saved[name].dtype
        ]
    ):
        faults.append(f"of another dtype: {_listed(other)}")
    if faults:
        raise UserError(
            f"{source} {summary}; " + "; ".join(faults) + "; set [model] as it was for that run, "
            "or run.dir to a new folder"
        )


def _listed(names: list[str]) -> str:
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
