"""Soft MoE: a layer whose experts run on mixtures of a sequence's tokens."""

import torch
from torch import Tensor, nn

from expertmesh import random
from expertmesh.errors import UserError
from expertmesh.experts import Experts
from expertmesh.layer import MoE
from expertmesh.random import RandomKey
from expertmesh.routing import Router, Routing
from expertmesh.routing.logits import unit, wide_dtype
from expertmesh.routing.selection import count_experts

__all__ = ["SoftMoE"]


class SoftMoE(nn.Module):
    """``y = C experts(D^T x)`` for each sequence (Puigcerver et al., arXiv 2308.00951, 2.1).

    Each of E experts has P slots. With logits ``l = scale * normalise(x) normalise(Phi)``, rows of
    x and columns of Phi of norm 1 (the paper's 2.3):

    - ``D``, softmax of l over the tokens of the sequence: what each slot is a mixture of;
    - ``C``, softmax of l over all E P slots: what each token takes of the slots' outputs.

    No token is dropped, no expert idles, there is nothing to balance, and everything has a
    gradient. The cost is that of E P rows a sequence, however long it is. Every slot sees the whole
    sequence: not for causal decoders.

    Slots pass through an ``MoE`` whose router names each slot's expert, so experts shard over ranks
    as everywhere (``moe.experts``). A sequence must lie whole on a rank: cp=1 and tp=1.

    Args:
        experts: The experts.
        slots_per_expert: P. The paper's models have E P about equal to the sequence's length.
        seed: Of the initial Phi; None draws one from torch's generator.

    Attributes:
        phi_DS: ``(D, E P)``, slots of expert 0 first.
        scale_1: Multiplies the normalised logits; starts at 1. Not a scalar: FSDP takes none.

    Raises:
        ValueError: If ``slots_per_expert`` is below 1.
    """

    leaks = "every slot is a mixture of all tokens of its sequence"

    def __init__(
        self,
        experts: Experts,
        slots_per_expert: int,
        *,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if slots_per_expert < 1:
            raise UserError(f"slots_per_expert must be at least 1, got {slots_per_expert}")
        self.dim, self.slots_per_expert = experts.dim, slots_per_expert
        self.num_slots = experts.num_experts * slots_per_expert
        self.moe = MoE(_SlotRouter(experts.dim, experts.num_experts, slots_per_expert), experts)
        phi_DS = torch.empty(self.dim, self.num_slots, device=device, dtype=dtype)
        self.phi_DS = nn.Parameter(phi_DS)
        self.scale_1 = nn.Parameter(torch.ones(1, device=device, dtype=dtype))
        if not phi_DS.is_meta:
            self._draw(random.fresh_seed() if seed is None else seed)

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        random.fill_normal_(self.phi_DS, self.dim**-0.5, random.fold(seed, "phi"))
        self.scale_1.fill_(1.0)

    def reset_parameters(self, seed: int) -> None:
        """Draw Phi and the experts again, a function of the seed alone."""
        self._draw(seed)
        self.moe.reset_parameters(seed)

    def extra_repr(self) -> str:
        return f"slots_per_expert={self.slots_per_expert}"

    def forward(
        self, x: Tensor, *, padding_mask: Tensor | None = None, key: RandomKey | None = None
    ) -> Tensor:
        """Mix, run the experts, mix back.

        Args:
            x: ``(..., S, D)``; S tokens make a sequence.
            padding_mask: bool ``(..., S)``, True for padding: it enters no slot and gets 0.
            key: Names the random numbers of this step, for experts with dropout.

        Returns:
            ``x``'s shape and dtype.

        Raises:
            ValueError: If a shape does not fit, or a sequence lies on several ranks.
        """
        self._check(x, padding_mask)
        x_BSD = x.reshape(-1, x.shape[-2], self.dim)
        padding_BS1 = None if padding_mask is None else padding_mask.reshape(len(x_BSD), -1, 1)
        if padding_BS1 is not None:
            x_BSD = torch.where(padding_BS1, torch.zeros_like(x_BSD), x_BSD)
        with torch.autocast(x.device.type, enabled=False):
            wide_BSD = x_BSD.to(wide_dtype(x, self.phi_DS))
            dispatch_BSN, combine_BSN = self._mixtures(wide_BSD, padding_BS1)
            slot_BND = (dispatch_BSN.mT @ wide_BSD).to(x.dtype)
        out_BND = self.moe(slot_BND, key=self._slot_key(key, x_BSD.shape[1]))
        with torch.autocast(x.device.type, enabled=False):
            y_BSD = (combine_BSN @ out_BND.to(wide_BSD.dtype)).to(x.dtype)
        return y_BSD.reshape(x.shape)

    def _slot_key(self, key: RandomKey | None, length: int) -> RandomKey | None:
        """The slots' places in the batch: those of a sequence follow from its first token's."""
        if key is None:
            return None
        first_B1 = key.token_index.reshape(-1, max(length, 1))[:, :1]
        slot_N = torch.arange(self.num_slots, device=first_B1.device)
        return RandomKey(key.seed, first_B1 * self.num_slots + slot_N)

    def _mixtures(self, x_BSD: Tensor, padding_BS1: Tensor | None) -> tuple[Tensor, Tensor]:
        """``D`` and ``C``, both ``(B, S, E P)``; rows of padding are zero."""
        phi_DS = unit(self.phi_DS.to(x_BSD.dtype), 0) * self.scale_1.to(x_BSD.dtype)
        logits_BSN = unit(x_BSD, -1) @ phi_DS
        combine_BSN = logits_BSN.softmax(dim=2)
        if padding_BS1 is None:
            return logits_BSN.softmax(dim=1), combine_BSN
        # Not -inf: the softmax of a sequence of nothing but padding would be NaN.
        lowest = torch.finfo(logits_BSN.dtype).min
        dispatch_BSN = logits_BSN.masked_fill(padding_BS1, lowest).softmax(dim=1)
        dispatch_BSN = dispatch_BSN.masked_fill(padding_BS1, 0.0)
        return dispatch_BSN, combine_BSN.masked_fill(padding_BS1, 0.0)

    def _check(self, x: Tensor, padding_mask: Tensor | None) -> None:
        if x.dim() < 2 or x.shape[-1] != self.dim:
            raise UserError(f"x must have shape (..., S, {self.dim}), got {tuple(x.shape)}")
        if padding_mask is not None and (
            padding_mask.dtype != torch.bool or padding_mask.shape != x.shape[:-1]
        ):
            raise UserError(
                f"padding_mask must be bool of shape {tuple(x.shape[:-1])}, got "
                f"{padding_mask.dtype} of shape {tuple(padding_mask.shape)}"
            )
        ranks = self.moe.router.population.ranks_per_sequence
        if ranks > 1:
            raise UserError(
                f"SoftMoE mixes whole sequences, but each lies on {ranks} ranks; set cp=1 and tp=1"
            )


class _SlotRouter(Router):
    """Slots in order, P for each expert, with weight 1."""

    def __init__(self, dim: int, num_experts: int, slots_per_expert: int) -> None:
        super().__init__()
        self.dim, self.num_experts, self.layer = dim, num_experts, 0
        self.slots_per_expert = slots_per_expert

    def reset_parameters(self, seed: int) -> None:
        """Nothing is learned here."""

    def forward(
        self,
        x_TD: Tensor,
        *,
        token_ids: Tensor | None = None,
        padding_mask: Tensor | None = None,
        sequence_length: int | None = None,
        key: RandomKey | None = None,
        routing: Routing | None = None,
    ) -> Routing:
        """See ``Router.forward``; only the number of slots is looked at."""
        slot_T = torch.arange(len(x_TD), device=x_TD.device)
        expert_TK = (slot_T // self.slots_per_expert % self.num_experts)[:, None]
        return Routing(
            num_experts=self.num_experts,
            expert_TK=expert_TK,
            weight_TK=torch.ones_like(expert_TK, dtype=wide_dtype(x_TD)),
            chosen_TK=expert_TK,
            load_E=count_experts(expert_TK, self.num_experts),
            most_per_expert=len(x_TD) // self.num_experts,
        )
