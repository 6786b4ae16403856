"""Routers by name: what a run file says is what is trained, and mistakes are named."""

import warnings
from pathlib import Path

import pytest
import torch

from expertmesh.errors import CausalityWarning, UserError
from expertmesh.layer import moe_layers
from expertmesh.models import DecoderConfig
from expertmesh.routing import HashRouter, SinkhornRouter
from expertmesh.routing.registry import (
    FAMILIES,
    RouterSite,
    build_router,
    router_names,
    router_options,
)
from expertmesh.train import toml
from expertmesh.train.build import build_passes
from expertmesh.train.optimizer import build_optimizer
from expertmesh.train.run_file import load_run_file, parse_run
from expertmesh.train.step import Stepper
from tests.routing.registered import (
    CPU,
    NAMES,
    OPTIONS,
    batch,
    decoder,
    shape,
    trained,
    values,
)
from tests.train.tiny import tables


def site(**changes):
    given = {"dim": 16, "num_experts": 8, "k": 2, "vocab_size": 31, "max_seq_len": 12, **changes}
    return RouterSite(**given)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_file_names_it_and_two_steps_train(name: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(toml.dumps({**tables(tmp_path), "model": shape(name)}), encoding="utf-8")
    run = load_run_file(path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", CausalityWarning)
        passes = build_passes(run, CPU)
    routers = [moe.router for moe in moe_layers(passes.model).values()]
    assert [router.layer for router in routers] == [0, 1]
    leaks = [w for w in caught if issubclass(w.category, CausalityWarning)]
    assert len(leaks) == (0 if routers[0].leaks is None else 1)
    before, routed = values(passes.model), [p.detach().clone() for p in routers[0].parameters()]
    stepper = Stepper(passes, build_optimizer(passes.model, run.optim), seed=1, clip=1.0)
    for step in (1, 2):
        result = stepper.step(step, batch(step))
        assert 2.0 < result.loss < 6.0
        assert result.grad_norm > 0
    assert not torch.equal(values(passes.model), before)
    for old, new in zip(routed, routers[0].parameters(), strict=True):
        assert not torch.equal(old, new)
    assert run.model.num_params == len(before)
    again = parse_run(tables(tmp_path) | {"model": shape(name)})
    assert again.model == run.model
    saved = tmp_path / "saved.toml"
    saved.write_text(run.to_toml(), encoding="utf-8")
    assert load_run_file(saved).model == run.model


def test_names_are_those_of_both_tables() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert set(FAMILIES) < set(router_names())
    assert OPTIONS.keys() < set(NAMES)


@pytest.mark.parametrize(
    ("name", "options", "changes", "message"),
    [
        ("hsh", {}, {}, "router must be one of .*, got 'hsh'; did you mean 'hash'"),
        ("sinkorn", {}, {}, "did you mean 'sinkhorn'"),
        ("hash", {"bye": "token"}, {"k": 1}, "'bye' of 'hash' is unknown; did you mean 'by'"),
        ("hash", {"by": "tokn"}, {"k": 1}, "by of 'hash' must be 'token' or 'previous' or"),
        ("hash", {}, {}, "takes one expert per token, got experts_per_token=2; set experts_per"),
        ("base", {}, {}, "router 'base' takes one expert per token"),
        ("thor", {}, {"k": 8}, "router 'thor' takes one expert per token"),
        ("uniform", {"rounds": 3}, {}, r"'rounds' of 'uniform' is unknown \(options: none\)"),
        ("sinkhorn", {"rounds": 2.5}, {}, "rounds of 'sinkhorn' must be an integer, got 2.5"),
        ("sinkhorn", {"rounds": 0}, {}, "rounds must be at least 1"),
        ("cosine", {"noise_std": True}, {}, "noise_std of 'cosine' must be a finite number"),
        ("cosine", {"temperature": 0}, {}, "temperature must be above 0"),
        ("cosine", {"capacity": 1.5}, {}, "capacity of 'cosine' must be a table or null"),
        ("expert_choice", {"most": 1}, {}, "cap.most must be at least factor=2"),
        ("expert_choice", {"scope": "batch"}, {}, "expert choice scope must be 'micro_batch'"),
        ("hierarchical", {}, {}, "experts_per_token=2 and k_groups=2; set experts_per_token to a"),
        ("hierarchical", {"num_groups": 3}, {"k": 4}, "num_groups must divide num_experts=8"),
        ("entropy", {"threshold": -1.0}, {}, "entropy threshold must be above 0"),
        (
            "cosine",
            {"capacity": {"fctor": 1}},
            {},
            r"capacity\.fctor is unknown; did you mean 'fac",
        ),
        ("mixtral", {"capacity": {"fctor": 1}}, {}, r"capacity\.fctor is unknown; did you mean 'f"),
        ("mixtral", {"seed": 1}, {}, "'seed' of 'mixtral' is not to be set here: the model says"),
        ("mixtral", {"k": 1}, {}, "'k' of 'mixtral' is not to be set here"),
        ("mixtral", {"layer": 1}, {}, "'layer' of 'mixtral' is not to be set here"),
        ("mixtral", {"dim": 1}, {}, "'dim' of 'mixtral' is not to be set here"),
        ("sinkhorn", {"k": 1}, {}, "'k' of 'sinkhorn' is not to be set here"),
        ("mixtral", {"name": "hash"}, {}, "router option 'name' is unknown"),
        ("mixtral", {"site": 1}, {}, "router option 'site' is unknown"),
        (
            "mixtral",
            {"balance_cof": 1},
            {},
            "'balance_cof' is unknown; did you mean 'balance_coef'",
        ),
    ],
)
def test_mistakes_are_named(name, options, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        build_router(name, site(**changes), options)


def test_a_configuration_refuses_what_the_router_refuses() -> None:
    with pytest.raises(ValueError, match="did you mean 'sinkhorn'"):
        DecoderConfig(**{**shape("hash"), "router": "sinkhor"})
    with pytest.raises(ValueError, match="the router's k is experts_per_token; set that"):
        DecoderConfig(**shape("sinkhorn", k=3))
    with pytest.raises(ValueError, match="set experts_per_token=1"):
        DecoderConfig(**{**shape("hash"), "experts_per_token": 2})
    with pytest.raises(ValueError, match=r"capacity\.fctor is unknown"):
        DecoderConfig(**shape("cosine", capacity={"fctor": 1.0}))


def test_options_reach_the_router() -> None:
    assert set(router_options("sinkhorn")) == {"rounds", "z_coef", "init_std"}
    router = build_router("sinkhorn", site(), {"rounds": 7, "z_coef": 0.1})
    assert isinstance(router, SinkhornRouter)
    assert router.rounds == 7
    assert [loss.name for loss in router.losses] == ["z"]
    cosine = build_router("cosine", site(), {"capacity": {"factor": 1.0, "order": "token"}})
    assert cosine.capacity.order == "token"
    capped = build_router("expert_choice", site(), {"most": 3, "scope": 16})
    assert (capped.cap.most, capped.scope, capped.factor) == (3, 16, 2.0)


def test_layers_and_seeds_have_hash_tables_of_their_own() -> None:
    tables_of = [
        build_router("hash", site(k=1, layer=layer), {"table_seed": seed}).table_V
        for layer, seed in ((0, 0), (1, 0), (0, 5))
    ]
    assert not any(torch.equal(tables_of[0], other) for other in tables_of[1:])
    assert len(tables_of[0]) == 31
    by_position = build_router("hash", site(k=1), {"by": "position"})
    assert len(by_position.table_V) == 12
    with torch.device("meta"):
        made_later = build_router("hash", site(k=1), {})
    assert isinstance(made_later, HashRouter)
    assert made_later.table_V.is_meta
    made_later.to_empty(device="cpu").reset_parameters(3)
    assert torch.equal(made_later.table_V, tables_of[0])


def test_training_is_repeatable() -> None:
    first, second = (trained(decoder("expert_choice")) for _ in range(2))
    assert first.losses == second.losses
