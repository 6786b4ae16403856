"""What ``parallelize`` stores where, and that no number depends on it."""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from expertmesh.errors import UserError
from expertmesh.layer import MoE
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.models.stages import Stages, keep_stages
from expertmesh.parallel import fsdp
from expertmesh.parallel.fsdp import gradient_sync, parallelize
from expertmesh.parallel.mesh import Mesh
from expertmesh.random import RandomKey
from expertmesh.shards import is_sharded, shard_of
from expertmesh.testing import assert_close, run_on_ranks
from expertmesh.testing.equivalence import assemble
from tests.parallel.user_model import (
    DIM,
    Passed,
    UserModel,
    gradient_pieces,
    moe_of,
    own_tokens,
    passes,
    tokens,
)


def assert_same(views: Sequence[Passed], expected: Passed, tol: float = 1e-12) -> None:
    """Ranks got, together, what one process got; tokens lie on ranks in order."""
    for place, output in enumerate(expected.outputs):
        assert_close("output", torch.cat([v.outputs[place] for v in views]), output, tol)
    gradients = assemble([view.gradients for view in views])
    whole = assemble([expected.gradients])
    assert gradients.keys() == whole.keys()
    for name, gradient in whole.items():
        assert_close(name, gradients[name], gradient, tol)


# Each stage of the experts with two stages of the rest.
STAGES = [(0, 0), (0, 3), (1, 1), (1, 2), (2, 1), (2, 2), (3, 0), (3, 3)]


def in_all_stages(degrees: dict[str, Any], stages: list[tuple[int, int]]) -> list[Passed]:
    mesh = Mesh(**degrees)
    return [
        passes(parallelize(UserModel(), mesh, zero=zero, expert_zero=expert_zero), mesh)
        for zero, expert_zero in stages
    ]


@pytest.mark.parametrize(
    ("degrees", "stages"),
    [
        ({"ep": 2, "placement": "outside"}, STAGES),
        ({"edp": 4}, [(3, 0), (0, 3), (1, 2)]),
        ({"ep": 4}, [(2, 2), (0, 1), (3, 3)]),
    ],
    ids=str,
)
def test_every_pair_of_stages_gives_the_gradients_of_one_process(
    degrees: dict[str, Any], stages: list[tuple[int, int]]
) -> None:
    expected = passes(UserModel(), Mesh())
    by_rank = run_on_ranks(4, in_all_stages, degrees, stages)
    for views in zip(*by_rank, strict=True):
        assert_same(views, expected)


def test_slices_of_experts_beside_experts_that_cannot_be_sliced_are_refused() -> None:
    for message in run_on_ranks(2, refusal, {"etp": 2}, {}):
        assert "ModuleExperts cannot be cut into hidden slices, got etp=2; set etp=1" in message


def sliced(degrees: dict[str, Any]) -> list[Passed]:
    mesh = Mesh(**degrees)
    kinds = ("gated",)
    return [passes(parallelize(UserModel(kinds), mesh, zero=zero), mesh) for zero in (0, 1, 3)]


@pytest.mark.parametrize("degrees", [{"ep": 2, "etp": 2}, {"etp": 2, "edp": 2}], ids=str)
def test_slices_of_experts_give_the_gradients_of_one_process(degrees: dict[str, Any]) -> None:
    expected = passes(UserModel(("gated",)), Mesh())
    for views in zip(*run_on_ranks(4, sliced, degrees), strict=True):
        assert_same(views, expected)


