"""Context parallel: each rank computes a contiguous slice of every sequence.

To attention, a slice looks like the new positions of a decoder whose cache holds those before
them. So the slices are given to the model as its cache, and positions, masks and rotations follow.

torch's own context parallel replaces CUDA kernels only: on a CPU its patched attention raises
``NotImplementedError``, and it covers neither padding nor uneven slices, so it is not used here.
"""

import torch
from torch import Tensor

from expertmesh.dispatch.collectives import Group, all_gather, own_range, split_sizes
from expertmesh.errors import UserError


class GatheredSlices:
    """The keys and values of all slices of a sequence, given to a model as its cache.

    Every layer gathers keys and values over the group, so a rank holds one layer's for the whole
    sequence at a time; queries and everything else stay sliced. Later slices attend to more than
    earlier ones. Nothing is stored between layers: activation checkpointing may repeat a layer, as
    all ranks repeat it together.

    Args:
        group: The ranks of ``cp``, in the order of the slices.
        seq_len: Length of the whole sequence; slices are as equal as can be, and empty ones
            where it is shorter than the group.

    Example:
        >>> slices = GatheredSlices(mesh.group("cp"), tokens_BS.shape[1])
        >>> logits = model(
        ...     slices.own_part(tokens_BS, 1), padding_mask=slices.seen(mask_BS), cache=slices
        ... )
    """

    def __init__(self, group: Group, seq_len: int) -> None:
        self.group = group
        self.sizes = split_sizes(seq_len, group.size)
        self.start, self.end = own_range(seq_len, group)

    def own_part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's slice of a tensor that has the whole sequence along ``dim``."""
        return x.narrow(dim, self.start, self.end - self.start)

    def seen(self, padding_mask_BS: Tensor | None) -> Tensor | None:
        """The padding mask that the model wants: up to the end of this rank's slice."""
        return None if padding_mask_BS is None else padding_mask_BS[:, : self.end]

    def get_seq_length(self) -> int:
        """Number of positions before this rank's slice."""
        return self.start

    def update(self, key: Tensor, value: Tensor, layer: int, /) -> tuple[Tensor, Tensor]:
        """Keys and values of all positions up to the end of this rank's slice.

        Args:
            key: This slice's, ``(B, H, s, A)``.
            value: This slice's, ``(B, H, s, V)``.
            layer: Not used; no layer's are kept.

        Returns:
            ``(B, H, P + s, A)`` and ``(B, H, P + s, V)``; gradients return to the slices.

        Raises:
            UserError: If the model was given something else than this rank's slice.
        """
        if key.shape[-2] != self.end - self.start:
            raise UserError(
                f"tokens must be this rank's slice of {self.end - self.start} positions, got "
                f"{key.shape[-2]}; pass own_part(tokens_BS, 1)"
            )
        # One collective for both.
        both = all_gather(torch.cat([key, value], dim=-1), self.group, -2, sizes=self.sizes)
        key, value = both.narrow(-2, 0, self.end).split([key.shape[-1], value.shape[-1]], dim=-1)
        return key, value
