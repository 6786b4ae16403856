"""Every router that a causal decoder can name, and how to make it of plain values.

A new router is its own file, a function here that makes it, and a line in ``FAMILIES``.
"""

import dataclasses
import inspect
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import torch

from expertmesh.errors import UserError, nearest
from expertmesh.routing.base_layers import BaseRouter
from expertmesh.routing.batchwise import BatchwiseRouter, ThresholdLoss
from expertmesh.routing.capacity import Capacity
from expertmesh.routing.checks import from_table
from expertmesh.routing.cosine import CosineRouter
from expertmesh.routing.entropy import GlobalEntropyLoss, LocalEntropyLoss
from expertmesh.routing.expert_choice import ExpertChoiceRouter, TokenCap
from expertmesh.routing.fixed import FixedRouter, RoundRobinRouter, UniformRouter
from expertmesh.routing.hash import HashRouter
from expertmesh.routing.hash_tables import random_table
from expertmesh.routing.hierarchical import HierarchicalLoadLoss, HierarchicalRouter
from expertmesh.routing.losses import ImportanceLoss, LoadBalancingLoss, LoadLoss, ZLoss
from expertmesh.routing.noise import LearnedNoise
from expertmesh.routing.presets import ROUTER_PRESETS, router_preset
from expertmesh.routing.router import Router
from expertmesh.routing.scope import Scope
from expertmesh.routing.sinkhorn import SinkhornRouter
from expertmesh.routing.thor import ThorRouter
from expertmesh.routing.topk import TopKRouter


@dataclass(frozen=True, kw_only=True)
class RouterSite:
    """Where in a model a router stands: what no option says.

    Attributes:
        dim: D.
        num_experts: E.
        k: Experts per token; on average, where experts choose.
        vocab_size: Number of token ids.
        max_seq_len: Longest sequence.
        layer: Sets the layer's random draws apart.
    """

    dim: int
    num_experts: int
    k: int
    vocab_size: int
    max_seq_len: int
    layer: int = 0


def _noisy_top_k(site: RouterSite, *, balance_coef: float = 1e-2, min_std: float = 1e-2) -> Router:
    """Shazeer et al. 2017: learned noise, importance and load losses, zeros at first."""
    return TopKRouter(
        site.dim,
        site.num_experts,
        site.k,
        renormalize=_shared(site.k),
        noise=LearnedNoise(site.dim, site.num_experts, min_std=min_std),
        losses=(ImportanceLoss(coef=balance_coef), LoadLoss(coef=balance_coef)),
        init_std=0.0,
        seed=0,
        layer=site.layer,
    )


def _entropy(
    site: RouterSite,
    *,
    local_coef: float = 1e-2,
    global_coef: float = 1e-2,
    threshold: float | None = None,
    init_std: float = 0.02,
) -> Router:
    """Top-k balanced by LIMoE's pair of entropies in place of a load-balancing loss."""
    return TopKRouter(
        site.dim,
        site.num_experts,
        site.k,
        renormalize=_shared(site.k),
        losses=(
            LocalEntropyLoss(coef=local_coef),
            GlobalEntropyLoss(coef=global_coef, threshold=threshold),
        ),
        init_std=init_std,
        seed=0,
        layer=site.layer,
    )


def _hierarchical(
    site: RouterSite,
    *,
    num_groups: int = 2,
    k_groups: int = 2,
    balance_coef: float = 1e-2,
    min_std: float = 1e-2,
) -> Router:
    """Two levels of Shazeer's noisy gating; the k experts are shared out evenly over groups."""
    if k_groups < 1 or site.k % k_groups or site.k < 2 * k_groups:
        raise UserError(
            "router 'hierarchical' takes experts_per_token / k_groups experts, two or more, of "
            f"each of k_groups groups; got experts_per_token={site.k} and k_groups={k_groups}; set "
            f"experts_per_token to a multiple of {2 * max(k_groups, 2)}"
        )
    return HierarchicalRouter(
        site.dim,
        site.num_experts,
        num_groups=num_groups,
        k_groups=k_groups,
        k_each=site.k // k_groups,
        primary_noise=LearnedNoise(site.dim, num_groups, min_std=min_std),
        secondary_noise=LearnedNoise(site.dim, site.num_experts, min_std=min_std),
        losses=(ImportanceLoss(coef=balance_coef), HierarchicalLoadLoss(coef=balance_coef)),
        init_std=0.0,
        seed=0,
        layer=site.layer,
    )


