"""What the formulas say is what ranks send and keep."""

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from expertmesh.kernels.cross_entropy import linear_cross_entropy
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.models.stages import Stages, keep_stages
from expertmesh.parallel.context import GatheredSlices
from expertmesh.parallel.cost import Work, activations, in_flight, memory, traffic
from expertmesh.parallel.fake import FakeRank, Stored, fake_ranks
from expertmesh.parallel.fsdp import gradient_sync, parallelize
from expertmesh.parallel.grid import Grid
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.pipeline import Piece, Pipeline
from expertmesh.shards import shard_of
from expertmesh.testing import run_on_ranks
from expertmesh.train.optimizer import OptimConfig, build_optimizer

SEQ_LEN, ROWS = 8, 4
SHAPE: dict[str, Any] = {
    "vocab_size": 30,
    "dim": 16,
    "num_layers": 4,
    "num_heads": 4,
    "num_kv_heads": 2,
    "dense_hidden": 24,
    "first_dense": 1,
    "num_experts": 4,
    # All of them: whatever is chosen, a token goes to every rank.
    "experts_per_token": 4,
    "expert_hidden": 8,
    "num_shared_experts": 1,
    "router_options": {"balance_coef": 0.0},
}


@dataclass(frozen=True)
class Case:
    """A mesh of four ranks and a step over it."""

    degrees: dict[str, int]
    zero: int = 2
    expert_zero: int = 2
    num_micro_batches: int = 2
    per_rank: int = 1
    recompute: bool = False
    rounded: bool = False
    optimizer: Literal["adamw", "adafactor"] = "adamw"
    shape: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        degrees = "-".join(f"{axis}{degree}" for axis, degree in self.degrees.items())
        rounded = "-rounded" if self.rounded else ""
        return f"{degrees}-zero{self.zero}{self.expert_zero}{rounded}-{self.optimizer}"

    @property
    def config(self) -> DecoderConfig:
        return DecoderConfig(**(SHAPE | self.shape))

    @property
    def grid(self) -> Grid:
        degrees: dict[str, Any] = dict(self.degrees)
        return Grid.infer(4, **degrees)

    @property
    def stages(self) -> Stages:
        return Stages.of(self.config, self.grid.degrees["pp"], per_rank=self.per_rank)

    @property
    def work(self) -> Work:
        degrees = self.grid.degrees
        return Work(
            config=self.config,
            degrees=degrees,
            per_rank=self.per_rank,
            zero=self.zero,
            expert_zero=self.expert_zero,
            rows=ROWS // degrees["dp"],
            seq_len=SEQ_LEN,
            num_micro_batches=self.num_micro_batches,
            narrow=2 if self.rounded else 4,
            recompute=self.recompute,
            optimizer=self.optimizer,
        )

    def ranks(self) -> list[FakeRank]:
        return fake_ranks(
            self.config, self.grid, self.stages, zero=self.zero, expert_zero=self.expert_zero
        )


class Sent(TorchDispatchMode):
    """Counts what collectives send, by the tensors that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.num_bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kind, num_bytes = _sent(function.name(), args)
        if num_bytes:
            self.num_bytes[kind] += num_bytes
        return function(*args, **(kwargs or {}))


def _sent(name: str, args: tuple[Any, ...]) -> tuple[str, int]:
    """Kind and bytes of a call; single numbers of torch's own are left out."""
    match name.removeprefix("c10d::"), args:
        case "_allgather_base_", (out, own, *_):
            return "all-gather", out.nbytes - own.nbytes
        case "_reduce_scatter_base_", (own, whole, *_):
            return "reduce-scatter", whole.nbytes - own.nbytes
        case "allreduce_", ([x], group, *_):
            size = dist.ProcessGroup.unbox(group).size()
            return "all-reduce", 2 * (size - 1) * x.nbytes // size
        case "alltoall_base_", (_, x, group, _, [*sent], *_) if sent:
            leaving = sum(sent) - sent[dist.ProcessGroup.unbox(group).rank()]
            return "all-to-all", leaving * x[:1].nbytes
        case "alltoall_base_", (_, x, *_):
            return "counts", x.nbytes - x[:1].nbytes
        case "send", ([x], *_) if x.numel() > 1:
            return "send", x.nbytes
    return "", 0


