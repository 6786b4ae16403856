"""A model that uses one MoE layer at several depths, as WideNet does (arXiv 2107.11817)."""

from torch import Tensor, nn

from expertmesh.experts import MLPExperts
from expertmesh.layer import MoE
from expertmesh.models.decoder import OutputLayer
from expertmesh.models.init import init_weights
from expertmesh.models.norm import RMSNorm
from expertmesh.random import RandomKey
from expertmesh.routing import TopKRouter


class WideNet(nn.Module):
    """Embeds tokens, passes them through the same experts ``depth`` times, predicts the next.

    Each depth has its own norm, as in the paper; there is no attention.

    Args:
        vocab_size: V.
        dim: D.
        num_experts: E.
        depth: Uses of the layer.
        seed: Of the initial values.
    """

    def __init__(
        self, vocab_size: int, dim: int, num_experts: int, depth: int = 3, seed: int = 0
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.norms = nn.ModuleList(RMSNorm(dim, 1e-6) for _ in range(depth))
        self.moe = MoE(
            TopKRouter(dim, num_experts, 2, init_std=0.5, seed=0),
            MLPExperts(dim, 8, num_experts, bias=True, init_std=0.3, seed=0),
        )
        self.head = nn.Linear(dim, vocab_size, bias=False)
        if not self.head.weight.is_meta:
            self.init_weights(seed)

    def init_weights(self, seed: int) -> None:
        """Values by name, as the decoder draws them."""
        init_weights(self, seed, 0.3)

    def forward(
        self,
        tokens_BS: Tensor,
        *,
        padding_mask: Tensor | None = None,
        padded_at_end: bool = False,
        key: RandomKey | None = None,
        cache: None = None,
        output: OutputLayer | None = None,
    ) -> Tensor:
        """Args: ``(B, S)`` token ids; no cache, for there is no attention. Returns: logits."""
        x_BSD = self.embedding(tokens_BS)
        for norm in self.norms:
            x_BSD = x_BSD + self.moe(norm(x_BSD), padding_mask=padding_mask, key=key)
        return self.logits(x_BSD, output)

    def logits(self, x_BSD: Tensor, output: OutputLayer | None = None) -> Tensor:
        """The output layer alone, or what stands for it."""
        return self.head(x_BSD) if output is None else output(x_BSD, self.head.weight)
