"""Expert Choice: each expert takes the tokens that score highest (arXiv 2202.09368)."""

import math
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from expertmesh import random
from expertmesh.errors import UserError
from expertmesh.random import RandomKey
from expertmesh.routing.checks import check_deviation, check_sizes
from expertmesh.routing.decision import decision
from expertmesh.routing.logits import wide_logits, without_padding
from expertmesh.routing.picks import Groups, best_tokens, groups_of, rank_of, rows_of
from expertmesh.routing.replay import recorded
from expertmesh.routing.router import Router
from expertmesh.routing.routing import Routing
from expertmesh.routing.scope import Scope, check_scope
from expertmesh.routing.selection import count_experts, top_k

_HOT, _COOLING = 30.0, 0.7


@dataclass(frozen=True, kw_only=True)
class TokenCap:
    """At most ``most`` experts for a token: the paper's EC-CAPb (arXiv 2202.09368, 3.3).

    Experts choose by A in place of the scores S: ``max <S, A> + temperature * H(A)``, where experts
    have ``sum_t A = k``, tokens ``sum_e A <= most``, ``0 <= A <= 1`` and H is the sum of elements'
    entropies. Found by Dykstra's projections, written as prices of the three constraints. Weights
    remain those of S. Projections begin 30 times hotter and cool down over the first 70 % of the
    iterations, which the paper does not do: at the paper's temperature from the start, 100
    iterations often leave tenths of a token's cap open.

    A need not have come to rest at 0 and 1, and then an expert's k highest may give a token more
    than ``most`` experts. The token keeps those of highest A; the others count as dropped.

    Attributes:
        most: b.
        temperature: The paper's lambda.
        iterations: Of projection; the paper's bound is 100.
    """

    most: int
    temperature: float = 1e-3
    iterations: int = 100

    def __post_init__(self) -> None:
        if self.most < 1:
            raise UserError(f"TokenCap.most must be at least 1, got {self.most}")
        if not self.temperature > 0:
            raise UserError(f"TokenCap.temperature must be above 0, got {self.temperature}")
        if self.iterations < 1:
            raise UserError(f"TokenCap.iterations must be at least 1, got {self.iterations}")

    def assign(self, score_GSE: Tensor, slots: int) -> Tensor:
        """A for each group: ``(G, S, E)`` scores, -1 for padding, to ``(G, S, E)``."""
        if score_GSE.numel() == 0:
            return score_GSE
        log_most, log_slots = math.log(self.most), math.log(slots)
        # Prices of the three constraints; A is exp((scores + seats - tokens - box) / temperature).
        seat_G1E = torch.zeros_like(score_GSE[:, :1])
        token_GS1 = torch.zeros_like(score_GSE[:, :, :1])
        box_GSE = torch.zeros_like(score_GSE)
        for step in range(self.iterations):
            heat = self.temperature * max(1.0, _HOT ** (1 - step / (_COOLING * self.iterations)))
            offered = score_GSE + seat_G1E - token_GS1
            box_GSE = offered.clamp_min(0)
            mass = ((score_GSE + seat_G1E - box_GSE) / heat).logsumexp(2, keepdim=True)
            token_GS1 = (heat * (mass - log_most)).clamp_min(0)
            mass = ((score_GSE - token_GS1 - box_GSE) / heat).logsumexp(1, keepdim=True)
            seat_G1E = heat * (log_slots - mass)
        return ((score_GSE + seat_G1E - token_GS1 - box_GSE) / self.temperature).exp()


