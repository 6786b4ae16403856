"""torch's wrappers round, or within, a model that lies on several ranks."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from expertmesh.errors import UserError
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.parallel.ddp import ddp
from expertmesh.parallel.fsdp import parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.shards import shard_of
from expertmesh.testing import run_on_ranks

SHAPE: dict[str, Any] = {
    "vocab_size": 11,
    "dim": 8,
    "num_layers": 2,
    "num_heads": 2,
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_hidden": 4,
}
Place = Callable[[nn.Module, Mesh], Any]
PLACERS: dict[str, Place] = {
    "ddp": ddp,
    "parallelize, ZeRO 0": lambda model, mesh: parallelize(model, mesh, zero=0),
    "parallelize, ZeRO 2": parallelize,
    "parallelize, ZeRO 3": lambda model, mesh: parallelize(model, mesh, zero=3),
}
TARGETS: dict[str, Callable[[Any], nn.Module]] = {
    "the model": lambda model: model,
    "a larger module": lambda model: nn.Sequential(nn.Linear(1, 1), model),
    "a larger module round a part": lambda model: nn.Sequential(model.blocks[1]),
    "a block": lambda model: model.blocks[0],
    "a layer": lambda model: model.blocks[0].moe,
    "experts": lambda model: model.blocks[0].moe.experts,
    "attention": lambda model: model.blocks[0].attention,
}
WRAPPERS: dict[str, Callable[[nn.Module], object]] = {
    "DDP": DistributedDataParallel,
    "FSDP": FullyShardedDataParallel,
    "fully_shard": lambda module: fully_shard(module, mesh=init_device_mesh("cpu", (2,))),
}


def build() -> DecoderLM:
    return DecoderLM(DecoderConfig(**SHAPE), seed=1)


def attempts(placer: str) -> list[tuple[str, str, str, bool]]:
    """What every wrapper round every target says, and whether each parameter is as it was."""
    seen, mesh = [], Mesh(ep=2)
    for target, part in TARGETS.items():
        for wrapper, wrap in WRAPPERS.items():
            model = build()
            PLACERS[placer](model, mesh)
            before = {name: shard_of(p).local.clone() for name, p in model.named_parameters()}
            try:
                wrap(part(model))
                message = "nothing"
            except UserError as error:
                message = str(error)
            same = all(
                torch.equal(before[name], shard_of(p).local) for name, p in model.named_parameters()
            )
            seen.append((target, wrapper, message, same))
    return seen


@pytest.mark.parametrize(
    "placer",
    [
        pytest.param(name, marks=[] if name in ("ddp", "parallelize, ZeRO 2") else pytest.mark.slow)
        for name in PLACERS
    ],
)
def test_wrappers_are_refused_on_every_rank_and_touch_nothing(placer: str) -> None:
    by = placer.partition(",")[0]
    for seen in run_on_ranks(2, attempts, placer):
        assert len(seen) == len(TARGETS) * len(WRAPPERS)
        for target, wrapper, message, same in seen:
            assert f"modules that expertmesh.{by} has laid out" in message, (target, wrapper)
            assert "expertmesh.ddp(model, mesh) or expertmesh.parallelize(model, mesh)" in message
            assert same, (target, wrapper)


def placed_twice() -> list[str]:
    messages = []
    for first in (ddp, parallelize):
        for second in (ddp, parallelize):
            model = build()
            first(model, Mesh(ep=2))
            for again in (model, nn.Sequential(model)):
                with pytest.raises(UserError) as caught:
                    second(again, Mesh(ep=2))
                messages.append(str(caught.value))
    return messages


def test_a_model_is_laid_out_once() -> None:
    for messages in run_on_ranks(2, placed_twice):
        assert len(messages) == 8
        assert "parallelize was given a model, and it has been laid out" in messages[2]
        assert "ddp was given a model, and its 0 has been laid out" in messages[1]


def by_ddp(model: DecoderLM) -> nn.Module:
    return nn.Sequential(DistributedDataParallel(model))


def by_fully_shard(model: DecoderLM) -> nn.Module:
    fully_shard(model.blocks[0], mesh=init_device_mesh("cpu", (2,)))
    return model


def by_dtensor(model: DecoderLM) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    model.norm.weight = nn.Parameter(distribute_tensor(model.norm.weight.detach(), mesh))
    return model


def laid_out_by_torch() -> list[str]:
    """What is said of models of which torch has laid out a part."""
    messages = []
    for wrap in (by_ddp, by_fully_shard, by_dtensor):
        for place in (ddp, parallelize):
            with pytest.raises(UserError) as caught:
                place(wrap(build()), Mesh(ep=2))
            messages.append(str(caught.value))
    return messages


def test_what_torch_has_laid_out_is_not_laid_out_again() -> None:
    expected = [
        "its 0 is within torch's DistributedDataParallel",
        "its blocks.0 is within torch's fully_shard",
        "whose norm.weight is a DTensor already",
    ]
    for messages in run_on_ranks(2, laid_out_by_torch, timeout=30):
        assert len(messages) == 2 * len(expected)
        for place, message in enumerate(messages):
            assert expected[place // 2] in message
            assert f"expertmesh.{('ddp', 'parallelize')[place % 2]} was given a model" in message


def what_still_works() -> tuple[list[bool], int]:
    """Walking, copying and pickling what ``ddp`` placed; torch's state dict; other modules."""
    model = build()
    names = [name for name, _ in model.named_modules()]
    wrapped = ddp(model, Mesh(ep=2))
    part = model.get_submodule("blocks.0.attention")
    walked = [[name for name, _ in model.named_modules()] == names]
    for twin in (copy.deepcopy(part), pickle.loads(pickle.dumps(part))):
        walked.append(len(list(twin.modules())) == len(list(part.modules())))
        walked.append(not {*twin.modules()} & {*part.modules()})
    wrapped(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    # Beside a placed model plain ones are free.
    plain = DistributedDataParallel(nn.Linear(2, 2))
    fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (2,)))
    plain(torch.ones(1, 2)).sum().backward()
    sharded = parallelize(build(), Mesh(ep=2), zero=2)
    return walked, len(get_model_state_dict(sharded))


def test_all_else_is_as_before() -> None:
    num_entries = len(build().state_dict())
    for walked, entries in run_on_ranks(2, what_still_works):
        assert walked == [True] * 5
        assert entries == num_entries
