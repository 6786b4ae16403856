"""A decoder whose sequences are cut over ranks, against the whole model on each rank."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from expertmesh import RandomKey
from expertmesh.dispatch.collectives import all_reduce
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.parallel.context import GatheredSlices
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.tensor import shard_attention

VOCABULARY = 31


@dataclass(frozen=True)
class Case:
    """One forward and backward pass of two sequences."""

    seq_len: int
    padded: bool = False
    checkpointed: bool = False


@dataclass(frozen=True)
class Pass:
    """What came of it: of all positions, or of a rank's own."""

    logits: Tensor
    embedded_grad: Tensor
    grads: dict[str, Tensor]


def largest_errors(
    degrees: dict[str, Any], shape: dict[str, Any], cases: list[Case], noisy: bool = False
) -> dict[str, float]:
    """On a rank: how far a sliced model is from the whole one, relative to the whole's norm.

    Args:
        degrees: Of the mesh.
        shape: Of the model.
        cases: Passes to make.
        noisy: Train, with random numbers that follow the tokens.

    Returns:
        The largest errors of logits, of the embedding's output's gradient, and of each parameter's
        gradient summed over ranks.
    """
    mesh = Mesh(**degrees)
    errors: dict[str, float] = {}
    for case in cases:
        whole, sliced = (DecoderLM(DecoderConfig(**shape), seed=1).double() for _ in range(2))
        shard_attention(sliced, mesh)
        for model in (whole, sliced):
            model.train(noisy)
            if case.checkpointed:
                model.checkpoint_blocks()
        slices = GatheredSlices(mesh.group("cp"), case.seq_len)
        expected = _run(whole, GatheredSlices(mesh.group("pp"), case.seq_len), case, noisy)
        actual = _run(sliced, slices, case, noisy)

        def own(x: Tensor, slices: GatheredSlices = slices, model: DecoderLM = sliced) -> Tensor:
            return model.own_part(slices.own_part(x, 1), 1)

        found = {
            "logits": _error(actual.logits, own(expected.logits), expected.logits),
            "embedded": _error(
                actual.embedded_grad, own(expected.embedded_grad), expected.embedded_grad
            ),
            **_gradient_errors(actual.grads, expected.grads, mesh),
        }
        for name, error in found.items():
            errors[name] = max(error, errors.get(name, 0.0))
    return errors


def _run(model: DecoderLM, slices: GatheredSlices, case: Case, noisy: bool) -> Pass:
    generator = torch.Generator().manual_seed(case.seq_len)
    batch = (2, case.seq_len)
    tokens = torch.randint(VOCABULARY, batch, generator=generator)
    weight = torch.randn(*batch, VOCABULARY, generator=generator, dtype=torch.float64)
    mask = _padding(case) if case.padded else None

    def own(x: Tensor) -> Tensor:
        return model.own_part(slices.own_part(x, 1), 1)

    embedded: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    index = own(torch.arange(2 * case.seq_len).view(batch))
    with model.embedding.register_forward_hook(keep):
        logits = model(
            slices.own_part(tokens, 1),
            padding_mask=slices.seen(mask),
            key=RandomKey.of(0, 1, index) if noisy else None,
            cache=slices,
        )
    (logits * own(weight)).sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing, f"no gradient: {missing}"
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert embedded[0].grad is not None
    return Pass(logits.detach(), embedded[0].grad, grads)


def _padding(case: Case) -> Tensor:
    """The first sequence is padded on the left, the second on the right."""
    mask = torch.zeros(2, case.seq_len, dtype=torch.bool)
    mask[0, : case.seq_len // 3] = True
    mask[1, (case.seq_len + 1) // 2 :] = True
    return mask


def _gradient_errors(
    actual: dict[str, Tensor], expected: dict[str, Tensor], mesh: Mesh
) -> dict[str, float]:
    assert list(actual) == list(expected)
    # A gradient may be exactly zero in theory: all are compared to the norm of all.
    scale = torch.stack([grad.norm() for grad in expected.values()])
    errors = {}
    for name, grad in actual.items():
        if isinstance(grad, DTensor):
            summed = all_reduce(grad.full_tensor(), mesh.group(("dp", "cp")))
        else:
            summed = all_reduce(grad, mesh.group(("dp", "cp", "tp")))
        errors[name] = _error(summed, expected[name], scale)
    return errors


def _error(actual: Tensor, expected: Tensor, scale: Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual - expected).norm() / scale.norm()).item()
