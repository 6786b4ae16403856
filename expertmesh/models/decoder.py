"""The decoder-only language model."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertmesh.layer import moe_layers
from expertmesh.models.block import DenseBlock, MoEBlock
from expertmesh.models.checkpointing import run_block, run_block_checkpointed
from expertmesh.models.config import DecoderConfig
from expertmesh.models.context import (
    BlockContext,
    KeyValueCache,
    attention_mask_of,
    positions_of,
)
from expertmesh.models.init import init_weights
from expertmesh.models.norm import RMSNorm
from expertmesh.models.rotary import Rotation
from expertmesh.models.routers import warn_of_leaks
from expertmesh.random import RandomKey
from expertmesh.routing.routing import Routing

OutputLayer = Callable[[Tensor, Tensor], Tensor]
"""What is made of hidden states ``(B, S, D)`` and the output's weight ``(V, D)``."""


class DecoderLM(nn.Module):
    """Token ids in, logits of the next token out.

    The model is laid out without memory and then given values on the default device; inside
    ``with torch.device("meta")`` it stays without, for ``to_empty`` and ``init_weights`` later,
    which lead to the same values.

    Args:
        config: The shape.
        seed: Of the initial values.

    Example:
        >>> model = DecoderLM(decoder_preset("nano"))
        >>> logits = model(torch.randint(258, (2, 16)))
    """

    def __init__(self, config: DecoderConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        device = torch.get_default_device()
        with torch.device("meta"):
            self.embedding = _embedding(config.vocab_size, config.dim)
            self.positions = (
                _embedding(config.max_seq_len, config.dim) if config.position == "learned" else None
            )
            self.blocks = nn.ModuleList(
                MoEBlock(config, index) if config.is_moe(index) else DenseBlock(config, index)
                for index in range(config.num_layers)
            )
            self.norm = RMSNorm(config.dim, config.norm_eps)
            # A tied output has no module of its own: two names of one parameter would part in
            # `to_empty`, and be written twice.
            self.head = (
                None
                if config.tied_embeddings
                else nn.Linear(config.dim, config.vocab_size, bias=False)
            )
        self._run_block = run_block
        # Which positions of the sequence this rank computes outside attention: (tensor, dim) to
        # its part. The parallel layer sets it.
        self.own_part: Callable[[Tensor, int], Tensor] = _whole
        # Ranks of the pipeline that it was cut for; `keep_stages` says so.
        self.pipeline_ranks = 1
        warn_of_leaks(moe.router for moe in moe_layers(self).values())
        if device.type != "meta":
            self.to_empty(device=device)
            self.init_weights(seed)

    def init_weights(self, seed: int) -> None:
        """Give every parameter its initial value, by its name; norms 1, weights N(0, init_std)."""
        init_weights(self, seed, self.config.init_std)

    def checkpoint_blocks(self) -> None:
        """Keep only each block's input and its routing decisions, and recompute in backward."""
        self._run_block = run_block_checkpointed

    def forward(
        self,
        tokens_BS: Tensor,
        *,
        padding_mask: Tensor | None = None,
        padded_at_end: bool = False,
        key: RandomKey | None = None,
        routing: Mapping[int, Routing] | None = None,
        record: dict[int, Routing] | None = None,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
        output: OutputLayer | None = None,
    ) -> Tensor:
        """Logits of the token after each position.

        Under tensor parallel a rank is given whole sequences and answers for the part that
        ``model.own_part(tokens_BS, 1)`` names, which may be empty: the logits, ``key.token_index``
        and routings are of that part alone, and targets are cut alike.

        Args:
            tokens_BS: int64 token ids, ``(B, S)``.
            padding_mask: Bool ``(B, P + S)``, True at padding on either side, where P positions
                are cached; None if there is none. Give None where you can: attention needs no
                stored mask then.
            padded_at_end: Padding only follows a row's tokens, never precedes or parts them: what
                is causal does not see it, so attention needs no stored mask either, and can be
                flash attention. What comes out at padding is then no row's.
            key: Names the random numbers of this step; None draws from torch's generator.
            routing: Recorded decisions to follow, by block index; other blocks decide.
            record: A dict that MoE blocks fill with their decisions, by block index. With
                ``losses="return"`` the balance losses are then in there, and not with the model.
            cache: Holds earlier keys and values and is extended, such as transformers'
                ``DynamicCache``.
            positions: int64 ``(B or 1, S)``. None counts from the first token that is no padding.
            output: Takes the place of the output layer, for example with a loss that never makes
                the logits; its weight is whole while it runs.

        Returns:
            ``(B, S, V)``, or what ``output`` gives.
        """
        hidden_BSD = self.hidden(
            tokens_BS,
            padding_mask=padding_mask,
            padded_at_end=padded_at_end,
            key=key,
            routing=routing,
            record=record,
            cache=cache,
            positions=positions,
        )
        return self.logits(hidden_BSD, output)

    def logits(self, hidden_BSD: Tensor, output: OutputLayer | None = None) -> Tensor:
        """The output layer alone, or what stands for it: ``(..., D)`` to ``(..., V)``."""
        if output is not None:
            return output(hidden_BSD, (self.embedding if self.head is None else self.head).weight)
        if self.head is None:
            return F.linear(hidden_BSD, self.embedding.weight)
        # By the module itself: its weight may be elsewhere until it is called (offloading).
        logits_BSV: Tensor = self.head(hidden_BSD)
        return logits_BSV

    def hidden(
        self,
        tokens_BS: Tensor,
        *,
        padding_mask: Tensor | None = None,
        padded_at_end: bool = False,
        key: RandomKey | None = None,
        routing: Mapping[int, Routing] | None = None,
        record: dict[int, Routing] | None = None,
        cache: KeyValueCache | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The model without its output layer: ``(B, S, D)`` after the last norm.

        The arguments are those of ``forward``.
        """
        return self._run(
            range(self.config.num_layers),
            None,
            tokens_BS,
            padding_mask=padding_mask,
            padded_at_end=padded_at_end,
            key=key,
            routing=routing,
            record=record,
            cache=cache,
            positions=positions,
        )

    def part(
        self,
        blocks: range,
        x_BSD: Tensor | None,
        tokens_BS: Tensor,
        *,
        padding_mask: Tensor | None = None,
        padded_at_end: bool = False,
        key: RandomKey | None = None,
        cache: KeyValueCache | None = None,
        loss_scale: float | None = None,
        output: OutputLayer | None = None,
    ) -> Tensor:
        """Some of the model's blocks, as one stage of a pipeline; ``forward`` cut in pieces.

        Args:
            blocks: Which blocks. Those from 0 on begin with the embedding, and those up to the
                last one end with norm and output layer.
            x_BSD: What the blocks before these gave, ``(B, S, D)``; None for those from 0 on.
            tokens_BS: As in ``forward``, for every stage: routers may look at them.
            padding_mask: As in ``forward``.
            padded_at_end: As in ``forward``.
            key: As in ``forward``.
            cache: As in ``forward``.
            loss_scale: What multiplies the balance losses that this pass attaches, also when it is
                recomputed after others; None leaves what ``set_loss_scale`` set last.
            output: As in ``forward``; called on the last block's stage.

        Returns:
            ``(B, S, D)``, or logits ``(B, S, V)``, or what ``output`` gives, from the last block's
            stage.
        """
        y = self._run(
            blocks,
            x_BSD,
            tokens_BS,
            padding_mask=padding_mask,
            padded_at_end=padded_at_end,
            key=key,
            cache=cache,
            loss_scale=loss_scale,
        )
        return self.logits(y, output) if blocks.stop == self.config.num_layers else y

    def _run(
        self,
        blocks: range,
        x_BSD: Tensor | None,
        tokens_BS: Tensor,
        *,
        padding_mask: Tensor | None,
        padded_at_end: bool,
        key: RandomKey | None,
        cache: KeyValueCache | None,
        routing: Mapping[int, Routing] | None = None,
        record: dict[int, Routing] | None = None,
        positions: Tensor | None = None,
        loss_scale: float | None = None,
    ) -> Tensor:
        past = 0 if cache is None else cache.get_seq_length()
        self._check(tokens_BS, padding_mask, past)
        if positions is None:
            positions = positions_of(padding_mask, past, tokens_BS)
        own_tokens_BS = self.own_part(tokens_BS, 1)
        if x_BSD is None:
            x_BSD = self._embed(own_tokens_BS, self.own_part(positions, 1))
        context = BlockContext(
            seq_len=tokens_BS.shape[1],
            tokens_BS=own_tokens_BS,
            padding_mask_BS=(
                None if padding_mask is None else self.own_part(padding_mask[:, past:], 1)
            ),
            attention_mask=attention_mask_of(
                None if padded_at_end else padding_mask, past, tokens_BS
            ),
            rotation=self._rotation(positions, x_BSD.dtype),
            key=key,
            cache=cache,
            replay={} if routing is None else routing,
            record=record,
            loss_scale=loss_scale,
        )
        for index in blocks:
            x_BSD = self._run_block(getattr(self.blocks, str(index)), x_BSD, context)
        return self.norm(x_BSD) if blocks.stop == self.config.num_layers else x_BSD

    def _embed(self, tokens_BS: Tensor, positions: Tensor) -> Tensor:
        x_BSD = self.embedding(tokens_BS)
        return x_BSD if self.positions is None else x_BSD + self.positions(positions)

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation | None:
        if self.config.position != "rotary":
            return None
        width = self.config.qk_rope_head_dim or self.config.head_width
        return Rotation.of(positions, width, self.config.rope_theta, dtype)

    def _check(self, tokens_BS: Tensor, padding_mask: Tensor | None, past: int) -> None:
        if tokens_BS.dim() != 2:
            raise ValueError(f"tokens must have shape (B, S), got {tuple(tokens_BS.shape)}")
        batch, new = tokens_BS.shape
        if padding_mask is not None and padding_mask.shape != (batch, past + new):
            raise ValueError(
                f"padding_mask must have shape (B, P + S)=({batch}, {past + new}), "
                f"got {tuple(padding_mask.shape)}; it covers cached positions too"
            )
        if padding_mask is not None and padding_mask.dtype != torch.bool:
            raise ValueError(
                f"padding_mask must be bool, True at padding, got {padding_mask.dtype}; "
                "set padding_mask = attention_mask == 0"
            )
        if self.positions is not None and past + new > self.config.max_seq_len:
            raise ValueError(
                f"the sequence must be at most max_seq_len={self.config.max_seq_len} long with "
                f"learned positions, got {past + new}; set max_seq_len, or position='rotary'"
            )


def _embedding(num: int, dim: int) -> nn.Embedding:
    """Without torch's own initial values, for which the meta device imports the compiler."""
    return nn.Embedding.from_pretrained(torch.empty(num, dim), freeze=False)


def _whole(x: Tensor, _: int) -> Tensor:
    """One rank computes every position."""
    return x
