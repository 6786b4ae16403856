"""One training run against another of the same model, laid out over ranks in another way.

Ranks see parts of a batch, of tensors and of a model. Each rank notes what it saw as a
``RankView``; ``join`` makes the whole of them, refusing copies that are not bitwise equal; and
``errors`` gives the largest relative error of each kind against another ``Observation``.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, isnan

import torch
from torch import Tensor

from expertmesh.shards import Shard, shard_of
from expertmesh.testing.compare import relative_error

COLUMNS = (
    "output",
    "input gradients",
    "parameter gradients",
    "gradient norms",
    "losses",
    "parameters",
)
"""What is compared: the first three at the first step, the others over all steps."""


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a run of some optimizer steps showed, as whole tensors.

    Attributes:
        output_TV: The model's output at the first step, by token.
        input_gradient_TD: The gradient of the first step's input (embedded tokens), by token.
        gradients: Of every parameter at the first step, by name, before clipping.
        norm_S: Global norm of the gradient before clipping, by step.
        loss_S: The loss, by step.
        parameters: Parameters and buffers after the last step.
    """

    output_TV: Tensor
    input_gradient_TD: Tensor
    gradients: Mapping[str, Tensor]
    norm_S: Tensor
    loss_S: Tensor
    parameters: Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class RankView:
    """An ``Observation`` as one rank sees it.

    Attributes:
        outputs: Pairs of the tokens' indices in the step's batch ``(T,)`` and their rows
            ``(T, V)``; none where the rank has no output.
        input_gradients: Likewise, ``(T, D)``.
        gradients: This rank's pieces of the parameters' gradients.
        norms: By step.
        losses: By step.
        parameters: This rank's pieces of parameters and buffers.
    """

    outputs: Sequence[tuple[Tensor, Tensor]]
    input_gradients: Sequence[tuple[Tensor, Tensor]]
    gradients: Mapping[str, Shard]
    norms: Sequence[float]
    losses: Sequence[float]
    parameters: Mapping[str, Shard]


class Watch:
    """Remembers what a method returns, and its gradients, call by call, while it is a context.

    What activation checkpointing repeats is called more often; watch a method that it does not.

    Args:
        owner: Whose method, for example a module's ``forward``; None where this rank has no such.
        method: Its name; it returns a tensor.

    Attributes:
        outputs: By call.
        gradients: Of the loss with respect to the outputs, by call.
    """

    def __init__(self, owner: object | None, method: str) -> None:
        self.outputs: list[Tensor] = []
        self._owner = owner
        self._method = method
        self._gradients: dict[int, Tensor] = {}

    @property
    def gradients(self) -> list[Tensor]:
        return [gradient for _, gradient in sorted(self._gradients.items())]

    def __enter__(self) -> "Watch":
        if self._owner is not None:
            watched = getattr(self._owner, self._method)
            setattr(self._owner, self._method, lambda *a, **k: self._see(watched(*a, **k)))
        return self

    def __exit__(self, *exception: object) -> None:
        if self._owner is not None:
            delattr(self._owner, self._method)  # the class's own is behind it

    def _see(self, output: Tensor) -> Tensor:
        call = len(self.outputs)
        self.outputs.append(output.detach().clone())
        if output.requires_grad:
            output.register_hook(lambda gradient: self._gradients.update({call: gradient.clone()}))
        return output


