"""A pipeline's step equals that of one process: losses and every gradient."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from expertmesh.dispatch.collectives import Group, all_reduce, own_range
from expertmesh.errors import UserError
from expertmesh.layer import set_loss_scale
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.models.decoder import OutputLayer
from expertmesh.models.stages import Stages, keep_stages
from expertmesh.parallel.context import GatheredSlices
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.pipeline import Piece, Pipeline
from expertmesh.random import RandomKey
from expertmesh.testing import RankError, relative_error, run_on_ranks

SHAPE: dict[str, Any] = {
    "vocab_size": 31,
    "dim": 12,
    "num_layers": 5,
    "num_heads": 2,
    "dense_hidden": 20,
    "first_dense": 1,
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_hidden": 8,
    "router": "gshard",
    "router_options": {"balance_coef": 0.3, "z_coef": 0.1, "capacity": {"factor": 1.0}},
    "init_std": 0.3,
}
SEED, STEP = 5, 2


@dataclass(frozen=True)
class Case:
    """One step.

    Attributes:
        num_pieces: Micro-batches.
        per_rank: Stages of each rank.
        padded: Rows end in padding, each micro-batch's in another amount of it.
        checkpointed: Activations are recomputed.
        scale: The loss scale.
        layers: Blocks of each stage.
        zero: ZeRO stage.
        expert_zero: That of the experts; None is ``zero``.
    """

    num_pieces: int
    per_rank: int = 1
    padded: bool = True
    checkpointed: bool = False
    scale: float = 1.0
    layers: tuple[int, ...] | None = None
    zero: int = 2
    expert_zero: int | None = None

    def __str__(self) -> str:
        return f"{self.num_pieces}x{self.per_rank}-zero{self.zero}"


def batch(num_pieces: int, padded: bool, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, targets and padding mask of a step, ``(M, B, S)`` each."""
    generator = torch.Generator().manual_seed(num_pieces)
    tokens_MBS = torch.randint(31, (num_pieces, num_rows, 7), generator=generator)
    targets_MBS = torch.randint(31, (num_pieces, num_rows, 7), generator=generator)
    length_MB = torch.randint(1, 8, (num_pieces, num_rows), generator=generator)
    mask_MBS = torch.arange(7) >= length_MB.unsqueeze(-1)
    if not padded:
        mask_MBS = torch.zeros_like(mask_MBS)
    return tokens_MBS, targets_MBS.masked_fill(mask_MBS, -100), mask_MBS


def pieces_of(case: Case, num_rows: int = 2) -> list[Piece]:
    """The step's micro-batches."""
    tokens_MBS, targets_MBS, mask_MBS = batch(case.num_pieces, case.padded, num_rows)
    index_MBS = torch.arange(tokens_MBS.numel()).view_as(tokens_MBS)
    num_targets, num_tokens = int((targets_MBS >= 0).sum()), int((~mask_MBS).sum())
    return [
        Piece(
            tokens_BS,
            _loss(targets_BS, num_targets),
            share=int((~mask_BS).sum()) / num_tokens,
            arguments={
                "padding_mask": mask_BS if bool(mask_BS.any()) else None,
                "key": RandomKey.of(SEED, STEP, index_BS),
            },
        )
        for tokens_BS, targets_BS, mask_BS, index_BS in zip(
            tokens_MBS, targets_MBS, mask_MBS, index_MBS, strict=True
        )
    ]


