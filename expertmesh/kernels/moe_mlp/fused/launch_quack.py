"""Starts QuACK's products (``quack-kernels``, an optional package)."""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from expertmesh.kernels.layout import Layout
from expertmesh.kernels.moe_mlp.fused.plan import Quack


def weight_gradient(
    rows_NH: Tensor,
    by_token_RO: Tensor,
    layout: Layout,
    choices: int,
    like: Tensor,
    tile: Quack,
    *,
    flipped: bool,
) -> Tensor:
    """As ``launch.weight_gradient``, of matrices without gaps.

    QuACK takes what is gathered as the left operand, so both products are ``by_token^T rows``; how
    they are stored is told by strides.
    """
    gemm: Any = import_module("quack.gemm").gemm
    grad = torch.empty_like(like, memory_format=torch.contiguous_format)
    gemm(
        by_token_RO.T,
        rows_NH.T,
        grad if flipped else grad.flatten(1, 2).mT,
        None,
        None,
        tile_M=tile.rows,
        tile_N=tile.columns,
        cluster_M=tile.cluster,
        cluster_N=1,
        pingpong=tile.pingpong,
        cu_seqlens_k=layout.offset_E1,
        A_idx=layout.order_N.div(choices, rounding_mode="floor"),
    )
    return grad
