"""Token choice by linear scores: each token takes the k experts that score highest."""

from collections.abc import Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn

from expertmesh import random
from expertmesh.kernels.router import router_logits, serves
from expertmesh.routing.bias import SelectionBias
from expertmesh.routing.capacity import Capacity
from expertmesh.routing.checks import check_deviation, check_kind
from expertmesh.routing.draw import Draw
from expertmesh.routing.group_limit import GroupLimit
from expertmesh.routing.logits import wide_dtype
from expertmesh.routing.losses import BalanceLoss
from expertmesh.routing.noise import Noise, NoisyLogits
from expertmesh.routing.sampling import Sampling
from expertmesh.routing.second_choice import SkipRule
from expertmesh.routing.token_choice import Renormalize, TokenChoice


@final
class TopKRouter(TokenChoice):
    """Scores every expert for each token and takes the k best; ties go to the lowest index.

    1. logits ``x W^T`` in float32 or wider, with noise in training;
    2. scores: softmax or sigmoid;
    3. selection by score (plus bias, within groups), k per token;
    4. weights: the scores of the chosen, renormalised or not, times ``scale``;
    5. later choices may be skipped by rule, and choices beyond capacity are dropped;
    6. balance losses, in training.

    Args:
        dim: D.
        num_experts: E.
        k: Experts per token.
        score: ``"softmax"`` or ``"sigmoid"``.
        renormalize: Whether weights are divided by their sum: ``"no"``; over the ``"chosen"`` k
            (GShard, Mixtral; a choice that survives dropping keeps its share); or over those
            ``"kept"`` after dropping (DeepSpeed).
        scale: Multiplies the weights (DeepSeek's routed scaling factor).
        noise: Exploration noise, or None.
        sampling: ``"no"`` takes the best. In training ``"second"`` takes the best first and draws
            the later choices by their probabilities among the rest, ``"all"`` draws every choice
            (DeepSpeed's Gumbel noise). It decides only: weights are those of the scores.
        skip: Leaves out later choices of small weight, or None.
        capacity: Limit per expert, or None for dropless.
        bias: Selection bias (loss-free balancing), or None.
        group_limit: Opens only the best groups of experts to a token, or None.
        losses: Balance losses; their names differ.
        logit_bias: Whether the logits have a trained bias, ``x W^T + b`` (gpt-oss); it starts at
            zero, is no part of ``bias``, and noise does not reach it.
        init_std: Standard deviation of the initial weights; 0 starts them at zero.
        seed: Of the initial weights; None draws one from torch's generator.
        layer: Index that sets this router's draws apart from other layers'.

    Raises:
        ValueError: For arguments that don't fit together, naming what to set.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        score: Literal["softmax", "sigmoid"] = "softmax",
        renormalize: Renormalize = "no",
        scale: float = 1.0,
        noise: Noise | None = None,
        sampling: Sampling = "no",
        skip: SkipRule | None = None,
        capacity: Capacity | None = None,
        bias: SelectionBias | None = None,
        group_limit: GroupLimit | None = None,
        losses: Sequence[BalanceLoss] = (),
        logit_bias: bool = False,
        init_std: float = 0.02,
        seed: int | None = None,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_experts,
            k,
            score=score,
            renormalize=renormalize,
            scale=scale,
            skip=skip,
            capacity=capacity,
            bias=bias,
            group_limit=group_limit,
            losses=losses,
            layer=layer,
            sampling=sampling,
        )
        check_kind("noise", noise, Noise, "NormalNoise()")
        if noise is not None:
            noise.check("noise", dim, num_experts)
        check_deviation("init_std", init_std)
        self.noise, self.init_std = noise, init_std
        self.weight_ED = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        bias_E = torch.empty(num_experts, device=device, dtype=dtype) if logit_bias else None
        self.logit_bias_E = None if bias_E is None else nn.Parameter(bias_E)
        if not self.weight_ED.is_meta:
            self.reset_parameters(random.fresh_seed() if seed is None else seed)

    def reset_parameters(self, seed: int) -> None:
        """Draw ``weight_ED`` from N(0, init_std^2), bounded at two standard deviations.

        The bound is that of Switch (arXiv 2101.03961, 2.4), harmless for the others.
        """
        random.fill_normal_(self.weight_ED, self.init_std, random.fold(seed, "weight"), truncate=2)
        if self.logit_bias_E is not None:
            nn.init.zeros_(self.logit_bias_E)
        if self.noise is not None:
            self.noise.reset_parameters(random.fold(seed, "noise"))
        if self.bias is not None:
            self.bias.reset_parameters()

    @property
    def draws(self) -> str | None:
        """See ``Router.draws``."""
        if self.noise is not None:
            return "noise is drawn for each token; set noise=None"
        return super().draws

    def _fused(self, x_TD: Tensor) -> bool:
        return serves(x_TD, self.weight_ED)

    def _logits(self, x_TD: Tensor, draw: Draw) -> NoisyLogits:
        return self._with_bias(self._product(x_TD, draw))

    def _product(self, x_TD: Tensor, draw: Draw) -> NoisyLogits:
        noisy = self.training and self.noise is not None
        if not noisy and self._fused(x_TD):
            logits_TE = router_logits(x_TD, self.weight_ED)
            return NoisyLogits(logits_TE, logits_TE, factors=(x_TD, self.weight_ED))
        wide = wide_dtype(x_TD, self.weight_ED)
        x_TD, weight_ED = x_TD.to(wide), self.weight_ED.to(wide)
        if self.training and self.noise is not None:
            return self.noise(x_TD, weight_ED, draw)
        logits_TE = x_TD @ weight_ED.T
        return NoisyLogits(logits_TE, logits_TE)

    def _with_bias(self, logits: NoisyLogits) -> NoisyLogits:
        if self.logit_bias_E is None:
            return logits
        bias_E = self.logit_bias_E.to(logits.clean_TE.dtype)
        clean_TE = noisy_TE = logits.clean_TE + bias_E
        if logits.noisy_TE is not logits.clean_TE:
            noisy_TE = logits.noisy_TE + bias_E
        return NoisyLogits(clean_TE, noisy_TE, logits.std_TE)