def _loss(targets_BS: Tensor, num_targets: int) -> OutputLayer:
    def loss(hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
        logits = F.linear(hidden_BSD, weight_VD).flatten(0, 1)
        if torch.is_autocast_enabled("cpu"):
            assert logits.dtype == torch.bfloat16
        targets = targets_BS.flatten()
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(wide, targets, ignore_index=-100, reduction="sum") / num_targets

    return loss


def whole_step(model: DecoderLM, pieces: list[Piece], scale: float) -> Tensor:
    """What one process does."""
    losses = []
    for piece in pieces:
        set_loss_scale(model, piece.share * scale)
        loss = model(piece.tokens_BS, output=piece.loss, **piece.arguments)
        (loss * scale).backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def largest_errors(
    degrees: dict[str, Any], shape: dict[str, Any], cases: list[Case]
) -> dict[str, float]:
    """On a rank: relative errors of losses and of this rank's gradients, over all cases."""
    config, mesh = DecoderConfig(**shape), Mesh(**degrees)
    errors: dict[str, float] = {}

    def note(name: str, actual: Tensor, expected: Tensor) -> None:
        errors[name] = max(errors.get(name, 0.0), relative_error(actual, expected))

    for case in cases:
        whole = DecoderLM(config, seed=1).double()
        pieces = pieces_of(case)
        expected = whole_step(whole, pieces, case.scale)
        model, pipeline = pipelined(config, mesh, case)
        own = own_pieces(model, mesh, case)
        # Twice: buffers and plans are used again, gradients add up.
        for _ in range(2):
            loss = pipeline.step(own, scale=case.scale)
        note("loss", all_reduce(loss, mesh.everyone), expected)
        for name, parameter in model.named_parameters():
            actual, wanted = _whole(parameter.grad), whole.get_parameter(name).grad
            assert wanted is not None
            note(name, actual, 2 * wanted)
        whole.eval(), model.eval()
        # Of two shapes, which no training step would take; of the second, data ranks have none.
        own += own_pieces(model, mesh, case, num_rows=1)
        pieces += pieces_of(case, num_rows=1)
        with torch.no_grad():
            nats = [
                whole(piece.tokens_BS, output=piece.loss, **piece.arguments) for piece in pieces
            ]
        loss = torch.stack([pipeline.evaluate(piece) for piece in own]).sum()
        note("evaluation", all_reduce(loss, mesh.everyone), torch.stack(nats).sum())
    return errors


def pipelined(config: DecoderConfig, mesh: Mesh, case: Case) -> tuple[DecoderLM, Pipeline]:
    """This rank's stages, laid out over the rest of the mesh."""
    group = mesh.group("pp")
    stages = Stages.of(config, group.size, per_rank=case.per_rank, layers=case.layers)
    with torch.device("meta"):
        model = keep_stages(DecoderLM(config), stages, group.index).double()
    if case.checkpointed:
        model.checkpoint_blocks()
    parallelize(model, mesh, zero=case.zero, expert_zero=case.expert_zero)
    model.to_empty(device="cpu")
    model.init_weights(1)
    return model, Pipeline(model, stages, group)


def own_pieces(model: DecoderLM, mesh: Mesh, case: Case, num_rows: int = 2) -> list[Piece]:
    """A rank's rows, slice and part of every micro-batch."""
    data, context = mesh.group("dp"), mesh.group("cp")
    _, targets_MBS, _ = batch(case.num_pieces, case.padded, num_rows)
    num_targets = int((targets_MBS >= 0).sum())
    own = []
    for piece, targets_BS in zip(pieces_of(case, num_rows), targets_MBS, strict=True):
        mask_BS, key = piece.arguments["padding_mask"], piece.arguments["key"]
        slices = GatheredSlices(context, piece.tokens_BS.shape[1])
        rows = slice(*own_range(len(targets_BS), data))

        def part(x_BS: Tensor, rows: slice = rows, slices: GatheredSlices = slices) -> Tensor:
            return model.own_part(slices.own_part(x_BS[rows], 1), 1)

        arguments = {
            "padding_mask": None if mask_BS is None else slices.seen(mask_BS[rows]),
            "key": RandomKey(key.seed, part(key.token_index)),
            "cache": slices if context.size > 1 else None,
        }
        tokens_BS = slices.own_part(piece.tokens_BS[rows], 1)
        loss = _loss(part(targets_BS), num_targets)
        own.append(Piece(tokens_BS, loss, share=piece.share, arguments=arguments))
    return own


def _whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _world(degrees: dict[str, int]) -> int:
    return degrees["pp"] * max(1, *(degrees.get(axis, 1) for axis in ("dp", "cp", "tp")))


def check(degrees: dict[str, int], shape: dict[str, Any], cases: list[Case]) -> None:
    names: set[str] = set()
    for errors in run_on_ranks(_world(degrees), largest_errors, degrees, shape, cases, timeout=180):
        wrong = {name: error for name, error in errors.items() if not error < 1e-12}
        assert not wrong
        names |= errors.keys()
    with torch.device("meta"):
        model = DecoderLM(DecoderConfig(**shape))
    assert names == {name for name, _ in model.named_parameters()} | {"loss", "evaluation"}


def test_two_stages_equal_the_whole() -> None:
    cases = [
        Case(4),
        Case(1),
        Case(2, padded=False),
        Case(3, checkpointed=True, zero=3),
        Case(2, scale=8.0, zero=0, layers=(1, 4)),
    ]
    check({"pp": 2}, SHAPE, cases)


def test_interleaved_stages_equal_the_whole() -> None:
    cases = [
        Case(4, 2),
        Case(1, 2, zero=3),
        Case(3, 2, checkpointed=True, scale=8.0, zero=1, layers=(1, 1, 2, 1)),
    ]
    check({"pp": 2}, SHAPE, cases)


def test_four_stages_equal_the_whole() -> None:
    check({"pp": 4}, {**SHAPE, "position": "learned"}, [Case(6), Case(2, checkpointed=True)])


@pytest.mark.parametrize(
    ("degrees", "case"),
    [
        ({"dp": 2}, Case(3, zero=0)),
        pytest.param({"dp": 2}, Case(4, 2, zero=1), marks=pytest.mark.slow),
        ({"dp": 2, "ep": 2}, Case(4, zero=1, checkpointed=True)),
        pytest.param({"dp": 2, "ep": 2}, Case(4, 2, zero=2, expert_zero=1), marks=pytest.mark.slow),
        pytest.param({"dp": 2, "etp": 2}, Case(3, zero=3, expert_zero=0), marks=pytest.mark.slow),
        ({"tp": 2, "ep": 2}, Case(2, 2, zero=2)),
        ({"cp": 2}, Case(3, 2, zero=3, checkpointed=True)),
        ({"dp": 2, "ep": 2}, Case(3, layers=(1, 4))),  # a stage without experts
    ],
    ids=str,
)
def test_stages_of_two_ranks_equal_the_whole(degrees: dict[str, int], case: Case) -> None:
    check({"pp": 2, **degrees}, SHAPE, [case])


def autocast() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def autocast_errors() -> float:
    """On a rank of two: the largest relative error of a gradient in bfloat16 products."""
    config, mesh, case = DecoderConfig(**SHAPE), Mesh(pp=2), Case(2)
    stages = Stages.of(config, 2)
    whole, model = DecoderLM(config, seed=1), DecoderLM(config, seed=1)
    for piece in pieces_of(case):
        set_loss_scale(whole, piece.share)
        with autocast():
            loss = whole(piece.tokens_BS, output=piece.loss, **piece.arguments)
        loss.backward()
    keep_stages(model, stages, mesh.group("pp").index)
    Pipeline(model, stages, mesh.group("pp"), autocast=autocast).step(pieces_of(case))
    return max(
        relative_error(_whole(parameter.grad), _whole(whole.get_parameter(name).grad))
        for name, parameter in model.named_parameters()
    )


def test_autocast_holds_in_every_stage() -> None:
    assert max(run_on_ranks(2, autocast_errors)) < 1e-6


def bytes_sent() -> dict[str, int]:
    """On a rank of three: what it sent in one step of four micro-batches."""
    mesh = Mesh(pp=3)
    _, pipeline = pipelined(DecoderConfig(**SHAPE), mesh, Case(4))
    pipeline.step(pieces_of(Case(4)))
    return dict(mesh.group("pp").traffic.bytes_sent)


def test_bytes_between_stages_are_counted() -> None:
    activations = 4 * (2 * 7) * SHAPE["dim"] * 8
    first, middle, last = run_on_ranks(3, bytes_sent)
    assert first == {"p2p": activations}
    assert middle == {"p2p": activations, "p2p backward": activations}
    assert last == {"p2p backward": activations}


def other_dtype() -> None:
    mesh = Mesh(pp=2)
    model, _ = pipelined(DecoderConfig(**SHAPE), mesh, Case(2))
    stages = Stages.of(DecoderConfig(**SHAPE), 2)
    Pipeline(model, stages, mesh.group("pp"), dtype=torch.float32).step(pieces_of(Case(2)))


def test_activations_of_another_dtype_are_refused() -> None:
    with pytest.raises(RankError) as caught:
        run_on_ranks(2, other_dtype, timeout=30)
    last_line = caught.value.tracebacks[0].rstrip().splitlines()[-1]
    assert last_line.startswith("expertmesh.errors.UserError: stage 0 gives activations")
    assert last_line.endswith("set Pipeline's dtype = torch.float64")


def test_micro_batches_that_cannot_flow_are_refused() -> None:
    config = DecoderConfig(**SHAPE)
    stages = Stages.of(config, 2, per_rank=2)
    with torch.device("meta"):
        model = keep_stages(DecoderLM(config), stages, 0)
    pipeline = Pipeline(model, stages, Group((0, 1), 0, None))
    tokens_BS = torch.zeros(2, 7, dtype=torch.int64)
    piece, smaller = (Piece(tokens, F.linear) for tokens in (tokens_BS, tokens_BS[:1]))
    with pytest.raises(UserError, match=r"one shape, got \[\(1, 7\), \(2, 7\)\]"):
        pipeline.step([piece, smaller])
    with pytest.raises(UserError, match="at least one"):
        pipeline.step([])
    with pytest.raises(UserError, match="got 5, which 2 rounds"):
        pipeline.step([piece] * 5)
    with pytest.raises(UserError, match=r"cut for \(2\), got a group of 1"):
        Pipeline(model, stages, Group.alone())
