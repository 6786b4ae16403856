"""A model and its optimizer as named tensors, and back, with every difference named."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from expertmesh.errors import UserError
from expertmesh.parallel.checkpoint import Entry

# A list of names in a message stops here; the rest is counted.
_MOST_NAMES = 6


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; a tied tensor under its first name only."""
    return {name: tensor.detach() for tensor, name in _names(model).items()}


def check_model(
    own: Mapping[str, Tensor],
    saved: Mapping[str, Entry],
    source: str,
    *,
    elsewhere: Collection[str] = (),
) -> None:
    """Compare what a model holds with what was saved.

    Args:
        own: As ``model_tensors`` gives them, on this rank.
        saved: What there is on disk.
        source: Where that is, for the message.
        elsewhere: Names that other ranks hold.

    Raises:
        UserError: Naming tensors that are missing, unexpected, or of another shape or dtype.
    """
    faults = _faults(own, saved, elsewhere)
    if other := [
        f"{name} (expected {own[name].dtype}, got {saved[name].dtype})"
        for name in own
        if name in saved and own[name].dtype != saved[name].dtype
    ]:
        faults.append(f"of another dtype: {_listed(other)}")
    _raise_if(faults, f"{source} was saved from another model")


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as ``"parameter/state"``, for example ``"head.weight/exp_avg"``."""
    names = _names(model)
    return {
        f"{names[param]}/{key}": value
        for param, state in optimizer.state.items()
        for key, value in state.items()
    }


def empty_optimizer_tensors(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: Mapping[str, Entry],
    source: str,
    *,
    elsewhere: Collection[str] = (),
) -> dict[str, Tensor]:
    """Tensors to load an optimizer's state into, cut over ranks as its parameters are.

    Args:
        model: Names the parameters.
        optimizer: Over the model's parameters, or some of them.
        saved: What there is on disk, named as by ``optimizer_tensors``.
        source: Where that is, for the message.
        elsewhere: Names of the parameters of the optimizers of other ranks.

    Returns:
        Uninitialised tensors by name: what has a parameter's shape is placed as the parameter is,
        scalars are plain. None for parameters without saved state: those had no gradient yet.

    Raises:
        UserError: Naming saved state that has no parameter, or one of another shape.
    """
    params = optimized(model, optimizer)
    states: dict[str, list[str]] = {}
    for entry in saved:
        name, _, key = entry.rpartition("/")
        states.setdefault(name, []).append(key)
    shaped = {
        name: _stands_for(params.get(name), [saved[f"{name}/{key}"] for key in keys])
        for name, keys in states.items()
    }
    known = {name: param for name, param in params.items() if name in states}
    faults = _faults(known, shaped, elsewhere)
    _raise_if(faults, f"{source} holds the optimizer state of another model")
    return {
        f"{name}/{key}": _empty(param, saved[f"{name}/{key}"])
        for name, param in known.items()
        for key in states[name]
    }


def _stands_for(param: Tensor | None, entries: list[Entry]) -> Entry:
    """One entry of a parameter's state: one whose shape does not fit, or one of its own shape.

    A parameter's state has its shape, or is a scalar, or a mean of each of its rows or columns.
    """
    if param is None:
        return entries[0]
    shape = tuple(param.shape)
    fitting = ((), shape, shape[:-1], (*shape[:-2], *shape[-1:]))
    others = [entry for entry in entries if entry.shape not in fitting]
    return others[0] if others else replace(entries[0], shape=shape)


def set_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Give an optimizer the state that ``optimizer_tensors`` would take from it.

    Args:
        model: Names the parameters.
        optimizer: Takes the tensors, uncopied where they are on its parameters' devices.
        tensors: The state of its parameters; one without any begins anew.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for entry, tensor in tensors.items():
        name, _, key = entry.rpartition("/")
        state.setdefault(name, {})[key] = tensor
    whole: dict[str, Any] = optimizer.state_dict()
    names = optimized(model, optimizer)
    whole["state"] = {index: state[name] for index, name in enumerate(names) if name in state}
    optimizer.load_state_dict(whole)


def optimized(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's parameters by name, in its order."""
    names = _names(model)
    return {names[p]: p for group in optimizer.param_groups for p in group["params"]}


def _names(model: nn.Module) -> dict[Tensor, str]:
    """First names of parameters and persistent buffers.

    Not ``named_parameters``: asking for the state is what makes FSDP2 put its shards back, which
    are the parameters that an optimizer knows.
    """
    names: dict[Tensor, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, name)
    return names


def _empty(param: Tensor, entry: Entry) -> Tensor:
    if entry.shape == tuple(param.shape):
        return torch.empty_like(param, dtype=entry.dtype, requires_grad=False)
    return torch.empty(entry.shape, dtype=entry.dtype)


def _faults(
    own: Mapping[str, Tensor], saved: Mapping[str, Entry], elsewhere: Collection[str]
) -> list[str]:
    """How names and shapes differ, a line for each kind."""
    faults = []
    if missing := [name for name in own if name not in saved]:
        faults.append(f"missing: {_listed(missing)}")
    if unexpected := [name for name in saved if name not in own and name not in elsewhere]:
        faults.append(f"unexpected: {_listed(unexpected)}")
    if misshapen := [
        f"{name} (expected {tuple(own[name].shape)}, got {saved[name].shape})"
        for name in own
        if name in saved and tuple(own[name].shape) != saved[name].shape
    ]:
        faults.append(f"misshapen: {_listed(misshapen)}")
    return faults


def _raise_if(faults: list[str], summary: str) -> None:
    if faults:
        raise UserError(
            f"{summary}; " + "; ".join(faults) + "; set [model] as it was for that run, "
            "or run.dir to a new folder"
        )


def _listed(names: list[str]) -> str:
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
