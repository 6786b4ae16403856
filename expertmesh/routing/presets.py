"""Routers as their papers and released models set them."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from expertmesh.errors import UserError, nearest
from expertmesh.routing.bias import SelectionBias
from expertmesh.routing.capacity import Capacity
from expertmesh.routing.checks import from_table
from expertmesh.routing.group_limit import GroupLimit
from expertmesh.routing.losses import (
    BalanceLoss,
    ImportanceLoss,
    LoadBalancingLoss,
    LoadLoss,
    ZLoss,
    check_losses,
)
from expertmesh.routing.noise import InputJitter, NormalNoise
from expertmesh.routing.second_choice import RandomSecond, ThresholdSecond
from expertmesh.routing.topk import TopKRouter

Options = dict[str, Any]


def _switch(dim: int, num_experts: int) -> Options:
    """Switch Transformer (arXiv 2101.03961): top-1, raw probability, jitter, capacity."""
    return {
        "k": 1,
        "noise": InputJitter(1e-2),
        "capacity": Capacity(factor=1.25, eval_factor=2.0, formula="switch"),
        "losses": (LoadBalancingLoss(coef=1e-2, form="switch"),),
        "init_std": (0.1 / dim) ** 0.5,
    }


def _gshard(dim: int, num_experts: int) -> Options:
    """GShard (arXiv 2006.16668) in its code's form: top-2, weights shared before dropping.

    The paper gives capacity out per local group: see ``gshard_local``, or set the capacity's
    ``scope`` to a number of tokens.
    """
    return {
        "k": 2,
        "renormalize": "chosen",
        "skip": RandomSecond(0.5),
        "capacity": Capacity(factor=2.0, eval_factor=2.0, formula="lingvo"),
        "losses": (LoadBalancingLoss(coef=1e-2, form="switch"),),
    }


def _gshard_local(dim: int, num_experts: int) -> Options:
    """``gshard`` with its local groups (its 2.2): slots and statistics belong to a sequence."""
    return _gshard(dim, num_experts) | {
        "capacity": Capacity(factor=2.0, eval_factor=2.0, formula="lingvo", scope="sequence"),
        "losses": (LoadBalancingLoss(coef=1e-2, form="switch", scope="sequence"),),
    }


def _glam(dim: int, num_experts: int) -> Options:
    """GLaM (arXiv 2112.06905): GShard's top-2 without the random second.

    No code was released; the paper names capacity factor 2.0 and coefficient 0.01, and what it
    leaves open is GShard's.
    """
    return {
        "k": 2,
        "renormalize": "chosen",
        "capacity": Capacity(factor=2.0, eval_factor=2.0, formula="lingvo"),
        "losses": (LoadBalancingLoss(coef=1e-2, form="switch"),),
    }


def _v_moe(dim: int, num_experts: int) -> Options:
    """V-MoE (arXiv 2106.05974): top-2 of noisy probabilities, raw, importance and load losses.

    Both losses are its code's: importance of the probabilities without noise, load by the k-th best
    noisy logit. Its batch priority is ``capacity={"order": "priority"}``. The factor in evaluation
    is that of its published configurations.
    """
    return {
        "k": 2,
        "noise": NormalNoise(),
        "capacity": Capacity(factor=1.05, eval_factor=4.0, formula="vmoe"),
        "losses": (
            ImportanceLoss(coef=5e-3, of="clean_probabilities"),
            LoadLoss(coef=5e-3, threshold="kth"),
        ),
        "init_std": dim**-0.5,
    }


def _st_moe(dim: int, num_experts: int) -> Options:
    """ST-MoE (arXiv 2202.08906): top-2, raw probabilities, second at least 0.2 of the first."""
    return {
        "k": 2,
        "skip": ThresholdSecond(0.2),
        "capacity": Capacity(factor=1.25, eval_factor=2.0, formula="flaxformer"),
        "losses": (LoadBalancingLoss(coef=1e-2, form="huggingface"), ZLoss(coef=1e-3)),
    }


def _mixtral(dim: int, num_experts: int) -> Options:
    """Mixtral (arXiv 2401.04088): top-2, softmax over the chosen, dropless."""
    return {
        "k": 2,
        "renormalize": "chosen",
        "losses": (LoadBalancingLoss(coef=1e-3, form="huggingface"),),
    }


def _olmoe(dim: int, num_experts: int) -> Options:
    """OLMoE (arXiv 2409.02060): top-8, raw probabilities, dropless, z-loss."""
    return {
        "k": 8,
        "losses": (LoadBalancingLoss(coef=1e-2, form="megablocks"), ZLoss(coef=1e-3)),
    }


def _qwen3_moe(dim: int, num_experts: int) -> Options:
    """Qwen3-MoE (arXiv 2505.09388): top-8, softmax over the chosen, dropless."""
    return {
        "k": 8,
        "renormalize": "chosen",
        "losses": (LoadBalancingLoss(coef=1e-3, form="huggingface"),),
    }


def _qwen2_moe(dim: int, num_experts: int) -> Options:
    """Qwen2-MoE (arXiv 2407.10671; Qwen1.5-MoE-A2.7B): top-4, raw probabilities, dropless.

    The larger Qwen2-57B-A14B has ``k=8``. Its shared expert is gated: ``GatedShared``.
    """
    return {"k": 4, "losses": (LoadBalancingLoss(coef=1e-3, form="huggingface"),)}


def _llama4(dim: int, num_experts: int) -> Options:
    """Llama 4 (its released code): top-1 by sigmoid, with a shared expert beside it.

    The weight multiplies what goes into the expert: put the experts in ``ScaledInputExperts``. The
    coefficient is the default of its configuration; how the models were balanced is not published.
    """
    return {
        "k": 1,
        "score": "sigmoid",
        "losses": (LoadBalancingLoss(coef=1e-3, form="huggingface"),),
    }


def _gpt_oss(dim: int, num_experts: int) -> Options:
    """gpt-oss (arXiv 2508.10925): top-4 of biased logits, softmax over the chosen, dropless.

    Its experts are ``GatedMLPExperts(activation="clamped_swiglu", bias=True)``. The coefficient is
    the default of its configuration; how the models were balanced is not published.
    """
    return {
        "k": 4,
        "renormalize": "chosen",
        "logit_bias": True,
        "losses": (LoadBalancingLoss(coef=1e-3, form="huggingface"),),
    }


def _deepseek_moe(dim: int, num_experts: int) -> Options:
    """DeepSeekMoE 16B (arXiv 2401.06066): top-6 of fine-grained experts, raw probabilities.

    Two shared experts stand beside the routed ones. The 2B model has coefficient 0.01.
    """
    return {
        "k": 6,
        "losses": (LoadBalancingLoss(coef=1e-3, form="megablocks"),),
        "init_std": 6e-3,
    }


def _deepseek_v2(dim: int, num_experts: int) -> Options:
    """DeepSeek-V2-Lite (arXiv 2405.04434, B): top-6, raw probabilities, sequence-wise loss.

    The large V2 adds ``scale=16`` and ``GroupLimit(num_groups=8, kept=3, score="max")``.
    """
    return {
        "k": 6,
        "losses": (LoadBalancingLoss(coef=1e-3, form="megablocks", scope="sequence"),),
        "init_std": 6e-3,
    }


def _deepseek_v3(dim: int, num_experts: int) -> Options:
    """DeepSeek-V3 (arXiv 2412.19437): sigmoid, selection bias, 4 of 8 groups, scale 2.5."""
    return {
        "k": 8,
        "score": "sigmoid",
        "renormalize": "chosen",
        "scale": 2.5,
        "bias": SelectionBias(num_experts, rate=1e-3),
        "group_limit": GroupLimit(num_groups=8, kept=4),
        "losses": (LoadBalancingLoss(coef=1e-4, form="deepseek_v3", scope="sequence"),),
        "init_std": 6e-3,
    }


def _tutel(dim: int, num_experts: int) -> Options:
    """Tutel's defaults (arXiv 2206.03382 and its code): top-2, shared before dropping.

    Its batch priority, by scores before they are shared, is ``capacity={"order": "priority"}``, its
    ``gate_noise`` is ``NormalNoise(gate_noise / E)``. The coefficient is its users' to set; 0.01
    here. The initial spread is that of ``torch.nn.Linear``.
    """
    return {
        "k": 2,
        "renormalize": "chosen",
        "capacity": Capacity(factor=1.0, eval_factor=1.0, formula="tutel"),
        "losses": (LoadBalancingLoss(coef=1e-2, form="switch"),),
        "init_std": (3 * dim) ** -0.5,
    }


def _deepspeed(dim: int, num_experts: int) -> Options:
    """DeepSpeed's defaults (arXiv 2201.05596 and its code): top-1, random token selection.

    The slots of an expert go to random tokens among those that want it, not to the first ones. Its
    ``noisy_gate_policy="RSample"`` is ``sampling="all"``. The coefficient is its users' to set;
    0.01 here.
    """
    return {
        "k": 1,
        "capacity": Capacity(factor=1.0, eval_factor=1.0, formula="deepspeed", order="random"),
        "losses": (LoadBalancingLoss(coef=1e-2, form="switch"),),
        "init_std": (3 * dim) ** -0.5,
    }


def _deepspeed_top2(dim: int, num_experts: int) -> Options:
    """DeepSpeed's gate for k = 2: the second expert is drawn, weights shared among those kept.

    Its ``top2_2nd_expert_sampling``, on by default, is ``sampling="second"``: the largest of the
    logits with Gumbel noise, the first expert left out. Its code draws in evaluation too, here
    evaluation takes the second best.
    """
    return {
        "k": 2,
        "renormalize": "kept",
        "sampling": "second",
        "capacity": Capacity(factor=1.0, eval_factor=1.0, formula="deepspeed"),
        "losses": (LoadBalancingLoss(coef=1e-2, form="switch"),),
        "init_std": (3 * dim) ** -0.5,
    }


def _deepspeed_topk(dim: int, num_experts: int) -> Options:
    """DeepSpeed's gate for k > 2: slots by probability, weights shared among those kept."""
    return {
        "k": 4,
        "renormalize": "kept",
        "capacity": Capacity(factor=1.0, eval_factor=1.0, formula="deepspeed", order="probability"),
        "losses": (LoadBalancingLoss(coef=1e-2, form="megablocks"),),
        "init_std": (3 * dim) ** -0.5,
    }