def _cosine(
    site: RouterSite,
    *,
    proj_dim: int = 256,
    temperature: float = 0.5,
    noise_std: float = 0.0,
    capacity: dict[str, Any] | None = None,
    balance_coef: float = 1e-2,
    init_std: float = 0.01,
) -> Router:
    """Tutel's cosine gate; dropless unless a capacity is given."""
    return CosineRouter(
        site.dim,
        site.num_experts,
        site.k,
        proj_dim=proj_dim,
        temperature=temperature,
        noise_std=noise_std,
        capacity=None if capacity is None else from_table("capacity", capacity, Capacity),
        losses=(LoadBalancingLoss(coef=balance_coef),) if balance_coef else (),
        init_std=init_std,
        seed=0,
        layer=site.layer,
    )


def _expert_choice(
    site: RouterSite,
    *,
    scope: Scope = "micro_batch",
    most: int | None = None,
    init_std: float = 0.02,
) -> Router:
    """Experts choose; a token has at most ``most`` experts where that is given."""
    return ExpertChoiceRouter(
        site.dim,
        site.num_experts,
        float(site.k),
        scope=scope,
        cap=None if most is None else TokenCap(most=most),
        init_std=init_std,
        seed=0,
        layer=site.layer,
    )


def _batchwise(
    site: RouterSite,
    *,
    scope: Scope = "micro_batch",
    threshold_coef: float = 1.0,
    init_std: float = 0.02,
) -> Router:
    """Shazeer's strictly balanced gating, with learned thresholds in evaluation."""
    return BatchwiseRouter(
        site.dim,
        site.num_experts,
        site.k,
        scope=scope,
        losses=(ThresholdLoss(coef=threshold_coef),),
        init_std=init_std,
        seed=0,
        layer=site.layer,
    )


def _base(site: RouterSite, *, tolerance: float = 1e-3, gain: float = 0.1) -> Router:
    """Balanced assignment in training, the best expert in evaluation."""
    _only_one(site, "base")
    return BaseRouter(
        site.dim, site.num_experts, tolerance=tolerance, gain=gain, seed=0, layer=site.layer
    )


def _sinkhorn(
    site: RouterSite, *, rounds: int = 20, z_coef: float = 0.0, init_std: float = 0.02
) -> Router:
    """Balanced by rescaling rows and columns in training."""
    return SinkhornRouter(
        site.dim,
        site.num_experts,
        site.k,
        rounds=rounds,
        losses=(ZLoss(coef=z_coef),) if z_coef else (),
        init_std=init_std,
        seed=0,
        layer=site.layer,
    )


def _hash(
    site: RouterSite,
    *,
    by: Literal["token", "previous", "position"] = "token",
    table_seed: int = 0,
) -> Router:
    """A random table, another one in each layer; other tables by ``replace_routers``."""
    _only_one(site, "hash")
    num_ids = site.max_seq_len if by == "position" else site.vocab_size
    device = torch.get_default_device()
    with torch.device("cpu"):  # a table is data: it must be there even where parameters are not
        table = random_table(num_ids, site.num_experts, seed=table_seed + site.layer)
        return HashRouter(site.dim, site.num_experts, table, by=by, layer=site.layer, device=device)


def _thor(site: RouterSite, *, evaluation: Literal["token", "sequence"] = "token") -> Router:
    """An expert at random; a run makes one pass, so without the paper's consistency loss."""
    _only_one(site, "thor")
    return ThorRouter(site.dim, site.num_experts, evaluation=evaluation, layer=site.layer)


def _uniform(site: RouterSite) -> Router:
    return UniformRouter(site.dim, site.num_experts, site.k, layer=site.layer)