@final
class ExpertChoiceRouter(Router):
    """Every expert takes ``k = n factor / E`` of n tokens (arXiv 2202.09368, 3.2).

    ``S = softmax(x W^T)`` over experts; expert e takes the k tokens of highest ``S[:, e]``, ties to
    the earlier token, scores that agree to 12 bits counting as ties; its weight for token t is
    ``S[t, e]``, not renormalised. A token gets 0 to E experts. All experts are full, so there is no
    balance loss. k is rounded down; n counts padding, which is never taken.

    Args:
        dim: D.
        num_experts: E.
        factor: Experts per token on average, c in the paper, in (0, E].
        scope: The group of tokens out of which experts choose.
        cap: A limit on the experts of one token, or None.
        init_std: Standard deviation of the initial weights.
        seed: Of the initial weights; None draws one from torch's generator.
        layer: Not looked at; every router has one.

    Raises:
        ValueError: For a factor outside (0, E] or above the cap; and in forward, where the
            experts' share of the tokens rounds to zero.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        factor: float = 2.0,
        *,
        scope: Scope = "micro_batch",
        cap: TokenCap | None = None,
        init_std: float = 0.02,
        seed: int | None = None,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim, num_experts)
        check_deviation("init_std", init_std)
        if not 0 < factor <= num_experts:
            raise UserError(
                f"factor must be above 0 and at most num_experts={num_experts}, got {factor}"
            )
        if cap is not None and cap.most < factor:
            raise UserError(
                f"cap.most must be at least factor={factor}, or experts cannot fill up; "
                f"got {cap.most}"
            )
        check_scope("expert choice scope", scope)
        self.dim, self.num_experts, self.layer = dim, num_experts, layer
        self.factor, self.scope, self.cap, self.init_std = factor, scope, cap, init_std
        self.weight_ED = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        if not self.weight_ED.is_meta:
            self.reset_parameters(random.fresh_seed() if seed is None else seed)

    def reset_parameters(self, seed: int) -> None:
        """Draw ``weight_ED`` from N(0, init_std^2), bounded at two standard deviations."""
        random.fill_normal_(self.weight_ED, self.init_std, random.fold(seed, "weight"), truncate=2)

    @property
    def leaks(self) -> str | None:
        """See ``Router.leaks``."""
        return "experts choose among all tokens of the group, later ones included"

    def extra_repr(self) -> str:
        """What sets this router apart."""
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, factor={self.factor}, "
            f"scope={self.scope!r}, cap={self.cap}"
        )

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
            score_TE = logits_TE.softmax(dim=1)
            score_ET = score_TE.detach().T.contiguous()  # experts look through rows of it
            if routing is None:
                groups = groups_of(
                    self.population,
                    self.scope,
                    self.factor,
                    self.num_experts,
                    field="factor",
                    num_tokens=len(x_TD),
                    sequence_length=sequence_length,
                    key=key,
                )
                token_N, chosen_N, expert_N = self._choose(score_ET, groups, padding_mask)
            else:
                routing = recorded(routing, self.num_experts, "experts")
                assert routing.token_N is not None
                token_N, chosen_N = routing.token_N, routing.chosen_TK[:, 0]
                expert_N = routing.expert_TK[:, 0]
            known_N = expert_N.clamp_max(self.num_experts - 1)
            weight_N: Tensor = _LookUp.apply(score_TE, score_ET, token_N, known_N)
            if padding_mask is not None or self.cap is not None or routing is not None:
                weight_N = torch.where(expert_N < self.num_experts, weight_N, 0.0)
        return Routing(
            num_experts=self.num_experts,
            expert_TK=expert_N[:, None],
            weight_TK=weight_N[:, None],
            chosen_TK=chosen_N[:, None],
            load_E=count_experts(chosen_N, self.num_experts),
            dropped_TK=(chosen_N != expert_N)[:, None],
            logits_TE=logits_TE,
            token_N=token_N,
        )

    @torch.no_grad()
    def _choose(
        self, score_ET: Tensor, groups: Groups, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, the experts that chose them, and these again with E where the cap forbids."""
        rank_NE = groups.order.whole(rank_of(score_ET.T, padding_mask))
        if self.cap is not None:
            rank_NE = self._capped(self.cap, rank_NE, groups)
        place_GEJ = best_tokens(rank_NE, groups)
        token_N, expert_N, row_N = rows_of(place_GEJ, groups, score_ET.shape[1], padding_mask)
        token_N, chosen_N = decision(token_N), decision(expert_N)
        if self.cap is None:
            return token_N, chosen_N, chosen_N
        over_N = _over(rank_NE, place_GEJ, self.cap.most).reshape(-1)[row_N]
        return token_N, chosen_N, decision(torch.where(over_N, self.num_experts, expert_N))

    def _capped(self, cap: TokenCap, rank_NE: Tensor, groups: Groups) -> Tensor:
        """Ranks by A in place of S; S as rounded, so that all ranks and meshes find the same A."""
        score_NE = torch.where(rank_NE < 0, -1.0, rank_NE.view(torch.float32))
        a_GSE = cap.assign(score_NE.view(-1, groups.size, self.num_experts), groups.slots)
        return rank_of(a_GSE.view_as(score_NE), (rank_NE < 0).all(dim=1))


def _over(rank_NE: Tensor, place_GEJ: Tensor, most: int) -> Tensor:
    """bool ``(G, E, slots)``: choices of a token beyond its ``most`` of highest rank."""
    num_tokens, num_experts = rank_NE.shape
    expert_E = torch.arange(num_experts, device=rank_NE.device)[:, None].expand_as(place_GEJ)
    taken_NE = torch.zeros(num_tokens, num_experts, dtype=torch.bool, device=rank_NE.device)
    taken_NE[place_GEJ, expert_E] = True
    # Ranks of scores up to 1 are 20 bits above 12 of zeros: a float32 holds them exactly.
    taken_rank_NE = torch.where(taken_NE, rank_NE, -1).to(torch.float32)
    kept_NE = torch.zeros_like(taken_NE)
    kept_NE.scatter_(1, top_k(taken_rank_NE, min(most, num_experts)), True)
    return ~kept_NE[place_GEJ, expert_E]


class _LookUp(torch.autograd.Function):
    """``score_TE[token_N, expert_N]``, read from the table by expert, whose rows fit a CPU's cache.

    The gradient goes to the table by token, where it is wanted.
    """

    @staticmethod
    def forward(
        ctx: Any, score_TE: Tensor, score_ET: Tensor, token_N: Tensor, expert_N: Tensor
    ) -> Tensor:
        ctx.save_for_backward(token_N, expert_N)
        ctx.shape = score_TE.shape
        return score_ET.flatten().gather(0, expert_N * len(score_TE) + token_N)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None, None, None]:
        token_N, expert_N = ctx.saved_tensors
        grad_TE = grad_N.new_zeros(ctx.shape)
        grad_TE.view(-1).scatter_add_(0, token_N * ctx.shape[1] + expert_N, grad_N)
        return grad_TE, None, None, None
