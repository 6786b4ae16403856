"""Every router by what surrounds it: padding, meshes, dispatch, capacity, compiling, recompute.

The table of docs/routing.md is made of ``MATRIX``, and the tests here are what it says.
"""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from expertmesh.experts import GatedMLPExperts
from expertmesh.layer import MoE, moe_layers
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.random import RandomKey
from expertmesh.routing.registry import FAMILIES
from expertmesh.soft_moe import SoftMoE
from expertmesh.testing import run_on_ranks
from expertmesh.testing.equivalence import assemble, by_name
from tests.routing.matrix import COMPILES, MATRIX, REFUSALS, Row, table
from tests.routing.registered import (
    LENGTH,
    NAMES,
    WRAPPED,
    Trained,
    batch,
    decoder,
    shape,
    trained,
    trained_on,
)

PAGE = (Path(__file__).parents[2] / "docs" / "routing.md").read_text(encoding="utf-8")
ALL = (*NAMES, *WRAPPED)
SAMPLE = ("gshard", "expert_choice", "base", "sinkhorn", "hash")
MESHES = {"ep": {"ep": 2}, "cp": {"cp": 2, "ep": 2}, "tp": {"tp": 2, "ep": 2}}
pytestmark = pytest.mark.filterwarnings("ignore::expertmesh.errors.CausalityWarning")

every_router = pytest.mark.parametrize("name", ALL)


def test_the_page_has_the_table() -> None:
    assert table() in PAGE
    assert MATRIX.keys() == {*ALL, "SoftMoE"}


def check_mesh(column: str, names: tuple[str, ...]) -> None:
    """Two ranks train what one process trains, or refuse it with the field to set."""
    ranks = run_on_ranks(2, trained_on, MESHES[column], names, timeout=300)
    for name in names:
        views = [rank[name] for rank in ranks]
        if getattr(MATRIX[name], column) == "no":
            assert all(REFUSALS[column] in view for view in views), (name, views)
            continue
        assert not any(isinstance(view, str) for view in views), (name, views)
        expected = trained(decoder(name))
        assert all(view.losses == pytest.approx(expected.losses, abs=1e-11) for view in views)
        assert all(view.norms == pytest.approx(expected.norms, rel=1e-10) for view in views)
        errors = by_name(whole(views), whole([expected]))
        assert max(errors.values()) < 1e-10, (name, errors)


def whole(views: list[Trained]) -> dict[str, Tensor]:
    return assemble([view.parameters for view in views])


def test_a_sample_on_a_mesh() -> None:
    check_mesh("tp", SAMPLE)


@pytest.mark.slow
@pytest.mark.parametrize("column", MESHES)
def test_every_router_on_meshes(column: str) -> None:
    check_mesh(column, ALL)


@pytest.mark.slow
def test_static_dispatch_serves_those_with_a_bound_and_refuses_the_others() -> None:
    ranks = run_on_ranks(2, trained_on, {"ep": 2}, ALL, "static", timeout=300)
    for name in ALL:
        views = [rank[name] for rank in ranks]
        if MATRIX[name].static == "no":
            assert all(REFUSALS["static"] in view for view in views), (name, views)
        else:
            expected = trained(decoder(name))
            assert max(by_name(whole(views), whole([expected])).values()) < 1e-10, name


@every_router
def test_what_stands_in_padding_does_not_matter(name: str) -> None:
    losses, gradients = [], []
    for filling in (0, 7):
        model, given = decoder(name), batch(1, filling=filling)
        key = RandomKey.of(0, 1, torch.arange(given.tokens_BS.numel()).view_as(given.tokens_BS))
        logits = model(given.tokens_BS, padding_mask=given.padding_mask_BS, key=key)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), given.targets_BS.flatten())
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        for moe in moe_layers(model).values():
            served = moe.metrics()["load"].value.sum()
            assert served <= 25 * moe.router.num_experts
    assert torch.equal(*losses)
    for one, other in zip(*gradients, strict=True):
        # A word that stands in padding only has a gradient of zero.
        assert torch.equal(one, other)
        assert one.isfinite().all()


