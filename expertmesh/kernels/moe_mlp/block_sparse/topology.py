"""Which blocks of a sparse matrix are there: rows of tokens by hidden units of all experts.

A block of rows belongs to one expert and has that expert's hidden units alone, so the matrix is
block-diagonal with blocks of unequal height and, where experts differ in width, unequal width.
Values are stored block by block in row order (blocked compressed rows), with the coordinates of
every block beside them (for products whose result is sparse) and, as a secondary index, the
blocks' numbers in column order (for products with the transpose, which moves no values).
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from expertmesh.kernels.moe_mlp.block_sparse.rows import PaddedRows

BLOCK = 128
"""Rows and columns of a block: one tile of a matrix product on GPUs (MegaBlocks, section 5.1)."""
_GROUP = 8  # blocks of rows that sweep the columns together


class Columns(NamedTuple):
    """The columns: C blocks of hidden units, each inside one expert.

    Dense operands keep their units in a stack of S slabs; a block is ``width`` units of one slab.
    Blocks at an expert's end may be narrower than the others.

    Attributes:
        slab_C: Slab of each block, int32.
        first_C: First unit of each block within its slab, int32.
        width_C: Units of each block, int32.
        start_E1: First block of each expert, then C, int64.
        block: Width of a full block.
        whole: Whether every block is full.
        align: 16 where every block's first unit and width are multiples of 16, else 1.
        each: Blocks of every expert; None where experts differ.
    """

    slab_C: Tensor
    first_C: Tensor
    width_C: Tensor
    start_E1: Tensor
    block: int
    whole: bool
    align: int
    each: int | None


def stacked_columns(num_experts: int, hidden: int, block: int, device: torch.device) -> Columns:
    """Experts of one width, one slab each: a stack ``(E, F, D)``."""
    each = -(-hidden // block)
    index_C = torch.arange(num_experts * each, device=device, dtype=torch.int32)
    first_C = index_C % each * block
    return Columns(
        slab_C=index_C // each,
        first_C=first_C,
        width_C=(hidden - first_C).clamp_(max=block),
        start_E1=torch.arange(num_experts + 1, device=device) * each,
        block=block,
        whole=hidden % block == 0,
        align=_align([hidden]),
        each=each,
    )


def joined_columns(widths: Sequence[int], block: int, device: torch.device) -> Columns:
    """Experts of any width, one behind the other in one slab: ``(1, sum of widths, D)``."""
    firsts, sizes, starts, before = [], [], [0], 0
    for hidden in widths:
        for first in range(0, hidden, block):
            firsts.append(before + first)
            sizes.append(min(block, hidden - first))
        before += hidden
        starts.append(len(firsts))
    blocks = {stop - start for start, stop in pairwise(starts)}
    first_C = torch.tensor(firsts, device=device, dtype=torch.int32)
    return Columns(
        slab_C=torch.zeros_like(first_C),
        first_C=first_C,
        width_C=torch.tensor(sizes, device=device, dtype=torch.int32),
        start_E1=torch.tensor(starts, device=device),
        block=block,
        whole=all(size == block for size in sizes),
        align=_align(widths),
        each=blocks.pop() if len(blocks) == 1 else None,
    )


def _align(widths: Sequence[int]) -> int:
    return 16 if all(hidden % 16 == 0 for hidden in widths) else 1


class Topology(NamedTuple):
    """Places of the blocks; Z of them, of which the first ``row_offset_I1[-1]`` are in use.

    What kernels read for each block stands in the order in which they read it: loads that wait for
    one look-up stay asynchronous, those that wait for two or three do not.

    Attributes:
        row_offset_I1: Where each block row's blocks begin, then their number, int32.
        row_Z: Block row of each block, int32.
        column_Z: Block column of each block, int32.
        unit_Z3: Slab, first unit and width of each block, int32.
        column_offset_C1: Where each block column begins in ``transposed_Z3``, int32.
        transposed_Z3: Blocks in column order, each with its block row and the real rows of that,
            int32; those in use by none last.
        walk_Z: Blocks in an order in which neighbours share operands, int32.
        count_I: Rows of each block row that are real, int32.
        columns: The columns.
    """

    row_offset_I1: Tensor
    row_Z: Tensor
    column_Z: Tensor
    unit_Z3: Tensor
    column_offset_C1: Tensor
    transposed_Z3: Tensor
    walk_Z: Tensor
    count_I: Tensor
    columns: Columns

    @property
    def block(self) -> int:
        """Rows and columns of a block, B."""
        return self.columns.block


def make_topology(rows: PaddedRows, columns: Columns) -> Topology:
    """Every block row gets all blocks of its expert.

    With experts of one width nothing is read on the host: Z is a bound. With unequal widths a
    bound would take every row for the widest expert's, so the number of blocks is read once.

    Args:
        rows: The rows by expert.
        columns: Their experts' hidden units.
    """
    blocks_E = torch.diff(columns.start_E1)
    blocks_I = blocks_E[rows.expert_I].masked_fill_(rows.count_I == 0, 0)
    stop_I = blocks_I.cumsum(0)
    row_offset_I1 = torch.cat([stop_I.new_zeros(1), stop_I])
    num_rows, num_columns = len(stop_I), len(columns.slab_C)
    used = row_offset_I1[-1]
    size = int(used) if columns.each is None else columns.each * num_rows

    index_Z = torch.arange(size, device=stop_I.device)
    row_Z = torch.searchsorted(stop_I, index_Z, right=True).clamp_(max=num_rows - 1)
    column_Z = columns.start_E1[rows.expert_I[row_Z]] + index_Z - row_offset_I1[row_Z]
    column_Z = column_Z.masked_fill_(index_Z >= used, num_columns)
    sorted_Z, transposed_Z = torch.sort(column_Z, stable=True)
    column_C1 = torch.arange(num_columns + 1, device=stop_I.device)
    walk_key_Z = row_Z // _GROUP * num_columns + column_Z
    walk_Z = walk_key_Z.masked_fill_(index_Z >= used, num_rows * num_columns).argsort(stable=True)
    column_Z = column_Z.clamp_(max=num_columns - 1)
    unit_C3 = torch.stack([columns.slab_C, columns.first_C, columns.width_C], dim=1)
    below_Z = row_Z[transposed_Z]
    transposed_Z3 = torch.stack([transposed_Z, below_Z, rows.count_I[below_Z]], dim=1)
    return Topology(
        row_offset_I1=row_offset_I1.int(),
        row_Z=row_Z.int(),
        column_Z=column_Z.int(),
        unit_Z3=unit_C3[column_Z],
        column_offset_C1=torch.searchsorted(sorted_Z, column_C1, out_int32=True),
        transposed_Z3=transposed_Z3.int(),
        walk_Z=walk_Z.int(),
        count_I=rows.count_I,
        columns=columns,
    )