class Collectives(TorchDispatchMode):
    """Counts collectives on gradients and parameters: those in the model's dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = function.name()
        kinds = {
            "_reduce_scatter_base_": "sums",
            "allreduce_": "sums",
            "_allgather_base_": "gathers",
        }
        kind = kinds.get(name.removeprefix("c10d::"))
        if kind is not None:
            self.count[kind] += 1
        return function(*args, **(kwargs or {}))


def collectives(zero: int) -> list[tuple[int, int, int]]:
    """Gathers in forward and in backward, and sums, by micro-batch of a dense model."""
    model = parallelize(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)), Mesh(), zero=zero)
    found = []
    for last in (False, False, True):
        gradient_sync(model, last=last)
        with Collectives() as seen:
            y = model(torch.ones(2, 8))
            forward = seen.count["gathers"]
            y.sum().backward()
        found.append((forward, seen.count["gathers"] - forward, seen.count["sums"]))
    return found


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        (1, [(1, 0, 0), (0, 0, 0), (0, 0, 1)]),
        (2, [(1, 0, 1), (0, 0, 1), (0, 0, 1)]),
    ],
)
def test_stages_1_and_2_gather_once_in_a_step_and_1_sums_once(
    zero: int, expected: list[tuple[int, int, int]]
) -> None:
    assert run_on_ranks(2, collectives, zero) == [expected] * 2


def test_stage_0_sums_once_in_a_step_and_3_gathers_and_sums_in_every_micro_batch() -> None:
    (copies, _), (pieces, _) = run_on_ranks(2, collectives, 0), run_on_ranks(2, collectives, 3)
    assert [sums > 0 for _, _, sums in copies] == [False, False, True]
    # FSDP itself keeps a root whole from forward to backward.
    assert [(gathers > 0, sums) for gathers, _, sums in pieces] == [(True, 1)] * 3


def stored(zero: int, expert_zero: int) -> dict[str, list[float]]:
    """The part of every parameter that is here before a pass, after forward, and after the step."""
    mesh = Mesh(ep=2)
    model = parallelize(UserModel(("gated",)), mesh, zero=zero, expert_zero=expert_zero)
    parts: dict[str, list[float]] = {}

    def note() -> None:
        for name, param in model.named_parameters():
            parts.setdefault(name, []).append(shard_of(param).local.numel() / param.numel())

    note()
    own = own_tokens(mesh, 8)
    y_TD = model(tokens(8, 0)[own], RandomKey.of(0, 1, torch.arange(8)[own]))
    note()
    y_TD.sum().backward()
    note()
    return parts


@pytest.mark.parametrize(
    ("zero", "expert_zero", "dense", "expert"),
    [
        (0, 0, [1, 1, 1], [1 / 2] * 3),
        (2, 3, [1 / 4, 1, 1 / 4], [1 / 4] * 3),
        (3, 1, [1 / 4] * 3, [1 / 4, 1 / 2, 1 / 4]),
    ],
)
def test_what_a_rank_holds_is_what_the_stage_says(
    zero: int, expert_zero: int, dense: list[float], expert: list[float]
) -> None:
    for parts in run_on_ranks(4, stored, zero, expert_zero):
        assert parts["blocks.0.dense.weight"] == dense
        assert parts["blocks.0.moe.experts.down"] == expert


def bare_layers() -> list[str]:
    """Messages of warnings when a layer, or a row of layers, is all there is."""
    mesh = Mesh(ep=2)
    models: list[nn.Module] = [moe_of(), nn.Sequential(moe_of(), moe_of()), moe_of()]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model in models:
            parallelize(model, mesh)
            x_TD = tokens(6, 0)[own_tokens(mesh, 6)].requires_grad_()
            y_BSD = model(x_TD.view(1, 3, DIM))
            y_BSD += 1  # in place, on what would be a view
            y_BSD.square().sum().backward()
            assert all(is_sharded(p.grad) for p in model.parameters() if p.grad is not None)
    return [str(warning.message) for warning in caught]


def test_a_bare_layer_is_a_model_and_warns_of_nothing() -> None:
    assert run_on_ranks(2, bare_layers) == [[], []]


def in_place(on_mesh: bool) -> Passed:
    """The output is changed in place, as a residual connection may do it."""
    mesh = Mesh(ep=2) if on_mesh else Mesh()
    moe = moe_of()
    if on_mesh:
        parallelize(moe, mesh, zero=3)
    x_TD = tokens(6, 0)[own_tokens(mesh, 6)]
    y_BSD = moe(x_TD.view(1, -1, DIM))
    y_BSD += x_TD
    y_BSD.square().sum().backward()
    return Passed([y_BSD.detach()[0]], gradient_pieces(moe), y_BSD.sum())


def test_an_output_may_be_changed_in_place() -> None:
    assert_same(run_on_ranks(2, in_place, True), in_place(False))


def values_of_ranks_seeded_differently() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight after laying out, and a buffer."""
    mesh = Mesh(ep=2)
    torch.manual_seed(mesh.rank)
    linear, norm = nn.Linear(DIM, DIM), nn.BatchNorm1d(DIM)
    norm.running_mean = torch.full((DIM,), float(mesh.rank))
    parallelize(nn.Sequential(linear, norm), mesh)
    assert isinstance(linear.weight, DTensor)
    return linear.weight.full_tensor().detach(), norm.running_mean