def _openmoe(dim: int, num_experts: int) -> Options:
    """OpenMoE (arXiv 2402.01739; flaxformer's configuration): top-2, raw probabilities, z-loss.

    Dropless; ``capacity="jax"`` and the like name ``OPENMOE_CAPACITIES``. It averages both losses
    over a model's MoE layers, where here they are added up: divide coefficients by their number.
    """
    return {
        "k": 2,
        "losses": (LoadBalancingLoss(coef=1e-2, form="huggingface"), ZLoss(coef=1e-4)),
    }


def _megatron(dim: int, num_experts: int) -> Options:
    """Megatron-LM's defaults (its code): top-2 of logits, softmax over the chosen, dropless.

    Its capacity, where one is set, is
    ``Capacity(factor, formula="megatron", order="probability")``. Its coefficient is 0 unless
    set; 0.01, the one its guide recommends, here.
    """
    return {
        "k": 2,
        "renormalize": "chosen",
        "losses": (LoadBalancingLoss(coef=1e-2, form="megablocks"),),
    }


ROUTER_PRESETS: Mapping[str, Callable[[int, int], Options]] = {
    "switch": _switch,
    "gshard": _gshard,
    "gshard_local": _gshard_local,
    "glam": _glam,
    "v_moe": _v_moe,
    "st_moe": _st_moe,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "llama4": _llama4,
    "gpt_oss": _gpt_oss,
    "deepseek_moe": _deepseek_moe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "tutel": _tutel,
    "deepspeed": _deepspeed,
    "deepspeed_top2": _deepspeed_top2,
    "deepspeed_topk": _deepspeed_topk,
    "megatron": _megatron,
    "openmoe": _openmoe,
}
"""Name to a function of (D, E) that gives ``TopKRouter``'s arguments."""


