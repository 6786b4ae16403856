"""BASE: every expert the same number of tokens, by linear assignment (arXiv 2103.16716)."""

from typing import final

import torch
from torch import Tensor, nn

from expertmesh import random
from expertmesh.errors import UserError
from expertmesh.random import RandomKey
from expertmesh.routing.auction import balanced_assignment
from expertmesh.routing.checks import check_deviation, check_sizes
from expertmesh.routing.decision import decision
from expertmesh.routing.logits import coarse, wide_logits, without_padding
from expertmesh.routing.replay import recorded
from expertmesh.routing.router import Router
from expertmesh.routing.routing import Routing
from expertmesh.routing.selection import count_experts, top_k
from expertmesh.shards import shard_of


@final
class BaseRouter(Router):
    """Balanced assignment in training, the best expert in evaluation (arXiv 2103.16716).

    Training: maximise ``sum_t x_t w_{a_t}`` where each expert gets at most ``ceil(n / E)`` of the
    n tokens of the micro-batch (the paper: exactly n / E of each worker's tokens, after a random
    exchange between workers, which is not needed here). Evaluation: ``a_t = argmax_e x_t w_e``.

    The weight is ``alpha = sigmoid(x_t w_{a_t})``, through which alone the centroids w learn; the
    assignment has no gradient. The paper's output is ``alpha f(h) + (1 - alpha) h`` where its
    expert f carries a residual of its own, ``f(h) = h + delta(h)``; that is ``h + alpha delta(h)``.
    Experts here are delta and the residual is the block's, so a layer in a residual branch computes
    the same and nothing remains to be carried by the routing. To mix experts f without a residual
    is another model.

    No loss, no capacity, no drops.

    Args:
        dim: D.
        num_experts: E.
        tolerance: How far the auction may stay below the best assignment, per token and relative
            to the span of affinities; see ``balanced_assignment``. Affinities are read to 12 bits,
            so that rounding, which differs between meshes, decides nothing.
        gain: Of the initial centroids, which are orthogonal.
        seed: Of the initial centroids; None draws one from torch's generator.
        layer: Not looked at; every router has one.

    Raises:
        ValueError: For sizes below 1, a tolerance outside (0, 1], or a gain below 0.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        tolerance: float = 1e-3,
        gain: float = 0.1,
        seed: int | None = None,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(dim, num_experts)
        if not 0 < tolerance <= 1:
            raise UserError(f"tolerance must be in (0, 1], got {tolerance}; 1e-3 is the default")
        check_deviation("gain", gain)
        self.dim, self.num_experts, self.k, self.layer = dim, num_experts, 1, layer
        self.tolerance, self.gain = tolerance, gain
        self.weight_ED = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        if not self.weight_ED.is_meta:
            self.reset_parameters(random.fresh_seed() if seed is None else seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Orthonormal rows (columns, where E > D) times ``gain``."""
        shard = shard_of(self.weight_ED)
        rows, columns = sorted(shard.shape, reverse=True)
        index = torch.arange(rows * columns, device=shard.local.device).view(rows, columns)
        q, r = torch.linalg.qr(random.normal(random.fold(seed, "weight"), index, torch.float64))
        q = q * torch.sign(torch.diagonal(r))  # QR leaves signs open; this makes it one function
        whole_ED = q if shard.shape[0] == rows else q.T
        box = [slice(b, b + n) for b, n in zip(shard.offset, shard.local.shape, strict=True)]
        shard.local.copy_(self.gain * whole_ED[box[0], box[1]])

    @property
    def leaks(self) -> str | None:
        """See ``Router.leaks``."""
        return "in training, the tokens of the micro-batch share the experts out among them"

    def extra_repr(self) -> str:
        """What sets this router apart."""
        return f"dim={self.dim}, num_experts={self.num_experts}, tolerance={self.tolerance}"

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
            most = None
            if routing is not None:
                expert_T1 = recorded(routing, self.num_experts).expert_TK
                most = routing.most_per_expert
            elif self.training:
                order = self.population.arrange(len(x_TD), sequence_length, key)
                most = -(-order.num_tokens // self.num_experts)
                affinity_NE = order.whole(coarse(logits_TE.detach()))
                padding_N = order.whole_padding(padding_mask)
                expert_N = balanced_assignment(affinity_NE, padding_N, tolerance=self.tolerance)
                expert_T1 = decision(order.own(expert_N)[:, None])
            else:
                expert_T1 = top_k(logits_TE.detach(), 1)
                if padding_mask is not None:
                    expert_T1 = torch.where(padding_mask[:, None], self.num_experts, expert_T1)
                expert_T1 = decision(expert_T1)
            valid_T1 = expert_T1 < self.num_experts
            alpha_T1 = logits_TE.gather(1, expert_T1.clamp_max(self.num_experts - 1)).sigmoid()
        return Routing(
            num_experts=self.num_experts,
            expert_TK=expert_T1,
            weight_TK=torch.where(valid_T1, alpha_T1, 0.0),
            chosen_TK=expert_T1,
            load_E=count_experts(expert_T1, self.num_experts),
            logits_TE=logits_TE,
            most_per_expert=most,
        )