def test_ranks_that_were_seeded_differently_get_the_values_of_the_first() -> None:
    torch.manual_seed(0)
    expected = nn.Linear(DIM, DIM).weight.detach()
    for weight, buffer in run_on_ranks(4, values_of_ranks_seeded_differently):
        assert torch.equal(weight, expected)
        assert buffer.tolist() == [0.0] * DIM


def refusal(degrees: dict[str, Any], options: dict[str, Any]) -> str:
    mesh = Mesh(**degrees)
    with pytest.raises(UserError) as caught:
        parallelize(UserModel(), mesh, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"zero": 4}, "zero must be one of 0, 1, 2, 3, got 4; set zero = 2"),
        ({"zero": True}, "zero must be one of 0, 1, 2, 3, got True; set zero = 2"),
        ({"expert_zero": -1}, "expert_zero must be one of 0, 1, 2, 3, got -1"),
        ({"dispatch": "smoke"}, "dispatch must be one of all_to_all, static, got 'smoke'"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any], message: str) -> None:
    assert message in refusal({}, options)


def test_one_process_is_left_as_it_is() -> None:
    model = UserModel()
    names = [(name, type(param)) for name, param in model.named_parameters()]
    assert parallelize(model, Mesh(), zero=3) is model
    assert [(name, type(param)) for name, param in model.named_parameters()] == names
    assert not isinstance(model, FSDPModule)
    gradient_sync(model, last=True)


def widths_that_do_not_divide() -> str:
    """Copies of experts on three ranks, in pieces: neither E, F nor D divides."""
    mesh = Mesh(ep=2, ranks=[0, 1, 2, 3, 4, 5])
    moe: MoE = moe_of()
    with pytest.raises(UserError) as caught:
        parallelize(moe, mesh)
    return str(caught.value)


def test_pieces_that_cannot_be_equal_are_refused() -> None:
    for message in run_on_ranks(6, widths_that_do_not_divide):
        assert "cannot be cut into 3 equal pieces" in message


DECODER: dict[str, Any] = {
    "vocab_size": 11,
    "dim": 8,
    "num_layers": 1,
    "num_heads": 2,
    "num_experts": 4,
    "experts_per_token": 2,
    "expert_hidden": 3,
}


def not_cut() -> list[str]:
    """What is said of models of which every rank of a pipeline has the whole, or another cut."""
    mesh, config = Mesh(pp=2), DecoderConfig(**{**DECODER, "num_layers": 3})
    thirds = keep_stages(DecoderLM(config), Stages.of(config, 3), mesh.coordinates["pp"])
    messages = []
    for model in (UserModel(), DecoderLM(config), thirds):
        with pytest.raises(UserError) as caught:
            parallelize(model, mesh)
        messages.append(str(caught.value))
    return messages


def test_a_pipeline_needs_a_model_that_was_cut_for_it() -> None:
    for of_user, whole, thirds in run_on_ranks(2, not_cut, timeout=30):
        assert "pp must be 1 for models other than" in of_user
        assert "got pp=2 and a UserModel" in of_user
        assert "got one that was cut for 1; call expertmesh.models.stages.keep_stages" in whole
        assert "got one that was cut for 3" in thirds


def left_by_refusals() -> list[str]:
    """What can be done with a model after a call that was refused: it is done with a right one."""
    mesh = Mesh(tp=2)
    model = DecoderLM(DecoderConfig(**DECODER), seed=1)
    messages = []
    for wrong, dispatch in ((Mesh(tp=2, ep=2), "smoke"), (Mesh(tp=2, etp=2), "all_to_all")):
        with pytest.raises(UserError) as caught:
            parallelize(model, wrong, dispatch=dispatch)
        messages.append(str(caught.value))
    assert not any(is_sharded(param) for param in model.parameters())
    parallelize(model, mesh)
    return messages


def test_a_refused_model_is_as_it_was() -> None:
    dispatch, width = run_on_ranks(2, left_by_refusals, timeout=30)[0]
    assert "dispatch must be one of" in dispatch
    assert "etp must divide the hidden width" in width


def half_laid_out() -> str:
    """A second call for a model whose storage could not be cut."""
    moe = moe_of()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp, "_shard_storage", _no_memory)
        with pytest.raises(MemoryError):
            parallelize(moe, Mesh(ep=2))
    with pytest.raises(UserError) as caught:
        parallelize(moe, Mesh())
    return str(caught.value)


def _no_memory(*_: Any) -> None:
    raise MemoryError


def test_a_model_that_is_half_laid_out_is_not_laid_out_again() -> None:
    for message in run_on_ranks(2, half_laid_out, timeout=30):
        assert "build the model anew" in message
