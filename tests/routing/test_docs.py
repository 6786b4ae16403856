"""The page on routing says what the code says."""

from pathlib import Path

import torch

from expertmesh import routing
from expertmesh.routing import (
    ROUTER_PRESETS,
    BalanceLoss,
    Router,
    TokenChoice,
    registry,
    router_preset,
)
from expertmesh.routing.__main__ import AT_BALANCE, FAMILIES, HEADER, router_table
from expertmesh.routing.losses import FORMS

PAGE = (Path(__file__).parents[2] / "docs" / "routing.md").read_text(encoding="utf-8")


def public(kind):
    found = (getattr(routing, name) for name in routing.__all__)
    return {thing for thing in found if isinstance(thing, type) and issubclass(thing, kind)}


def test_the_table_is_the_commands_output():
    assert router_table() in PAGE


def test_every_router_has_a_row():
    names = " ".join(row[0] for row in FAMILIES)
    for router in public(Router) - {Router, TokenChoice}:
        assert f"`{router.__name__}" in names


def test_every_name_of_a_run_file_is_in_the_table_and_its_options_on_the_page():
    names = " ".join(row[0] for row in FAMILIES)
    assert all(f"`{name}`" in names for name in registry.FAMILIES)
    for name in registry.FAMILIES:
        options = [f"`{option}` {default(p.default)}" for option, p in options_of(name).items()]
        assert f"| `{name}` | {', '.join(options) or 'none'} |" in PAGE


def options_of(name):
    return registry.router_options(name)


def default(value):
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def test_every_row_has_every_column():
    assert all(len(row) == len(HEADER) for row in FAMILIES)
    rows = router_table().splitlines()
    assert len(rows) == 2 + len(ROUTER_PRESETS) + len(FAMILIES)
    assert all(row.count("|") == len(HEADER) + 1 for row in rows)


def test_presets_are_causal_where_the_table_says_so():
    rows = {row.split("`")[1]: row.split("|") for row in router_table().splitlines()[2:]}
    causal = 1 + HEADER.index("causal")
    with torch.device("meta"):
        for name in ROUTER_PRESETS:
            leaks = router_preset(name, dim=64, num_experts=64).leaks
            assert rows[name][causal].strip() == ("yes" if leaks is None else "no")


def test_every_loss_and_form_is_on_the_page():
    assert AT_BALANCE.keys() == FORMS.keys()
    for form in FORMS:
        assert f"`LoadBalancingLoss`, `{form}`" in PAGE
    for loss in public(BalanceLoss) - {BalanceLoss}:
        assert f"`{loss.__name__}`" in PAGE
