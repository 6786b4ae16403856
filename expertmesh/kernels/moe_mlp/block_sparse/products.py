"""Launches of the block-sparse products: sparse (S) and dense (D), the result named first.

A sparse operand is a stack of M matrices with one topology, so that gate and linear half are one
launch. Dense operands may have any strides, which is how they are transposed; the sparse one is
transposed by its secondary index. A dense operand along hidden units is a stack of slabs
``(M, S, U, D)``, whose units the topology's columns name: stacked experts need no copy.

What pads a block's rows or columns may hold anything and counts as zero.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from expertmesh.kernels.blocks import ceil_div, power_of_2
from expertmesh.kernels.moe_mlp.block_sparse.kernels import (
    dsd_kernel,
    dsd_transposed_kernel,
    row_dots_kernel,
    sdd_kernel,
)
from expertmesh.kernels.moe_mlp.block_sparse.topology import Topology
from expertmesh.kernels.triton_support import capability, on_its_device


class _Tile(NamedTuple):
    columns: int
    depth: int
    warps: int
    stages: int


def _tile(like: Tensor, block: int) -> _Tile:
    """Sizes whose stages fit the shared memory; 227 KiB on Hopper, 99 KiB on the least of others.

    Float32 operands are twice as large and are multiplied three times.
    """
    hopper = like.device.type == "cuda" and capability(like.device) >= (9, 0)
    if hopper and like.itemsize == 2:
        return _Tile(columns=256, depth=min(64, block), warps=8, stages=4)
    return _Tile(columns=128, depth=min(32, block), warps=8, stages=2 if like.itemsize > 2 else 4)


@on_its_device
def sdd(left_PD: Tensor, right_MSUD: Tensor, topology: Topology) -> Tensor:
    """``left right_m^T`` where the sparse matrices have blocks.

    Args:
        left_PD: Rows, ``(P, D)``.
        right_MSUD: Hidden units' weights, ``(M, S, U, D)``.
        topology: The result's.

    Returns:
        Values ``(M, Z, B, B)``; blocks in use by none are not written.
    """
    matrices, block, columns = len(right_MSUD), topology.block, topology.columns
    size = len(topology.row_Z)
    values_MZBB = left_PD.new_empty(matrices, size, block, block)
    if size > 0:
        tile = _tile(left_PD, block)
        sdd_kernel[(size * matrices,)](
            left_PD,
            right_MSUD,
            values_MZBB,
            topology.row_offset_I1[-1:],
            topology.walk_Z,
            topology.row_Z,
            topology.unit_Z3,
            *left_PD.stride(),
            *right_MSUD.stride(),
            values_MZBB.stride(0),
            left_PD.shape[1],
            matrices,
            columns.whole,
            columns.align,
            block,
            tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return values_MZBB


@on_its_device
def dsd(values_MZBB: Tensor, right_MSUD: Tensor, topology: Topology) -> Tensor:
    """``sum_m A_m right_m``.

    Args:
        values_MZBB: The sparse matrices, ``(M, Z, B, B)``; the last dim contiguous.
        right_MSUD: ``(M, S, U, D)``.
        topology: Of the sparse matrices.

    Returns:
        ``(P, D)``; zero where a block in use has no real row. Unused blocks are not written.
    """
    block, columns, dim = topology.block, topology.columns, right_MSUD.shape[3]
    num_rows = len(topology.count_I)
    out_PD = right_MSUD.new_empty(num_rows * block, dim)
    tile = _tile(right_MSUD, block)
    width = _width(tile, dim)
    if out_PD.numel() > 0:
        dsd_kernel[(num_rows * ceil_div(dim, width),)](
            values_MZBB,
            right_MSUD,
            out_PD,
            topology.row_offset_I1,
            topology.unit_Z3,
            topology.count_I,
            *values_MZBB.stride()[:3],
            *right_MSUD.stride(),
            *out_PD.stride(),
            dim,
            len(values_MZBB),
            columns.whole,
            columns.align,
            block,
            width,
            tile.depth,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out_PD


@on_its_device
def dsd_transposed(
    values_MZBB: Tensor, right_PD: Tensor, out_MSUD: Tensor, topology: Topology
) -> Tensor:
    """``A_m^T right``.

    Args:
        values_MZBB: The sparse matrices; the last dim contiguous.
        right_PD: ``(P, D)``.
        out_MSUD: Written: every unit that the topology's columns name.
        topology: Of the sparse matrices.

    Returns:
        ``out_MSUD``.
    """
    block, columns, dim = topology.block, topology.columns, right_PD.shape[1]
    tile = _tile(right_PD, block)
    width, matrices = _width(tile, dim), len(values_MZBB)
    dsd_transposed_kernel[(len(columns.slab_C) * matrices * ceil_div(dim, width),)](
        values_MZBB,
        right_PD,
        out_MSUD,
        topology.column_offset_C1,
        topology.transposed_Z3,
        *columns[:3],
        *values_MZBB.stride()[:3],
        *right_PD.stride(),
        *out_MSUD.stride(),
        dim,
        matrices,
        columns.align,
        block,
        width,
        tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out_MSUD


def dds(left_DP: Tensor, values_MZBB: Tensor, out_MSDU: Tensor, topology: Topology) -> Tensor:
    """``left A_m``: the transpose of ``A_m^T left^T``, into ``out_MSDU``, which it returns."""
    dsd_transposed(values_MZBB, left_DP.mT, out_MSDU.mT, topology)
    return out_MSDU


def dds_transposed(left_MSDU: Tensor, values_MZBB: Tensor, topology: Topology) -> Tensor:
    """``sum_m left_m A_m^T``, ``(D, P)``: the transpose of ``sum_m A_m left_m^T``.

    No pass of the MLP asks for it; it completes the products of the formulation.
    """
    return dsd(values_MZBB, left_MSDU.mT, topology).mT


@on_its_device
def row_dots(a_ZBB: Tensor, b_ZBB: Tensor, topology: Topology) -> Tensor:
    """The dot products of the rows of two matrices of one topology, both contiguous.

    Returns:
        float32 ``(P,)``. Padding rows may hold anything.
    """
    block, num_rows = topology.block, len(topology.count_I)
    out_P = torch.empty(num_rows * block, dtype=torch.float32, device=a_ZBB.device)
    if num_rows > 0:
        row_dots_kernel[(num_rows,)](
            a_ZBB,
            b_ZBB,
            out_P,
            topology.row_offset_I1,
            topology.unit_Z3,
            block,
            min(block, 32),
            num_warps=4,
        )
    return out_P


def _width(tile: _Tile, dim: int) -> int:
    return min(tile.columns, max(16, power_of_2(dim)))
