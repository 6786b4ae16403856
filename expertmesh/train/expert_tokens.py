"""Which tokens each expert takes."""

from typing import Any

import torch
from torch import Tensor, nn

from expertmesh.data import Tokenizer
from expertmesh.parallel.agreement import Agreement
from expertmesh.routing import Router, Routing
from expertmesh.train.routings import EveryRouting

EXPERT_TOKENS = "expert_tokens.json"
_TOKENS_PER_EXPERT = 12


class ExpertTokens(EveryRouting):
    """A context that counts which tokens each expert of each MoE layer takes.

    Args:
        model: Run inside the context; gives its routers the tokens' ids.
        vocab_size: V.
    """

    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        super().__init__(model)
        self._vocab_size = vocab_size
        self.count_EV: dict[str, Tensor] = {}

    def add_other_ranks(self, ranks: Agreement) -> None:
        """Add what other ranks counted, of these layers and of others; all ranks call it."""
        own, self.count_EV = self.count_EV, {}
        for part in ranks.gather(own):
            for name, count_EV in part.items():
                self.count_EV[name] = self.count_EV.get(name, torch.zeros_like(count_EV)) + count_EV

    def table(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """The content of ``expert_tokens.json``.

        For each layer and expert up to 12 entries ``[text, count, lift]``. Lift is
        ``P(token | expert) / P(token)``, both over the layer's choices. Entries are ordered by
        ``count * ln(lift)``, a token's part in the divergence of the expert's tokens from the
        layer's, so that neither common nor freak tokens lead.
        """
        layers = {
            name: {"experts": _characteristic(count_EV, tokenizer)}
            for name, count_EV in self.count_EV.items()
        }
        return {"layers": layers}

    def _begin(self, name: str, router: Router) -> None:
        shape = (router.num_experts, self._vocab_size)
        self.count_EV[name] = torch.zeros(shape, dtype=torch.int64)

    def _see(self, name: str, ids_T: Tensor, routing: Routing) -> None:
        count_EV = self.count_EV[name]
        num_experts, vocab_size = count_EV.shape
        expert_TK = routing.expert_TK
        cell_TK = expert_TK * vocab_size + ids_T[:, None]
        cells = cell_TK[expert_TK < num_experts].cpu()
        count_EV += torch.bincount(cells, minlength=count_EV.numel()).view_as(count_EV)


def _characteristic(count_EV: Tensor, tokenizer: Tokenizer) -> list[list[list[Any]]]:
    share_V = count_EV.sum(dim=0).double() / count_EV.sum().clamp_min(1)
    experts = []
    for count_V in count_EV:
        lift_V = count_V.double() / count_V.sum().clamp_min(1) / share_V.clamp_min(1e-300)
        weight_V = count_V.double() * lift_V.clamp_min(1e-300).log()
        order = torch.argsort(weight_V, descending=True, stable=True)[:_TOKENS_PER_EXPERT]
        experts.append(
            [
                [tokenizer.token_text(token), int(count_V[token]), round(float(lift_V[token]), 4)]
                for token in order.tolist()
                if weight_V[token] > 0
            ]
        )
    return experts