def rows(index: Iterable[Tensor], values: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Pairs for ``RankView``: each call's tokens ``(B, S)`` beside their values ``(B, S, D)``."""
    pairs = zip(index, values, strict=True)
    return [(i.flatten(), value.reshape(i.numel(), value.shape[-1])) for i, value in pairs]


def pieces(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Shard]:
    """Of tensors by name, what this rank holds: copies of the values, and where they belong."""
    held = {}
    for name, tensor in tensors:
        shard = shard_of(tensor)
        held[name] = Shard(shard.local.clone(), shard.shape, shard.offset)
    return held


def assemble(views: Sequence[Mapping[str, Shard]]) -> dict[str, Tensor]:
    """Whole tensors out of the pieces of all ranks, which may hold different names.

    Args:
        views: ``pieces``, by rank.

    Raises:
        AssertionError: If two ranks hold the same element and differ by as much as a bit, or an
            element is held by none.
    """
    whole: dict[str, Tensor] = {}
    missing: dict[str, Tensor] = {}
    for rank, view in enumerate(views):
        for name, piece in view.items():
            if name not in whole:
                whole[name] = piece.local.new_zeros(piece.shape)
                missing[name] = torch.ones(piece.shape, dtype=torch.bool)
            ends = zip(piece.offset, piece.local.shape, strict=True)
            box = tuple(slice(begin, begin + size) for begin, size in ends)
            known = ~missing[name][box]
            if not torch.equal(whole[name][box][known], piece.local[known]):
                raise AssertionError(f"{name} on rank {rank} differs from the copy of another rank")
            whole[name][box] = piece.local
            missing[name][box] = False
    for name, mask in missing.items():
        if bool(mask.any()):
            raise AssertionError(
                f"{name}: no rank holds {int(mask.sum())} of {mask.numel()} elements"
            )
    return whole


def join(views: Sequence[RankView], num_tokens: int) -> Observation:
    """What all ranks saw together.

    Args:
        views: By rank.
        num_tokens: Tokens of the step's batch.

    Raises:
        AssertionError: If a token was seen by no rank or by several, or ranks that hold the same
            number or tensor differ by as much as a bit.
    """
    first = views[0]
    for rank, view in enumerate(views):
        if list(view.losses) != list(first.losses) or list(view.norms) != list(first.norms):
            raise AssertionError(f"rank {rank} has other losses or norms than rank 0")
    return Observation(
        output_TV=_by_token([pair for view in views for pair in view.outputs], num_tokens),
        input_gradient_TD=_by_token(
            [pair for view in views for pair in view.input_gradients], num_tokens
        ),
        gradients=assemble([view.gradients for view in views]),
        norm_S=torch.tensor(list(first.norms), dtype=torch.float64),
        loss_S=torch.tensor(list(first.losses), dtype=torch.float64),
        parameters=assemble([view.parameters for view in views]),
    )


def errors(actual: Observation, expected: Observation) -> dict[str, float]:
    """The largest relative error, by norm, of each kind of ``COLUMNS``; infinity for NaN.

    Raises:
        AssertionError: If one has parameters that the other lacks.
    """
    tensors = {
        "output": (actual.output_TV, expected.output_TV),
        "input gradients": (actual.input_gradient_TD, expected.input_gradient_TD),
        "gradient norms": (actual.norm_S, expected.norm_S),
        "losses": (actual.loss_S, expected.loss_S),
    }
    found = {kind: worst({kind: relative_error(*pair)}) for kind, pair in tensors.items()}
    found["parameter gradients"] = worst(by_name(actual.gradients, expected.gradients))
    found["parameters"] = worst(by_name(actual.parameters, expected.parameters))
    return {column: found[column] for column in COLUMNS}


def worst(error: Mapping[str, float]) -> float:
    """The largest of at least one, infinity where one is not a number."""
    return max(inf if isnan(value) else value for value in error.values())


def by_name(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative errors of tensors of the same names and shapes.

    Raises:
        AssertionError: If names or shapes differ, or there are none: nothing would be compared.
    """
    if not expected:
        raise AssertionError("there is no tensor to compare with")
    if actual.keys() != expected.keys():
        raise AssertionError(f"only one of them has {sorted(actual.keys() ^ expected.keys())}")
    for name, tensor in expected.items():
        if actual[name].shape != tensor.shape:
            raise AssertionError(
                f"{name}: shape {tuple(actual[name].shape)}, not {tuple(tensor.shape)}"
            )
    return {name: relative_error(actual[name], expected[name]) for name in expected}


def _by_token(pairs: Sequence[tuple[Tensor, Tensor]], num_tokens: int) -> Tensor:
    index_T = torch.cat([index for index, _ in pairs])
    if sorted(index_T.tolist()) != list(range(num_tokens)):
        counts_T = index_T.bincount(minlength=num_tokens).tolist()
        wrong = {token: count for token, count in enumerate(counts_T) if count != 1}
        raise AssertionError(f"tokens that not exactly one rank saw, and how many did: {wrong}")
    value_TX = torch.cat([values for _, values in pairs])
    return torch.empty_like(value_TX).index_copy_(0, index_T, value_TX)
