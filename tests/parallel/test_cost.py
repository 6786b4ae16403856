"""What the formulas say is what ranks send and keep."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.models.stages import Stages, keep_stages
from expertmesh.parallel.context import GatheredSlices
from expertmesh.parallel.cost import Work, traffic
from expertmesh.parallel.fake import FakeRank, fake_ranks
from expertmesh.parallel.fsdp import gradient_sync, parallelize
from expertmesh.parallel.grid import Grid
from expertmesh.parallel.mesh import Mesh
from expertmesh.parallel.pipeline import Piece, Pipeline
from expertmesh.testing import run_on_ranks

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
    shape: dict[str, Any] = field(default_factory=dict)

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
            recompute=self.recompute,
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
        name = function.name().removeprefix("c10d::")
        if name in self._sizes:
            kind, num_bytes = self._sizes[name](*args)
            self.num_bytes[kind] += num_bytes
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _all_gather(out: Tensor, own: Tensor, *_: Any) -> tuple[str, int]:
        return "all-gather", out.nbytes - own.nbytes

    @staticmethod
    def _reduce_scatter(own: Tensor, whole: Tensor, *_: Any) -> tuple[str, int]:
        return "reduce-scatter", whole.nbytes - own.nbytes

    @staticmethod
    def _all_reduce(tensors: list[Tensor], group: Any, *_: Any) -> tuple[str, int]:
        size = dist.ProcessGroup.unbox(group).size()
        return "all-reduce", 2 * (size - 1) * tensors[0].nbytes // size

    @staticmethod
    def _all_to_all(
        _: Tensor, x: Tensor, group: Any, received: list[int], sent: list[int], *__: Any
    ) -> tuple[str, int]:
        if not sent:  # row counts
            return "counts", x.nbytes
        leaving = sum(sent) - sent[dist.ProcessGroup.unbox(group).rank()]
        return "all-to-all", leaving * x[:1].nbytes if len(x) else 0

    @staticmethod
    def _send(tensors: list[Tensor], *_: Any) -> tuple[str, int]:
        # torch's pipeline agrees on its mode by one integer.
        return ("send", tensors[0].nbytes) if tensors[0].is_floating_point() else ("counts", 0)

    _sizes = {
        "_allgather_base_": _all_gather,
        "_reduce_scatter_base_": _reduce_scatter,
        "allreduce_": _all_reduce,
        "alltoall_base_": _all_to_all,
        "send": _send,
    }


def sent_in_a_step(case: Case) -> dict[str, int]:
    """On a rank: bytes by collective."""
    degrees: dict[str, Any] = dict(case.degrees)
    mesh = Mesh(**degrees)
    model = DecoderLM(case.config)
    if mesh.degree("pp") > 1:
        keep_stages(model, case.stages, mesh.coordinates["pp"])
    if case.recompute:
        model.checkpoint_blocks()
    parallelize(model, mesh, zero=case.zero, expert_zero=case.expert_zero)
    slices = GatheredSlices(mesh.group("cp"), SEQ_LEN)
    tokens_BS = torch.randint(30, (case.work.rows, SEQ_LEN))
    tokens_BS = slices.own_part(tokens_BS, 1)
    piece = Piece(tokens_BS, torch.sum, arguments={"cache": slices})
    with Sent() as sent:
        if mesh.degree("pp") > 1:
            pipeline = Pipeline(model, case.stages, mesh.group("pp"))
            pipeline.step([piece] * case.num_micro_batches)
        else:
            for place in range(case.num_micro_batches):
                gradient_sync(model, last=place == case.num_micro_batches - 1)
                model(tokens_BS, cache=slices).sum().backward()
    return dict(sent.num_bytes)


@pytest.mark.parametrize(
    "case",
    [
        Case({"dp": 4}, zero=0, expert_zero=1),
        Case({"dp": 4}, zero=1, expert_zero=0),
        Case({"ep": 4}, zero=2),
        Case({"ep": 2, "etp": 2}, zero=3),
        Case({"ep": 2}, zero=2, expert_zero=3, recompute=True),
        Case({"tp": 2, "ep": 4}, zero=2, shape={"qk_norm": "full"}),
        Case({"cp": 2, "ep": 4}, zero=3),
        Case({"pp": 2, "ep": 2}, zero=2, num_micro_batches=3),
        Case({"pp": 2, "edp": 2}, zero=3, expert_zero=1, num_micro_batches=3),
        Case({"pp": 2, "ep": 2}, zero=1, num_micro_batches=4, per_rank=2),
    ],
    ids=str,
)
def test_ranks_send_what_the_formula_says(case: Case) -> None:
    sent = run_on_ranks(4, sent_in_a_step, case)
    for stage, rank in enumerate(case.ranks()):
        actual = sent[int(case.grid.dense[stage].flat[0])]
        expected = {kind: size for kind, size in traffic(rank, case.work).items() if size}
        actual.pop("counts", None)
        assert actual == expected
