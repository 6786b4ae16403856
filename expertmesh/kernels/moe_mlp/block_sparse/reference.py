"""The products by their definition: the sparse matrix as a dense one, with zeros between blocks.

Operands are those of ``products``; every product there is tested against the one here in float64.
"""

import torch
from torch import Tensor

from expertmesh.kernels.moe_mlp.block_sparse.topology import Columns, Topology


def to_dense(values_MZBB: Tensor, topology: Topology) -> Tensor:
    """The matrices with their zeros: ``(M, P, H)``, H the units of all columns in their order.

    What pads a block is zero, whatever is stored there.
    """
    offset_C = _offsets(topology.columns)
    block, num_rows = topology.block, len(topology.count_I)
    dense_MPH = values_MZBB.new_zeros(len(values_MZBB), num_rows * block, _units(topology.columns))
    for z in range(int(topology.row_offset_I1[-1])):
        row, column = int(topology.row_Z[z]), int(topology.column_Z[z])
        height, width = int(topology.count_I[row]), int(topology.columns.width_C[column])
        rows = slice(row * block, row * block + height)
        units = slice(offset_C[column], offset_C[column] + width)
        dense_MPH[:, rows, units] = values_MZBB[:, z, :height, :width]
    return dense_MPH


def to_blocks(dense_MPH: Tensor, topology: Topology) -> Tensor:
    """What a dense matrix holds at the blocks, ``(M, Z, B, B)``; zeros where nothing is real."""
    offset_C = _offsets(topology.columns)
    block, size = topology.block, len(topology.row_Z)
    values_MZBB = dense_MPH.new_zeros(len(dense_MPH), size, block, block)
    for z in range(int(topology.row_offset_I1[-1])):
        row, column = int(topology.row_Z[z]), int(topology.column_Z[z])
        height, width = int(topology.count_I[row]), int(topology.columns.width_C[column])
        part_M = dense_MPH[:, row * block :, offset_C[column] :][:, :height, :width]
        values_MZBB[:, z, :height, :width] = part_M
    return values_MZBB


def sdd(left_PD: Tensor, right_MSUD: Tensor, topology: Topology) -> Tensor:
    """``left right^T`` where the sparse matrix has blocks, as blocks."""
    dense_MPH = left_PD @ _joined(right_MSUD, topology.columns).mT
    return to_blocks(dense_MPH, topology)


def dsd(values_MZBB: Tensor, right_MSUD: Tensor, topology: Topology) -> Tensor:
    """``sum_m A_m right_m``, ``(P, D)``."""
    return (to_dense(values_MZBB, topology) @ _joined(right_MSUD, topology.columns)).sum(0)


def dsd_transposed(values_MZBB: Tensor, right_PD: Tensor, topology: Topology) -> Tensor:
    """``A_m^T right``, ``(M, H, D)``."""
    return to_dense(values_MZBB, topology).mT @ _real(right_PD, topology)


def dds(left_DP: Tensor, values_MZBB: Tensor, topology: Topology) -> Tensor:
    """``left A_m``, ``(M, D, H)``."""
    return _real(left_DP.mT, topology).mT @ to_dense(values_MZBB, topology)


def dds_transposed(left_MSDU: Tensor, values_MZBB: Tensor, topology: Topology) -> Tensor:
    """``sum_m left_m A_m^T``, ``(D, P)``."""
    left_MDH = _joined(left_MSDU.mT, topology.columns).mT
    return (left_MDH @ to_dense(values_MZBB, topology).mT).sum(0)


def row_dots(a_ZBB: Tensor, b_ZBB: Tensor, topology: Topology) -> Tensor:
    """The dot product of each row of two matrices, ``(P,)``."""
    a_PH, b_PH = (to_dense(values.unsqueeze(0), topology)[0] for values in (a_ZBB, b_ZBB))
    return (a_PH * b_PH).sum(1)


def _joined(stack_MSUD: Tensor, columns: Columns) -> Tensor:
    """The units of all columns one behind the other, ``(M, H, D)``."""
    places = zip(
        columns.slab_C.tolist(), columns.first_C.tolist(), columns.width_C.tolist(), strict=True
    )
    parts = [stack_MSUD[:, slab, first : first + width] for slab, first, width in places]
    return torch.cat(parts, dim=1)


def _real(rows_PD: Tensor, topology: Topology) -> Tensor:
    """Zeros in place of what pads blocks of rows."""
    row_B = torch.arange(topology.block, device=rows_PD.device)
    real_P = (row_B < topology.count_I.unsqueeze(1)).reshape(-1)
    return torch.where(real_P.unsqueeze(1), rows_PD, 0)


def _offsets(columns: Columns) -> list[int]:
    return (columns.width_C.cumsum(0) - columns.width_C).tolist()


def _units(columns: Columns) -> int:
    return int(columns.width_C.sum())
