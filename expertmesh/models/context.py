"""What every block of one forward pass is told."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from expertmesh.models.rotary import Rotation
from expertmesh.random import RandomKey
from expertmesh.routing.routing import Routing


class KeyValueCache(Protocol):
    """What a cache must do. transformers' ``DynamicCache`` does."""

    def update(self, key: Tensor, value: Tensor, layer: int, /) -> tuple[Tensor, Tensor]:
        """Append along the last-but-one dim; returns all keys and all values so far."""

    def get_seq_length(self) -> int:
        """How many positions are held."""


@dataclass(frozen=True)
class BlockContext:
    """What the blocks share in one forward pass. P positions are cached, S are new.

    Under tensor parallel, what ends in ``_BS`` is this rank's part of the new positions; mask and
    rotation are those of all S, which attention sees together.
    """

    seq_len: int
    """S, the number of new positions that attention sees together."""

    tokens_BS: Tensor
    """Token ids of the new positions."""

    padding_mask_BS: Tensor | None
    """True where a new position is padding."""

    attention_mask: Tensor | None
    """``(B or 1, 1, S, P + S)``, True where a query may look; None where causality says it all."""

    rotation: Rotation | None
    """The positions' angles, if the model uses rotary positions."""

    key: RandomKey | None
    """Names the random numbers of this step."""

    cache: KeyValueCache | None
    """Earlier keys and values."""

    replay: Mapping[int, Routing]
    """Recorded decisions to follow, by block index."""

    record: dict[int, Routing] | None
    """Where MoE blocks write what they decided, by block index, if anyone asks."""

    loss_scale: float | None = None
    """What multiplies the balance losses of this pass; None leaves what each layer holds."""

    def to(self, device: torch.device | str | int, *, non_blocking: bool = False) -> "BlockContext":
        """The same context for a block on another device.

        accelerate calls this on whatever a module is given. The cache keeps each layer's keys and
        values where that layer is, and recorded decisions stay where they were made.
        """

        def moved(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        padding, mask = self.padding_mask_BS, self.attention_mask
        angles, key = self.rotation, self.key
        return replace(
            self,
            tokens_BS=moved(self.tokens_BS),
            padding_mask_BS=None if padding is None else moved(padding),
            attention_mask=None if mask is None else moved(mask),
            rotation=None if angles is None else Rotation(moved(angles.cos), moved(angles.sin)),
            key=None if key is None else RandomKey(moved(key.seed), moved(key.token_index)),
        )


def positions_of(padding_mask: Tensor | None, past: int, tokens_BS: Tensor) -> Tensor:
    """Positions of the new tokens, counted without padding.

    Args:
        padding_mask: ``(B, P + S)``, True at padding, or None.
        past: P, the number of cached positions.
        tokens_BS: ``(B, S)``.

    Returns:
        int64, ``(B, S)``, or ``(1, S)`` where all rows agree.
    """
    new = tokens_BS.shape[1]
    if padding_mask is None:
        return torch.arange(past, past + new, device=tokens_BS.device)[None]
    counted = (~padding_mask).long().cumsum(-1) - 1
    return counted[:, past:].clamp(min=0)


def attention_mask_of(padding_mask: Tensor | None, past: int, tokens_BS: Tensor) -> Tensor | None:
    """The mask that scaled dot product attention needs, or None if causality alone suffices.

    A query always sees its own position, so a row that is all padding stays finite.

    Args:
        padding_mask: ``(B, P + S)``, True at padding, or None.
        past: P, the number of cached positions.
        tokens_BS: ``(B, S)``.

    Returns:
        Bool ``(B or 1, 1, S, P + S)``, True where a query may look; or None.
    """
    new = tokens_BS.shape[1]
    if padding_mask is None and (past == 0 or new == 1):
        return None
    query = torch.arange(past, past + new, device=tokens_BS.device)[:, None]
    key = torch.arange(past + new, device=tokens_BS.device)[None, :]
    if padding_mask is None:
        return (key <= query)[None, None]
    return ((key <= query) & ~padding_mask[:, None, None, :]) | (key == query)
