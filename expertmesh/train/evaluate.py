"""Held-out loss, and which tokens each expert takes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from expertmesh.data import Batch, Dataset, Tokenizer, in_order
from expertmesh.data.loader import collate
from expertmesh.errors import UserError
from expertmesh.layer import moe_layers
from expertmesh.parallel.agreement import Agreement
from expertmesh.routing import Routing
from expertmesh.train.passes import Passes

_TOKENS_PER_EXPERT = 12


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of held-out text.

    Attributes:
        nats: Sum of the token losses.
        num_targets: Tokens predicted.
        num_bytes: Bytes of text among them; None where tokens are not bytes.
    """

    nats: float
    num_targets: int
    num_bytes: int | None

    @property
    def loss(self) -> float:
        """Mean loss of a token, nats."""
        return self.nats / self.num_targets

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that overflows."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits needed for a byte of text; None where tokens are not bytes."""
        return self.nats / math.log(2.0) / self.num_bytes if self.num_bytes else None


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates on samples spread evenly over a held-out split, the same ones each time.

    Attributes:
        dataset: The held-out samples.
        batch: Sequences of a batch.
        batches: Batches to read; None reads them all.
        tokenizer: Says which tokens are bytes.
    """

    dataset: Dataset
    batch: int
    batches: int | None
    tokenizer: Tokenizer

    def __call__(self, passes: Passes) -> Evaluation:
        """Mean loss over the target tokens; the model's mode is as before afterwards.

        Args:
            passes: How the model runs over a batch; on a mesh all ranks call together.

        Raises:
            UserError: If there is nothing to predict.
        """
        model = passes.model
        training = model.training
        model.eval()
        try:
            nats, num_targets, num_bytes = 0.0, 0, 0
            for batch in self._batches():
                nats += passes.nats(batch)
                num_targets += batch.num_targets
                num_bytes += int(((batch.targets_BS >= 0) & (batch.targets_BS < 256)).sum())
        finally:
            model.train(training)
        if num_targets == 0:
            raise UserError("the held-out split has no token to predict; give it more text")
        is_bytes = self.tokenizer.identity == "byte"
        return Evaluation(nats, num_targets, num_bytes if is_bytes else None)

    def _batches(self) -> Iterator[Batch]:
        if self.batches is None:
            yield from in_order(self.dataset, self.batch)
            return
        num_samples = min(len(self.dataset), self.batches * self.batch)
        # Spread, not the first ones: those may all be of one document.
        chosen = [i * len(self.dataset) // num_samples for i in range(num_samples)]
        for start in range(0, num_samples, self.batch):
            yield collate(self.dataset, chosen[start : start + self.batch])


class ExpertTokens:
    """A context that counts which tokens each expert of each MoE layer takes.

    Args:
        model: Run inside the context; gives its routers the tokens' ids.
        vocab_size: V.
    """

    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        self._model = model
        self._vocab_size = vocab_size
        self._hooks: list[Any] = []
        self.count_EV: dict[str, Tensor] = {}

    def __enter__(self) -> "ExpertTokens":
        for name, moe in moe_layers(self._model).items():
            shape = (moe.router.num_experts, self._vocab_size)
            self.count_EV[name] = torch.zeros(shape, dtype=torch.int64)
            hook = moe.router.register_forward_hook(self._counter(name), with_kwargs=True)
            self._hooks.append(hook)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for hook in self._hooks:
            hook.remove()

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

    def _counter(self, name: str) -> Any:
        def count(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], routing: Routing
        ) -> None:
            count_EV = self.count_EV[name]
            num_experts, vocab_size = count_EV.shape
            expert_TK = routing.expert_TK
            cell_TK = expert_TK * vocab_size + kwargs["token_ids"][:, None]
            cells = cell_TK[expert_TK < num_experts].cpu()
            count_EV += torch.bincount(cells, minlength=count_EV.numel()).view_as(count_EV)

        return count


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