@every_router
def test_recompute_gives_the_same_gradients(name: str) -> None:
    gradients = []
    for saving in (False, True):
        model, given = decoder(name), batch(1)
        if saving:
            model.checkpoint_blocks()
        torch.manual_seed(0)
        logits = model(given.tokens_BS, padding_mask=given.padding_mask_BS)
        logits.square().mean().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", NAMES)
def test_a_capacity_is_taken_or_refused_by_name(name: str) -> None:
    options = {"capacity": {"factor": 0.5, "eval_factor": 0.5}}
    if MATRIX[name].capacity != "any":
        with pytest.raises(ValueError, match=f"router option 'capacity' of '{name}' is unknown"):
            DecoderConfig(**shape(name, **options))
        return
    model = DecoderLM(DecoderConfig(**shape(name, **options)))
    given = batch(1, padded=False)
    model(given.tokens_BS)
    layers = moe_layers(model).values()
    assert sum(int(moe.metrics()["dropped"].value.sum()) for moe in layers) > 0
    model.eval()
    model(given.tokens_BS)
    assert sum(int(moe.metrics()["dropped"].value.sum()) for moe in layers) > 0
    if shape(name)["router_options"].get("capacity") is None:
        free = DecoderLM(DecoderConfig(**shape(name, capacity=None)))
        free(given.tokens_BS)
        for moe in moe_layers(free).values():
            assert int(moe.metrics()["dropped"].value.sum()) == 0


def layer(name: str) -> nn.Module:
    experts = GatedMLPExperts(16, 8, 8, init_std=0.5, seed=0)
    if name == "SoftMoE":
        return SoftMoE(experts, 1, seed=0)
    if name in WRAPPED:
        return MoE(WRAPPED[name](0), experts)
    return MoE(DecoderConfig(**shape(name)).build_router(), experts)


def run(module: nn.Module, x: Tensor, forward: nn.Module | None = None) -> dict[str, Tensor]:
    """Output and gradients of a pass with padding."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    given = batch(1)
    ids = {} if isinstance(module, SoftMoE) else {"token_ids": given.tokens_BS}
    key = RandomKey.of(0, 1, torch.arange(x[..., 0].numel()).view(x.shape[:-1]))
    y = (module if forward is None else forward)(
        x, padding_mask=given.padding_mask_BS, key=key, **ids
    )
    (y * torch.sin(torch.arange(y.numel())).view_as(y)).sum().backward()
    found = {"y": y.detach(), "dx": x.grad}
    return found | {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def check_compiled(name: str) -> None:
    x = torch.randn(4, LENGTH, 16, generator=torch.Generator().manual_seed(0))
    for training in (True, False):
        module = layer(name).train(training)
        expected = run(module, x)
        torch.compiler.reset()
        one_graph = MATRIX[name].compile == COMPILES["one"]
        compiled = torch.compile(module, backend="aot_eager", fullgraph=one_graph)
        actual = run(module, x, compiled)
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, msg=f"{name} {key}")
    torch.compiler.reset()


def test_a_sample_compiles() -> None:
    check_compiled("hash")


# Of the presets those that differ in what is traced.
TRACED = ("mixtral", "gshard", "v_moe", "deepseek_v3", "deepspeed", "deepspeed_top2", *FAMILIES)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({*TRACED, *WRAPPED, "SoftMoE"}))
def test_compiled_layers_are_the_layers(name: str) -> None:
    check_compiled(name)


def test_base_has_a_bound_in_training_only() -> None:
    router, x = DecoderConfig(**shape("base")).build_router(), torch.randn(10, 16)
    assert router(x).most_per_expert == 2
    assert router.eval()(x).most_per_expert is None


def test_rows_are_complete() -> None:
    for row in MATRIX.values():
        assert isinstance(row, Row)
        assert all(cell for cell in row)