OPENMOE_CAPACITIES: Mapping[str, Capacity] = {
    "jax": Capacity(factor=1.25, eval_factor=2.0, formula="flaxformer", scope="<=4096"),
    "jax_34b": Capacity(factor=1.25, eval_factor=2.0, formula="flaxformer", scope="<=8192"),
    "pytorch": Capacity(factor=1.25, eval_factor=2.0, formula="colossalai"),
}
"""The capacities that OpenMoE was trained with, and the one of its PyTorch code.

``jax``: ``max(round(f S / E), 4)``, without k, in groups of at most 4096 tokens, for the 34B 8192:
of two choices per token at most 62.5 % are carried out in training. ``pytorch``:
``floor(k f S / E)`` made even, at least 4, over the whole micro-batch: k times as many slots.
"""

_CAPACITIES: Mapping[str, Mapping[str, Capacity]] = {"openmoe": OPENMOE_CAPACITIES}


def named_capacity(preset: str, name: str) -> Capacity:
    """The capacity that a preset knows by name.

    Raises:
        ValueError: If it knows none of this name.
    """
    known = _CAPACITIES.get(preset, {})
    if name not in known:
        options = f"one of {', '.join(known)}, or " if known else ""
        raise UserError(
            f"capacity of router {preset!r} must be {options}a table such as "
            f"{{factor = 1.25}}, got {name!r}{nearest(name, known)}"
        )
    return known[name]