def _round_robin(site: RouterSite) -> Router:
    return RoundRobinRouter(site.dim, site.num_experts, site.k, layer=site.layer)


def _fixed(site: RouterSite) -> Router:
    return FixedRouter(site.dim, site.num_experts, range(site.k), layer=site.layer)


def _preset(name: str, site: RouterSite, options: Mapping[str, Any]) -> Router:
    return router_preset(
        name,
        dim=site.dim,
        num_experts=site.num_experts,
        k=site.k,
        seed=0,
        layer=site.layer,
        **options,
    )


FAMILIES: Mapping[str, Callable[..., Router]] = {
    "noisy_top_k": _noisy_top_k,
    "entropy": _entropy,
    "hierarchical": _hierarchical,
    "cosine": _cosine,
    "expert_choice": _expert_choice,
    "batchwise": _batchwise,
    "base": _base,
    "sinkhorn": _sinkhorn,
    "hash": _hash,
    "thor": _thor,
    "uniform": _uniform,
    "round_robin": _round_robin,
    "fixed": _fixed,
}
"""Names, beside those of ``ROUTER_PRESETS``, to functions of a site and plain options.

``PerSequence`` and ``PerTask`` are not here: the one is of no use where a sequence comes a token at
a time, the other needs to know tasks. ``replace_routers`` takes any router.
"""


def router_names() -> tuple[str, ...]:
    """What ``build_router`` knows by name."""
    return (*ROUTER_PRESETS, *FAMILIES)


_OF_THE_SITE = (*(field.name for field in dataclasses.fields(RouterSite)), "seed")


def build_router(name: str, site: RouterSite, options: Mapping[str, Any]) -> Router:
    """A router by its name.

    Args:
        name: One of ``router_names()``.
        site: Where it stands.
        options: Plain values by name: a preset's as in ``router_preset``, those of another family
            as ``router_options`` lists them.

    Raises:
        ValueError: For an unknown name or option, with the nearest match, for one that the site
            says, or a wrong value.
    """
    names = router_names()
    if name not in names:
        raise UserError(
            f"router must be one of {', '.join(names)}, got {name!r}" + nearest(name, names)
        )
    for option in options:
        if option in _OF_THE_SITE:
            raise UserError(
                f"router option {option!r} of {name!r} is not to be set here: the model says the "
                f"router's {', '.join(_OF_THE_SITE)}; leave it out"
            )
    if name in ROUTER_PRESETS:
        return _preset(name, site, options)
    known = router_options(name)
    for option, value in options.items():
        if option not in known:
            raise UserError(
                f"router option {option!r} of {name!r} is unknown{nearest(option, known)} "
                f"(options: {', '.join(sorted(known)) or 'none'})"
            )
        if not _fits(value, known[option].annotation):
            raise UserError(
                f"router option {option} of {name!r} must be {_words(known[option].annotation)}, "
                f"got {value!r}"
            )
    return FAMILIES[name](site, **options)


def router_options(name: str) -> dict[str, inspect.Parameter]:
    """The options of a router of ``FAMILIES``, with types and defaults."""
    parameters = inspect.signature(FAMILIES[name]).parameters
    return {option: p for option, p in parameters.items() if option != "site"}


def _shared(k: int) -> Literal["no", "chosen"]:
    """Weights over their sum, unless that would make the only one 1."""
    return "no" if k == 1 else "chosen"


def _only_one(site: RouterSite, name: str) -> None:
    if site.k != 1:
        raise UserError(
            f"router {name!r} takes one expert per token, got experts_per_token={site.k}; set "
            "experts_per_token=1"
        )


def _fits(value: object, hint: Any) -> bool:
    """Whether a plain value is of an option's type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if isinstance(value, bool):
        return hint is bool
    if hint is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, types.NoneType if hint is None else origin or hint)


def _words(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(argument) for argument in arguments)
    if origin is Literal:
        return " or ".join(repr(argument) for argument in arguments)
    names = {float: "a finite number", int: "an integer", str: "a text", dict: "a table"}
    return names.get(origin or hint, "null")
