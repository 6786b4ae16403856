"""The same weights give the same outputs and gradients as the MoE blocks of transformers.

And a wrong option does not: what sets the conventions apart is visible. Most of their routers
compute in float32 whatever the model's dtype, which is what bounds the agreement.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    Llama4TextConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SwitchTransformersConfig,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.models.switch_transformers.modeling_switch_transformers import (
    SwitchTransformersSparseMLP,
)

from expertmesh.experts import Experts, GatedMLPExperts, MLPExperts
from expertmesh.experts.scaled_input import ScaledInputExperts
from expertmesh.layer import MoE
from expertmesh.models import DecoderConfig
from expertmesh.models.block import build_moe
from expertmesh.models.mlp import GatedMLP
from expertmesh.residual_moe import GatedShared
from expertmesh.routing import Capacity, GroupLimit, router_preset
from expertmesh.testing import assert_close, relative_error

D, F, E = 12, 8, 8
BATCH, LENGTH = 3, 16
SHARED = "gate", "up", "down"

Convert = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Weight:
    """One of our parameters, and how it is made of theirs."""

    ours: str
    theirs: tuple[str, ...]
    convert: Convert = field(default=lambda parts: parts[0])


@dataclass(frozen=True)
class Case:
    """A block of theirs, the options that are ours for it, and options that are not."""

    preset: str
    block: type[nn.Module]
    config: PretrainedConfig
    weights: tuple[Weight, ...]
    options: dict[str, Any]
    wrong: tuple[dict[str, Any], ...]
    experts: Callable[[], Experts]
    wrong_experts: tuple[Callable[[], Experts], ...] = ()
    shared: Callable[[], nn.Module] | None = None

    def ours(self, experts: Callable[[], Experts] | None = None, **options: Any) -> MoE:
        """Our layer in float64, without their weights."""
        router = router_preset(
            self.preset, dim=D, num_experts=E, seed=0, **{**self.options, **options}
        )
        shared = None if self.shared is None else self.shared()
        return MoE(router, (experts or self.experts)(), shared=shared).double().eval()


def gated(**options: Any) -> Callable[[], Experts]:
    return lambda: GatedMLPExperts(D, F, E, seed=0, **options)


def halves(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].unflatten(1, (2, F))


def halves_transposed(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].mT.unflatten(1, (2, F))


def interleaved(parts: Sequence[Tensor]) -> Tensor:
    """``(E, D, 2 F)``, gate and up by turns, to ``(E, 2, F, D)``."""
    return parts[0].mT.unflatten(1, (F, 2)).transpose(1, 2)


def stacked(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts))


def linear_weights(gate: str = "gate.weight") -> tuple[Weight, ...]:
    return (
        Weight("router.weight_ED", (gate,)),
        Weight("experts.gate_up", ("experts.gate_up_proj",), halves),
        Weight("experts.down", ("experts.down_proj",)),
    )


def shared_weights(theirs: str, ours: str) -> tuple[Weight, ...]:
    return tuple(Weight(f"{ours}.{n}.weight", (f"{theirs}.{n}_proj.weight",)) for n in SHARED)


SIZES: dict[str, Any] = {"hidden_size": D, "num_experts_per_tok": 2}

CASES = {
    "mixtral": Case(
        "mixtral",
        MixtralSparseMoeBlock,
        MixtralConfig(**SIZES, intermediate_size=F, num_local_experts=E),
        linear_weights(),
        {"k": 2},
        ({"renormalize": "no"}, {"k": 3}, {"score": "sigmoid"}),
        gated(),
    ),
    "olmoe": Case(
        "olmoe",
        OlmoeSparseMoeBlock,
        OlmoeConfig(**SIZES, intermediate_size=F, num_experts=E),
        linear_weights(),
        {"k": 2},
        ({"renormalize": "chosen"},),
        gated(),
    ),
    "qwen3": Case(
        "qwen3_moe",
        Qwen3MoeSparseMoeBlock,
        Qwen3MoeConfig(**SIZES, moe_intermediate_size=F, num_experts=E, norm_topk_prob=True),
        linear_weights(),
        {"k": 2},
        ({"renormalize": "no"},),
        gated(),
    ),
    "qwen2": Case(
        "qwen2_moe",
        Qwen2MoeSparseMoeBlock,
        Qwen2MoeConfig(
            **SIZES, moe_intermediate_size=F, shared_expert_intermediate_size=10, num_experts=E
        ),
        (
            *linear_weights(),
            *shared_weights("shared_expert", "shared.module"),
            Weight("shared.weight_1D", ("shared_expert_gate.weight",)),
        ),
        {"k": 2},
        ({"renormalize": "chosen"},),
        gated(),
        shared=lambda: GatedShared(GatedMLP(D, 10), D, seed=0),
    ),
    "deepseek-v3": Case(
        "deepseek_v3",
        DeepseekV3MoE,
        DeepseekV3Config(
            hidden_size=D,
            num_experts_per_tok=3,
            moe_intermediate_size=F,
            n_routed_experts=E,
            n_shared_experts=1,
            n_group=4,
            topk_group=2,
        ),
        (
            *linear_weights(),
            *shared_weights("shared_experts", "shared"),
            Weight("router.bias.bias_E", ("gate.e_score_correction_bias",)),
        ),
        {"k": 3, "group_limit": GroupLimit(num_groups=4, kept=2)},
        (
            {"scale": 1.0},
            {"renormalize": "no"},
            {"score": "softmax"},
            {"group_limit": None},
            {"group_limit": GroupLimit(num_groups=4, kept=2, score="max")},
        ),
        gated(),
        shared=lambda: GatedMLP(D, F),
    ),
    "switch": Case(
        "switch",
        SwitchTransformersSparseMLP,
        SwitchTransformersConfig(d_model=D, d_ff=F, num_experts=E, expert_capacity=4),
        (
            Weight("router.weight_ED", ("router.classifier.weight",)),
            Weight(
                "experts.up",
                tuple(f"experts.expert_{e}.wi.weight" for e in range(E)),
                stacked,
            ),
            Weight(
                "experts.down",
                tuple(f"experts.expert_{e}.wo.weight" for e in range(E)),
                stacked,
            ),
        ),
        # Theirs gives the slots out per sequence: 16 tokens x 2.0 / 8 experts = 4.
        {"capacity": Capacity(factor=2.0, eval_factor=2.0, formula="switch", scope="sequence")},
        (
            {"capacity": None},
            {"capacity": {"scope": "micro_batch"}},
            {"capacity": {"order": "priority", "scope": "sequence"}},
            {"score": "sigmoid"},
        ),
        lambda: MLPExperts(D, F, E, seed=0),
    ),
    "gpt-oss": Case(
        "gpt_oss",
        GptOssMLP,
        GptOssConfig(**SIZES, intermediate_size=F, num_local_experts=E),
        (
            Weight("router.weight_ED", ("router.weight",)),
            Weight("router.logit_bias_E", ("router.bias",)),
            Weight("experts.gate_up", ("experts.gate_up_proj",), interleaved),
            Weight(
                "experts.gate_up_bias",
                ("experts.gate_up_proj_bias",),
                lambda parts: parts[0].unflatten(1, (F, 2)).transpose(1, 2),
            ),
            Weight("experts.down", ("experts.down_proj",), lambda parts: parts[0].mT),
            Weight("experts.down_bias", ("experts.down_proj_bias",)),
        ),
        {"k": 2},
        ({"renormalize": "no"}, {"logit_bias": False}),
        gated(activation="clamped_swiglu", bias=True),
        wrong_experts=(gated(activation="silu", bias=True), gated(activation="clamped_swiglu")),
    ),
    "llama4": Case(
        "llama4",
        Llama4TextMoe,
        Llama4TextConfig(
            hidden_size=D, num_experts_per_tok=1, intermediate_size=F, num_local_experts=E
        ),
        (
            Weight("router.weight_ED", ("router.weight",)),
            Weight("experts.experts.gate_up", ("experts.gate_up_proj",), halves_transposed),
            Weight("experts.experts.down", ("experts.down_proj",), lambda parts: parts[0].mT),
            *shared_weights("shared_expert", "shared"),
        ),
        {},
        ({"score": "softmax"}, {"k": 2}),
        lambda: ScaledInputExperts(GatedMLPExperts(D, F, E, seed=0)),
        wrong_experts=(gated(),),
        shared=lambda: GatedMLP(D, F),
    ),
}


def theirs_of(case: Case) -> nn.Module:
    """Their block with random weights, large enough for routers to be sure and clamps to act."""
    torch.manual_seed(0)
    block = case.block(case.config).double().eval()
    if case.preset == "switch":
        block.router.dtype = torch.float64  # which its configuration does not take
    with torch.no_grad():
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            tensor.copy_((0.3 if "bias" in name else 0.8) * torch.randn_like(tensor))
    return block


def named(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def adopt(moe: MoE, theirs: nn.Module, case: Case) -> None:
    """Copy their weights; an option that is not there, or stands elsewhere, is left out."""
    source, target = named(theirs), named(moe)
    with torch.no_grad():
        for weight in case.weights:
            name = weight.ours
            if name not in target:
                name = name.replace("experts.experts.", "experts.")
            if name in target:
                target[name].copy_(weight.convert([source[n] for n in weight.theirs]))


def tokens() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, LENGTH, D, dtype=torch.float64, generator=generator)


def run(module: nn.Module, x: Tensor) -> Tensor:
    y = module(x)
    return (y[0] if isinstance(y, tuple) else y).reshape(BATCH, LENGTH, D)


@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_are_theirs(name: str) -> None:
    case = CASES[name]
    theirs, ours = theirs_of(case), case.ours()
    adopt(ours, theirs, case)
    x, again = tokens().requires_grad_(), tokens().requires_grad_()
    cotangent = torch.sin(torch.arange(x.numel(), dtype=torch.float64)).view_as(x)
    y, expected = run(ours, x), run(theirs, again)
    (y * cotangent).sum().backward()
    (expected * cotangent).sum().backward()
    assert_close("output", y, expected, 1e-6)
    assert x.grad is not None
    assert again.grad is not None
    assert_close("input gradient", x.grad, again.grad, 1e-6)
    source, target = dict(theirs.named_parameters()), dict(ours.named_parameters())
    compared = [weight for weight in case.weights if weight.ours in target]
    assert {weight.ours for weight in compared} == set(target)
    assert {n for weight in compared for n in weight.theirs} == set(source)
    for weight in compared:
        parts = [source[n].grad for n in weight.theirs]
        whole = [
            torch.zeros_like(source[n]) if g is None else g
            for n, g in zip(weight.theirs, parts, strict=True)
        ]
        grad = target[weight.ours].grad
        assert grad is not None
        assert float(grad.norm()) > 0
        assert_close(weight.ours, grad, weight.convert(whole), 2e-6)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [(name, wrong) for name, case in CASES.items() for wrong in case.wrong],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_wrong_option_is_visible(name: str, wrong: dict[str, Any]) -> None:
    case = CASES[name]
    theirs, ours = theirs_of(case), case.ours(**wrong)
    adopt(ours, theirs, case)
    with torch.no_grad():
        assert relative_error(run(ours, tokens()), run(theirs, tokens())) > 1e-2


@pytest.mark.parametrize(
    ("name", "index"),
    [(name, i) for name, case in CASES.items() for i in range(len(case.wrong_experts))],
)
def test_wrong_experts_are_visible(name: str, index: int) -> None:
    case = CASES[name]
    theirs, ours = theirs_of(case), case.ours(case.wrong_experts[index])
    adopt(ours, theirs, case)
    with torch.no_grad():
        assert relative_error(run(ours, tokens()), run(theirs, tokens())) > 1e-2


def test_slots_overflow_in_the_switch_block() -> None:
    case = CASES["switch"]
    theirs, ours = theirs_of(case), case.ours()
    adopt(ours, theirs, case)
    _, routing = ours(tokens(), return_routing=True)
    assert 0 < int(routing.num_dropped) < BATCH * LENGTH


@pytest.mark.parametrize(
    ("name", "other"), [("llama4", "plain"), ("gpt-oss", "plain"), ("mixtral", "scaled_input")]
)
def test_a_decoder_that_names_the_router_has_the_models_experts(name: str, other: str) -> None:
    case = CASES[name]
    theirs, x = theirs_of(case), tokens()
    outputs = {}
    for form in ("auto", other):
        config = DecoderConfig(
            vocab_size=5,
            dim=D,
            num_layers=1,
            num_heads=2,
            num_experts=E,
            experts_per_token=case.options.get("k", 1),
            expert_hidden=F,
            num_shared_experts=0 if case.shared is None else 1,
            router=case.preset,
            expert_form=form,  # type: ignore[arg-type]  # one of its literals
        )
        moe = build_moe(config, 0).double().eval()
        adopt(moe, theirs, case)
        outputs[form] = run(moe, x)
    assert_close("output", outputs["auto"], run(theirs, x), 1e-6)
    assert relative_error(outputs[other], run(theirs, x)) > 1e-2