def _sum(hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
    return F.linear(hidden_BSD, weight_VD).sum()


def sent_in_a_step(case: Case) -> dict[str, int]:
    """On a rank: bytes by collective."""
    degrees: dict[str, Any] = dict(case.degrees)
    mesh = Mesh(**degrees)
    model = DecoderLM(case.config)
    if mesh.degree("pp") > 1:
        keep_stages(model, case.stages, mesh.coordinates["pp"])
    if case.recompute:
        model.checkpoint_blocks()
    narrow = torch.bfloat16 if case.rounded else None
    parallelize(model, mesh, zero=case.zero, expert_zero=case.expert_zero, narrow=narrow)
    slices = GatheredSlices(mesh.group("cp"), SEQ_LEN)
    torch.manual_seed(mesh.rank)
    tokens_BS = slices.own_part(torch.randint(30, (case.work.rows, SEQ_LEN)), 1)
    piece = Piece(tokens_BS, _sum, arguments={"cache": slices})
    with Sent() as sent:
        if mesh.degree("pp") > 1:
            pipeline = Pipeline(model, case.stages, mesh.group("pp"))
            pipeline.step([piece] * case.num_micro_batches)
        else:
            for place in range(case.num_micro_batches):
                gradient_sync(model, last=place == case.num_micro_batches - 1)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=case.rounded):
                    logits_BSV = model(tokens_BS, cache=slices)
                logits_BSV.sum().backward()
    return dict(sent.num_bytes)


@pytest.mark.parametrize(
    "case",
    [
        Case({"dp": 4}, zero=0, expert_zero=1),
        Case({"dp": 4}, zero=1, expert_zero=0),
        Case({"ep": 4}, zero=2),
        Case({"ep": 2, "etp": 2}, zero=3),
        Case({"ep": 2}, zero=2, expert_zero=3, recompute=True),
        Case({"ep": 4}, zero=2, rounded=True),
        Case({"ep": 2}, zero=2, expert_zero=1, rounded=True),
        Case({"dp": 4}, zero=1, expert_zero=0, rounded=True),
        Case({"ep": 2}, zero=1, expert_zero=3, rounded=True),
        Case({"ep": 2, "etp": 2}, zero=3, rounded=True, shape={"expert_form": "scaled_input"}),
        Case({"tp": 2, "ep": 4}, zero=2, shape={"qk_norm": "full"}),
        Case({"tp": 2, "ep": 4}, zero=2, rounded=True),
        Case({"cp": 2, "ep": 4}, zero=3),
        Case({"pp": 2, "ep": 2}, zero=2, num_micro_batches=3),
        Case({"pp": 2, "edp": 2}, zero=3, expert_zero=1, num_micro_batches=3),
        Case({"pp": 2, "ep": 2}, zero=1, num_micro_batches=4, per_rank=2),
    ],
    ids=str,
)
def test_ranks_send_what_the_formula_says(case: Case) -> None:
    sent = run_on_ranks(4, sent_in_a_step, case, timeout=180)
    for stage, rank in enumerate(case.ranks()):
        actual = sent[int(case.grid.dense[stage].flat[0])]
        expected = {kind: size for kind, size in traffic(rank, case.work).items() if size}
        assert actual == expected


def test_all_to_all_of_chosen_experts_is_as_expected() -> None:
    chosen = {"num_experts": 16, "experts_per_token": 3, "dim": 64}
    case = Case({"ep": 4}, shape=chosen)
    assert case.work.rows_per_token == pytest.approx(4 * (1 - 12 * 11 * 10 / (16 * 15 * 14)))
    sent = [by_kind["all-to-all"] for by_kind in run_on_ranks(4, sent_in_a_step, case, timeout=180)]
    expected = traffic(case.ranks()[0], case.work)["all-to-all"]
    assert sum(sent) / 4 == pytest.approx(expected, rel=0.1)


