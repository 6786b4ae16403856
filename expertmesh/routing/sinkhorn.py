"""Sinkhorn routing: choices evened out by rescaling, without a loss."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from expertmesh import random
from expertmesh.errors import UserError
from expertmesh.random import RandomKey
from expertmesh.routing.checks import check_deviation, check_sizes
from expertmesh.routing.decision import decision
from expertmesh.routing.evidence import Evidence
from expertmesh.routing.logits import wide_logits, without_padding
from expertmesh.routing.losses import BalanceLoss, LoadLoss, by_name, check_losses
from expertmesh.routing.noise import NoisyLogits
from expertmesh.routing.replay import recorded
from expertmesh.routing.router import Router
from expertmesh.routing.routing import Routing
from expertmesh.routing.selection import count_experts, top_k


def sinkhorn_offsets(logits_NE: Tensor, rounds: int, padding_mask: Tensor | None = None) -> Tensor:
    """The column factors of Sinkhorn's balanced matrix, as logarithms: ``(E,)``.

    The matrix ``P_ne = exp(logit_ne + row_n + column_e)`` whose rows all sum to 1/N and whose
    columns to 1/E is found by scaling rows and columns in turn (Sinkhorn and Knopp, 1967). A token
    compares experts by ``logit_ne + column_e``; row factors and constants do not matter to it, so
    they are left out. Computed by logsumexp: no logits are too large.

    Args:
        logits_NE: ``(N, E)`` of all tokens of the micro-batch.
        rounds: Times that rows and columns are scaled.
        padding_mask: bool ``(N,)``, True for rows that do not count, or None.

    Returns:
        ``(E,)``, zeros where no token counts.
    """
    column_E = logits_NE.new_zeros(logits_NE.shape[1])
    if len(logits_NE) == 0:
        return column_E
    for _ in range(rounds):
        scaled_NE = logits_NE - (logits_NE + column_E).logsumexp(dim=1, keepdim=True)
        if padding_mask is not None:
            scaled_NE = scaled_NE.masked_fill(padding_mask[:, None], -torch.inf)
        column_E = -scaled_NE.logsumexp(dim=0)
    return column_E.nan_to_num(posinf=0.0)


@final
class SinkhornRouter(Router):
    """Top-k of a Sinkhorn-balanced matrix in training, top-k of the scores in evaluation.

    In training ``P = diag(r) exp(x W^T) diag(c)`` over all tokens of the global micro-batch, with
    equal row sums and equal column sums; each token takes its k largest entries of P (S-BASE in
    Clark et al., arXiv 2202.01169; Megatron-LM's ``sinkhorn`` load balancing). The balanced matrix
    decides and carries no gradient. Weights are the raw scores of the chosen: sigmoid for k = 1,
    softmax for more, as in Megatron-LM. The column sums of P are exact in the limit of many rounds;
    the numbers of choices, which round it, are even on average only. Nothing is dropped. It is for
    many more tokens than experts: fewer can be balanced exactly, and then rounding decides.

    Megatron-LM scales until the column factors move by less than 1e-4 on average, without a bound
    on the rounds, and each data-parallel rank by itself; here the number of rounds is fixed, so
    that shapes and cost are static and nothing waits for the device, and the matrix is that of all
    ranks.

    Args:
        dim: D.
        num_experts: E.
        k: Experts per token.
        rounds: Times that rows and columns are scaled in training.
        losses: Losses besides, for example ``ZLoss``; their names differ.
        init_std: Standard deviation of the initial weights.
        seed: Of the initial weights; None draws one from torch's generator.
        layer: Index of the layer.

    Raises:
        ValueError: For arguments out of range, or a loss that does not fit.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        rounds: int = 20,
        losses: Sequence[BalanceLoss] = (),
        init_std: float = 0.02,
        seed: int | None = None,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim, num_experts, k)
        check_deviation("init_std", init_std)
        check_losses(losses, type(self).__name__)
        if any(isinstance(loss, LoadLoss) for loss in losses):
            raise UserError(
                "LoadLoss needs normal noise on the logits, which SinkhornRouter never has; leave "
                "it out"
            )
        if rounds < 1:
            raise UserError(f"rounds must be at least 1, got {rounds}")
        self.dim, self.num_experts, self.k, self.layer = dim, num_experts, k, layer
        self.rounds, self.losses, self.init_std = rounds, tuple(losses), init_std
        self.weight_ED = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        if not self.weight_ED.is_meta:
            self.reset_parameters(random.fresh_seed() if seed is None else seed)

    def reset_parameters(self, seed: int) -> None:
        """Draw ``weight_ED`` from N(0, init_std^2), bounded at two standard deviations."""
        random.fill_normal_(self.weight_ED, self.init_std, random.fold(seed, "weight"), truncate=2)

    @property
    def leaks(self) -> str | None:
        """See ``Router.leaks``."""
        return "the balanced matrix of training is made of all tokens of the micro-batch"

    def extra_repr(self) -> str:
        """What sets this router apart."""
        return f"dim={self.dim}, num_experts={self.num_experts}, k={self.k}, rounds={self.rounds}"

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
        """See ``Router.forward``; ``token_ids`` are not looked at."""
        x_TD = without_padding(x_TD, padding_mask)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = wide_logits(x_TD, self.weight_ED)
            score_TE = logits_TE.sigmoid() if self.k == 1 else logits_TE.softmax(dim=1)
            if routing is None:
                chosen_TK = self._choose(logits_TE, padding_mask, sequence_length, key)
            else:
                chosen_TK = recorded(routing, self.num_experts).expert_TK
            score_TK = score_TE.gather(1, chosen_TK.clamp_max(self.num_experts - 1))
            weight_TK = torch.where(chosen_TK < self.num_experts, score_TK, 0.0)
            losses = {}
            if self.training and self.losses:
                evidence = Evidence(
                    logits=NoisyLogits(logits_TE, logits_TE),
                    score_TE=score_TE,
                    chosen_TK=chosen_TK,
                    gate_TK=weight_TK,
                    padding_mask=padding_mask,
                    sequence_length=sequence_length,
                    population=self.population,
                    key=key,
                )
                losses = by_name(self.losses, evidence)
        return Routing(
            num_experts=self.num_experts,
            expert_TK=chosen_TK,
            weight_TK=weight_TK,
            chosen_TK=chosen_TK,
            load_E=count_experts(chosen_TK, self.num_experts),
            logits_TE=logits_TE,
            losses=losses,
        )

    @torch.no_grad()
    def _choose(
        self,
        logits_TE: Tensor,
        padding_mask: Tensor | None,
        sequence_length: int | None,
        key: RandomKey | None,
    ) -> Tensor:
        if self.training:
            order = self.population.arrange(len(logits_TE), sequence_length, key)
            padding_N = order.whole_padding(padding_mask)
            offset_E = sinkhorn_offsets(order.whole(logits_TE), self.rounds, padding_N)
            logits_TE = logits_TE + offset_E
        chosen_TK = top_k(logits_TE, self.k)
        if padding_mask is not None:
            chosen_TK = torch.where(padding_mask[:, None], self.num_experts, chosen_TK)
        return decision(chosen_TK)