_BALANCE = (LoadBalancingLoss, ImportanceLoss, LoadLoss)


def router_preset(
    name: str,
    /,
    *,
    dim: int,
    num_experts: int,
    balance_coef: float | None = None,
    z_coef: float | None = None,
    bias_rate: float | None = None,
    device: torch.device | str | None = None,
    **overrides: Any,
) -> TopKRouter:
    """A router by the name of the paper or model that introduced it.

    Args:
        name: A key of ``ROUTER_PRESETS``.
        dim: D.
        num_experts: E.
        balance_coef: Coefficient of the balance loss in place of the preset's (V-MoE has two, which
            both get it); 0 leaves it out.
        z_coef: Likewise for the z-loss; it may be added to presets without one.
        bias_rate: Gives the router a selection bias of this rate, in place of the preset's.
        device: Where to make parameters and buffers.
        overrides: Any argument of ``TopKRouter``, in place of the preset's. ``capacity`` and
            ``group_limit`` may be given as a table of fields, which change the preset's, and
            the capacities of ``openmoe`` by their names.

    Returns:
        The router.

    Raises:
        ValueError: For an unknown name or argument, with the nearest match.
    """
    if name not in ROUTER_PRESETS:
        raise UserError(
            f"router must be one of {', '.join(ROUTER_PRESETS)}, got {name!r}"
            + nearest(name, ROUTER_PRESETS)
        )
    with nullcontext() if device is None else torch.device(device):
        options = ROUTER_PRESETS[name](dim, num_experts)
    known = {*inspect.signature(TopKRouter).parameters, "balance_coef", "z_coef", "bias_rate"}
    known -= {"dim", "num_experts", "device"}
    for option in overrides:
        if option not in known:
            raise UserError(
                f"router option {option!r} is unknown{nearest(option, known)} "
                f"(options: {', '.join(sorted(known))})"
            )
    if isinstance(overrides.get("capacity"), str):
        overrides["capacity"] = named_capacity(name, overrides["capacity"])
    for option, kind in (("capacity", Capacity), ("group_limit", GroupLimit)):
        table = overrides.get(option)
        if isinstance(table, Mapping):
            overrides[option] = from_table(option, table, kind, options.get(option))
    options |= overrides
    if bias_rate is not None:
        options["bias"] = SelectionBias(num_experts, bias_rate, device=device)
    losses = options.get("losses", ())
    check_losses(losses, TopKRouter.__name__)
    losses = _with_coef(losses, _BALANCE, balance_coef)
    options["losses"] = _with_coef(losses, (ZLoss,), z_coef)
    return TopKRouter(dim, num_experts, device=device, **options)


def _with_coef(
    losses: tuple[BalanceLoss, ...],
    kinds: tuple[type[LoadBalancingLoss | ImportanceLoss | LoadLoss | ZLoss], ...],
    coef: float | None,
) -> tuple[BalanceLoss, ...]:
    """The losses with the coefficient of these kinds set.

    One of the first kind is added where there is none; those of coefficient 0 are left out.
    """
    if coef is None:
        return losses
    changed = tuple(
        dataclasses.replace(loss, coef=coef) if isinstance(loss, kinds) else loss for loss in losses
    )
    if not any(isinstance(loss, kinds) for loss in losses):
        changed = (*losses, kinds[0](coef=coef))
    return tuple(loss for loss in changed if loss.coef != 0)