def held_in_a_step(case: Case) -> tuple[int, int, dict[str, int]]:
    """On a rank: bytes of parameters, of the optimizer's moments, and what its step sends."""
    degrees: dict[str, Any] = dict(case.degrees)
    mesh = Mesh(**degrees)
    model = DecoderLM(case.config)
    if mesh.degree("pp") > 1:
        keep_stages(model, case.stages, mesh.coordinates["pp"])
    parallelize(model, mesh, zero=case.zero, expert_zero=case.expert_zero)
    optimizer = build_optimizer(model, OptimConfig(name=case.optimizer), mesh)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with Sent() as sent:
        optimizer.step()
    moments = [
        value
        for state in optimizer.state.values()
        for name, value in state.items()
        if name != "step"
    ]
    parameters, states = (
        sum(shard_of(tensor).local.nbytes for tensor in tensors)
        for tensors in (model.parameters(), moments)
    )
    return parameters, states, dict(sent.num_bytes)


@pytest.mark.parametrize(
    "case",
    [
        Case({"ep": 2}, zero=0),
        Case({"ep": 2}),
        Case({"ep": 2}, zero=0, optimizer="adafactor"),
        Case({"ep": 4}, optimizer="adafactor"),
        Case({"pp": 2, "ep": 2}, zero=1, optimizer="adafactor"),
    ],
    ids=str,
)
def test_ranks_hold_what_the_formula_says(case: Case) -> None:
    parameters, states, sent = run_on_ranks(4, held_in_a_step, case)[0]
    rank = case.ranks()[0]
    needed = memory(rank, case.work)
    assert (needed["parameters"], needed["optimizer"]) == (parameters, states)
    others = traffic(rank, replace(case.work, optimizer="adamw"))
    extra = traffic(rank, case.work)["all-reduce"] - others["all-reduce"]
    assert sent.get("all-reduce", 0) == extra
    assert (extra > 0) == (case.optimizer == "adafactor")


def _rank(place: int, *parameters: Stored) -> FakeRank:
    return FakeRank({"pp": place}, parameters, (0, 1, 2))


