"""Cosine routing: logits by angle, not by length (Tutel's cosine gate, arXiv 2206.03382)."""

import math
from collections.abc import Sequence
from functools import partial
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional

from expertmesh import random
from expertmesh.errors import UserError
from expertmesh.random import label
from expertmesh.routing.capacity import Capacity
from expertmesh.routing.checks import check_deviation
from expertmesh.routing.draw import Draw
from expertmesh.routing.logits import unit, wide_dtype
from expertmesh.routing.losses import BalanceLoss, LoadLoss
from expertmesh.routing.noise import NoisyLogits
from expertmesh.routing.token_choice import Renormalize, TokenChoice

_NOISE = label("cosine noise")
_MOST = math.log(100.0)


@final
class CosineRouter(TokenChoice):
    """``logits_te = cos(W x_t + b, M_e) exp(min(tau, log 100))``, then softmax and the k best.

    After Tutel's code (arXiv 2206.03382; its cosine_top gate). W, b and the experts' directions M
    are learned, and so is tau, which starts at ``log(1 / temperature)``. Logits never exceed 100.
    Where ``W x_t + b`` all but vanishes, as for a token of zeros at the start, its cosines do too,
    so that gradients stay bounded; 1e-6 is added to its squared length.

    Args:
        dim: D.
        num_experts: E.
        k: Experts per token.
        proj_dim: Width in which angles are taken.
        temperature: What the cosine is divided by at the start.
        renormalize: As with ``TopKRouter``; None is Tutel's rule: ``"chosen"`` for k >= 2.
        noise_std: Standard deviation of normal noise on the logits in training; Tutel's
            ``gate_noise`` g is ``g / E``. 0 is none.
        capacity: As with ``TopKRouter``.
        losses: As with ``TopKRouter``.
        init_std: Standard deviation of the initial M.
        seed: Of the initial values; None draws one from torch's generator.
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
        proj_dim: int = 256,
        temperature: float = 0.5,
        renormalize: Renormalize | None = None,
        noise_std: float = 0.0,
        capacity: Capacity | None = None,
        losses: Sequence[BalanceLoss] = (),
        init_std: float = 0.01,
        seed: int | None = None,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            num_experts,
            k,
            score="softmax",
            renormalize=renormalize or ("chosen" if k > 1 else "no"),
            scale=1.0,
            skip=None,
            capacity=capacity,
            bias=None,
            group_limit=None,
            losses=losses,
            layer=layer,
        )
        if not 0 < temperature < math.inf:
            raise UserError(f"temperature must be above 0, got {temperature}; Tutel's is 0.5")
        if proj_dim < 1:
            raise UserError(f"proj_dim must be at least 1, got {proj_dim}")
        check_deviation("noise_std", noise_std)
        check_deviation("init_std", init_std)
        if noise_std == 0 and any(isinstance(loss, LoadLoss) for loss in losses):
            raise UserError("LoadLoss needs noise on the logits, got noise_std=0; set it above 0")
        self.proj_dim, self.temperature = proj_dim, temperature
        self.noise_std, self.init_std = noise_std, init_std
        empty = partial(torch.empty, device=device, dtype=dtype)
        self.proj_PD = nn.Parameter(empty(proj_dim, dim))
        self.bias_P = nn.Parameter(empty(proj_dim))
        self.direction_EP = nn.Parameter(empty(num_experts, proj_dim))
        self.tau = nn.Parameter(empty(1))  # one element: FSDP cuts no scalars
        if not self.proj_PD.is_meta:
            self.reset_parameters(random.fresh_seed() if seed is None else seed)

    def reset_parameters(self, seed: int) -> None:
        """Draw W from N(0, 1 / (3 D)), the variance of torch's linear layer, and M; b is zero."""
        std = (3 * self.dim) ** -0.5
        random.fill_normal_(self.proj_PD, std, random.fold(seed, "projection"))
        random.fill_normal_(self.direction_EP, self.init_std, random.fold(seed, "direction"))
        nn.init.zeros_(self.bias_P)
        nn.init.constant_(self.tau, -math.log(self.temperature))

    @property
    def draws(self) -> str | None:
        """See ``Router.draws``."""
        return None if self.noise_std == 0 else "noise is drawn for each token; set noise_std=0"

    def _logits(self, x_TD: Tensor, draw: Draw) -> NoisyLogits:
        wide = wide_dtype(x_TD, self.proj_PD)
        x_TP = functional.linear(x_TD.to(wide), self.proj_PD.to(wide), self.bias_P.to(wide))
        direction_EP = functional.normalize(self.direction_EP.to(wide), dim=1)
        cosine_TE = unit(x_TP, dim=1) @ direction_EP.T
        clean_TE = cosine_TE * self.tau.to(wide).clamp_max(_MOST).exp()
        if not self.training or self.noise_std == 0:
            return NoisyLogits(clean_TE, clean_TE)
        std = clean_TE.new_full((), self.noise_std)
        noise_TE = draw.normal(_NOISE, self.num_experts, wide)
        return NoisyLogits(clean_TE, clean_TE + std * noise_TE, std)
