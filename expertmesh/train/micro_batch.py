"""A step's batch cut into micro-batches, and of each the part that this rank computes.

A micro-batch belongs to the whole mesh. Data ranks share its rows, context-parallel ranks cut its
sequences into slices, and tensor-parallel ranks cut the slices again outside attention.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expertmesh.data import Batch
from expertmesh.models.context import KeyValueCache
from expertmesh.random import RandomKey

if TYPE_CHECKING:
    from expertmesh.parallel.mesh import Mesh

OwnPart = Callable[[Tensor, int], Tensor]
"""Which positions a rank computes outside attention; see ``DecoderLM.own_part``."""


@dataclass(frozen=True)
class MicroBatch:
    """This rank's part of a slice of a step's batch, on the device.

    Attributes:
        tokens_BS: Input tokens, of the positions whose attention this rank computes.
        targets_BS: What each of this rank's positions should predict; ``IGNORE`` where nothing.
        padding_mask_BS: True at padding, from the sequence's start on; None if there is none.
        token_index_BS: Index, in the step's whole batch, of each of this rank's positions.
        share: The micro-batch's part of the step's tokens that are not padding, on all ranks.
        cache: The slices before this rank's, under context parallel.
        padded_at_end: Whether padding only follows a row's tokens, as the data's does.
    """

    tokens_BS: Tensor
    targets_BS: Tensor
    padding_mask_BS: Tensor | None
    token_index_BS: Tensor
    share: float
    cache: KeyValueCache | None = None
    padded_at_end: bool = False

    def arguments(self, seed: int, step: int) -> dict[str, Any]:
        """What ``DecoderLM.forward`` is given beside the tokens."""
        return {
            **self.padding(),
            "key": RandomKey.of(seed, step, self.token_index_BS),
            "cache": self.cache,
        }

    def padding(self) -> dict[str, Any]:
        """Of that, what says where padding is."""
        return {"padding_mask": self.padding_mask_BS, "padded_at_end": self.padded_at_end}


def micro_batches(
    batch: Batch,
    sequences: int,
    device: torch.device,
    mesh: "Mesh | None" = None,
    own_part: OwnPart | None = None,
) -> Iterator[MicroBatch]:
    """Cut a step's batch into slices of ``sequences`` rows; the last may be smaller.

    Args:
        batch: The whole batch, the same on every rank.
        sequences: Rows of a micro-batch, on the whole mesh.
        device: Where the parts go.
        mesh: This rank's place; None computes all.
        own_part: The model's; None takes every position.
    """
    num_rows, seq_len = batch.tokens_BS.shape
    index_BS = torch.arange(num_rows * seq_len).view(num_rows, seq_len)
    whole = num_tokens(batch)
    for start in range(0, num_rows, sequences):
        rows = batch.rows(start, start + sequences)
        index = index_BS[start : start + sequences]
        share = num_tokens(rows) / whole
        if mesh is None:
            yield _on_device(rows, index, share, device)
        else:
            yield _part_of_rank(rows, index, share, device, mesh, own_part)


def num_tokens(batch: Batch) -> int:
    """Tokens of a batch that are not padding."""
    mask = batch.padding_mask_BS
    return batch.tokens_BS.numel() - (0 if mask is None else int(mask.sum()))


def _part_of_rank(
    rows: Batch,
    index_BS: Tensor,
    share: float,
    device: torch.device,
    mesh: "Mesh",
    own_part: OwnPart | None,
) -> MicroBatch:
    from expertmesh.dispatch.collectives import own_range
    from expertmesh.parallel.context import GatheredSlices

    start, stop = own_range(len(index_BS), mesh.group("dp"))
    part = _on_device(rows.rows(start, stop), index_BS[start:stop], share, device)
    tokens, targets, index = part.tokens_BS, part.targets_BS, part.token_index_BS
    padding, cache = part.padding_mask_BS, None
    if mesh.degree("cp") > 1:
        cache = GatheredSlices(mesh.group("cp"), tokens.shape[1])
        tokens, targets, index = (cache.own_part(t, 1) for t in (tokens, targets, index))
        padding = cache.seen(padding)
    if own_part is not None:
        targets, index = own_part(targets, 1), own_part(index, 1)
    return MicroBatch(tokens, targets, padding, index, share, cache, part.padded_at_end)


def _on_device(rows: Batch, index_BS: Tensor, share: float, device: torch.device) -> MicroBatch:
    mask = rows.padding_mask_BS
    # Attention needs no stored mask where nothing is padding, so such a mask is not given.
    padding = None if mask is None or not bool(mask.any()) else _sent(mask, device)
    return MicroBatch(
        tokens_BS=_sent(rows.tokens_BS, device),
        targets_BS=_sent(rows.targets_BS, device),
        padding_mask_BS=padding,
        token_index_BS=_sent(index_BS, device),
        share=share,
        # Asked on the host, where it costs no synchronisation.
        padded_at_end=mask is not None and bool((mask[:, 1:] >= mask[:, :-1]).all()),
    )


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device; the host does not wait until the device has come so far."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