def test_what_is_together_for_a_while() -> None:
    parameters = (
        Stored("embedding.weight", False, held=10, ranks=4, copied=False, shape=(2, 5)),
        Stored("blocks.0.a", False, held=5, ranks=4, copied=False, shape=(5,)),
        Stored("blocks.0.moe.experts.up", True, 100, 2, False, (4, 5, 10)),
        Stored("blocks.1.a", False, held=7, ranks=4, copied=False, shape=(7,)),
    )
    base = Case({"ep": 2}).work
    for zero, expert_zero, gathered, gradients in (
        (1, 1, 30 + 15 + 100 + 21, 40 + 20 + 200 + 28),
        (2, 2, 30 + 15 + 100 + 21, 10 + 5 + 100 + 7 + (20 + 200)),
        (3, 3, 115 + 30, 10 + 5 + 100 + 7 + (20 + 200)),
        (3, 1, 100 + 30 + 21, 10 + 5 + 200 + 7 + 40),
    ):
        work = replace(base, zero=zero, expert_zero=expert_zero)
        needed = memory(_rank(0, *parameters), work)
        assert (needed["gathered"], needed["gradients"]) == (gathered, gradients)
        assert (needed["parameters"], needed["optimizer"]) == (122, 244)
        needed = memory(_rank(0, *parameters), replace(work, optimizer="adafactor"))
        assert needed["optimizer"] == 4 * (2 + 5) + 5 + 4 * 4 * (5 + 10) + 7
    # Experts with copies elsewhere are gathered as narrow numbers, and not rounded again.
    for expert_zero, gathered in ((1, 66 + 100), (3, 66 + 100)):
        work = replace(base, zero=1, expert_zero=expert_zero, narrow=2)
        needed = memory(_rank(0, *parameters), work)
        assert (needed["gathered"], needed["rounded"]) == (gathered, (40 + 20 + 28) // 2)
    whole = replace(parameters[3], held=28, copied=True)
    needed = memory(_rank(0, whole), replace(base, zero=0))
    assert (needed["gathered"], needed["gradients"]) == (0, 28)


def passes_in_flight(case: Case) -> int:
    """On a rank: the most forward passes that wait for their backward pass."""
    stages = case.stages
    mesh = Mesh(pp=case.degrees["pp"])
    model = keep_stages(DecoderLM(case.config), stages, mesh.coordinates["pp"])
    waiting, most = 0, 0

    def changed(by: int) -> None:
        nonlocal waiting, most
        waiting += by
        most = max(most, waiting)

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        y: Tensor = part(*args, **kwargs)
        changed(1)
        y.register_hook(lambda _: changed(-1))
        return y

    part, model.part = model.part, watched  # type: ignore[method-assign]  # to look on
    piece = Piece(torch.zeros(1, SEQ_LEN, dtype=torch.int64), _sum)
    Pipeline(model, stages, mesh.group("pp")).step([piece] * case.num_micro_batches)
    return most


@pytest.mark.parametrize(
    ("pp", "per_rank", "num_micro_batches"),
    # Fewer micro-batches than ranks, one for each or more, and rounds that are longer than that.
    [(2, 1, 6), (4, 1, 3), (2, 2, 1), (2, 2, 6), (2, 2, 3)],
)
def test_as_many_passes_wait_as_the_formula_says(
    pp: int, per_rank: int, num_micro_batches: int
) -> None:
    case = Case({"pp": pp}, per_rank=per_rank, num_micro_batches=num_micro_batches)
    actual = run_on_ranks(pp, passes_in_flight, case)
    work = replace(case.work, degrees={**case.work.degrees, "pp": pp, "dp": 1})
    assert actual == [in_flight(_rank(place), work) for place in range(pp)]


def _loss_of(targets_BS: Tensor, hidden_BSD: Tensor, weight_VD: Tensor) -> Tensor:
    return linear_cross_entropy(hidden_BSD, weight_VD, targets_BS)


def kept_bytes(config: DecoderConfig, rows: int, rounded: bool) -> int:
    """What autograd keeps of one forward pass in one process, parameters aside."""
    model = DecoderLM(config)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # else another tensor might take an address again

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    tokens_BS = torch.randint(config.vocab_size, (rows, 32))
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=rounded),
    ):
        model(tokens_BS, output=partial(_loss_of, tokens_BS))
    return sum(kept.values())


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qk_norm": "head"},
        {"num_experts": 8, "experts_per_token": 2},
        {"num_shared_experts": 0, "first_dense": 0, "moe_every": 2},
        {"mlp": "doubly_gated", "extra_mlp": True, "first_dense": 0, "moe_every": 2},
    ],
    ids=str,
)
def test_autograd_keeps_what_the_formula_says(changes: dict[str, Any], rounded: bool) -> None:
    wide = {"dim": 64, "dense_hidden": 160, "expert_hidden": 48, "vocab_size": 100}
    config = DecoderConfig(**(SHAPE | wide | changes))
    # Of two sizes, so that what does not grow with the tokens is left out.
    actual = kept_bytes(config, 32, rounded) - kept_bytes(config, 16, rounded)
    work = Work(
        config=config,
        degrees=Grid.infer(1).degrees,
        rows=16,
        seq_len=32,
        narrow=2 if rounded else 4,
    )
    rank = FakeRank({"pp": 0}, (), tuple(range(config.num_layers)))
    logits = 16 * 32 * config.vocab_size * (4 + work.narrow)  # not kept, but there for a while
    assert activations(rank, work) - logits == pytest.approx(actual, rel=0.1)


def test_recomputed_blocks_keep_their_input_and_one_of_them_the_rest() -> None:
    config = DecoderConfig(**SHAPE)
    work = Work(config=config, degrees=Grid.infer(1).degrees, rows=2, seq_len=8)
    first, both = (FakeRank({"pp": 0}, (), blocks) for blocks in ((1,), (1, 2)))
    block_input = 2 * 8 * config.dim * 4
    again = replace(work, recompute=True)
    assert activations(first, again) == activations(first, work) + block_input
    assert activations(both, again) == activations(first, work) + 2 * block_input
