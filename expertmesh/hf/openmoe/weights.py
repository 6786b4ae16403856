"""Published tensors for transformers' loader and writer, made of the one table of names."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.modeling_utils import load_state_dict

from expertmesh.convert.check import check_tensors
from expertmesh.convert.layout import Layout, Piece
from expertmesh.parallel.checkpoint.box import Box

PREFIX = "model."
"""What the decoder's names begin with inside the transformers model."""


class Regroup(ConversionOps):
    """Some file tensors into the parameters that they hold, or back.

    Args:
        layout: Of these tensors alone.
        to_files: Which way.
    """

    def __init__(self, layout: Layout, *, to_files: bool) -> None:
        self.layout = layout
        self.to_files = to_files

    @property
    def reverse_op(self) -> ConversionOps:
        """The other way."""
        return Regroup(self.layout, to_files=not self.to_files)

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Called by transformers with all tensors of one group.

        Args:
            input_dict: Each source's tensor, in a list.
            source_patterns: The sources' names, in the layout's order.
            target_patterns: The targets' names, likewise.
            kwargs: Not needed.
        """
        sources = [input_dict.pop(pattern) for pattern in source_patterns]
        tensors = [source[0] if isinstance(source, list) else source for source in sources]
        made = self._to_files(tensors) if self.to_files else self._from_files(tensors)
        return dict(zip(target_patterns, made, strict=True))

    def _from_files(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        source = dict(zip(self.layout.of_theirs, tensors, strict=True))
        made = []
        for name, pieces in self.layout.of_ours.items():
            shape = self.layout.our_shapes[name]
            whole = tensors[0].new_empty(shape)
            for piece in pieces:
                values = source[piece.theirs][_slices(piece.their_box, source[piece.theirs])]
                whole[_slices(piece.box, whole)] = piece.as_ours(values, piece.box)
            made.append(whole)
        return made

    def _to_files(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        source = dict(zip(self.layout.of_ours, tensors, strict=True))
        made = []
        for name, pieces in self.layout.of_theirs.items():
            whole = tensors[0].new_empty(self.layout.their_shapes[name])
            for piece in pieces:
                values = source[piece.ours][_slices(piece.box, source[piece.ours])]
                whole[_slices(piece.their_box, whole)] = piece.as_theirs(values)
            made.append(whole)
        return made


def conversions(layout: Layout) -> list[WeightRenaming | WeightConverter]:
    """What turns the published tensors of a model into its parameters, and reversed writes them."""
    return [_conversion(Layout(pieces)) for pieces in _groups(layout.pieces)]


def check_checkpoint(
    layout: Layout, files: Iterable[str] | None, state: dict[str, Tensor] | None, where: str
) -> None:
    """Refuse a checkpoint that is not this model's, before anything is loaded.

    Args:
        layout: Of the model.
        files: Of the checkpoint; only their headers are read where they are safetensors.
        state: Tensors in place of files.
        where: Their origin, for the message.

    Raises:
        UserError: Naming every tensor that is missing, unexpected or misshapen.
    """
    if state is None:
        state = {}
        for file in files or ():
            state |= load_state_dict(file, map_location="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    hint = ""
    if any(name.endswith("mlp.experts.0.gate_proj.weight") for name in shapes):
        hint = "; its experts are single tensors: `expertmesh convert openmoe` stacks them"
    check_tensors(layout, shapes, str(Path(where)) if where else "the checkpoint", hint=hint)


def _groups(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces that share a parameter or a file tensor belong together."""
    group_of: dict[tuple[str, str], list[Piece]] = {}
    groups: list[list[Piece]] = []
    for piece in pieces:
        keys = ("ours", piece.ours), ("theirs", piece.theirs)
        group = next((group_of[key] for key in keys if key in group_of), None)
        if group is None:
            group = []
            groups.append(group)
        group.append(piece)
        for key in keys:
            group_of[key] = group
    return groups


def _conversion(group: Layout) -> WeightRenaming | WeightConverter:
    theirs = [_pattern(name) for name in group.of_theirs]
    ours = [_pattern(PREFIX + name) for name in group.of_ours]
    if len(group.pieces) == 1 and group.pieces[0].dims == tuple(range(len(group.pieces[0].dims))):
        return WeightRenaming(theirs, ours)
    return WeightConverter(theirs, ours, [Regroup(group, to_files=False)])


def _pattern(name: str) -> str:
    """A whole name for transformers, which reads them as regular expressions."""
    return "^" + name.replace(".", r"\.")


def _slices(box: Box, tensor: Tensor) -> tuple[slice, ...]:
    return box.within(Box.whole(tuple(tensor.shape)))
