"""Grouped matrix products: rows lie together by expert, and each group has its own matrix."""

from expertmesh.kernels.grouped_gemm.base import GroupedGemm
from expertmesh.kernels.grouped_gemm.loop import LoopGemm
from expertmesh.kernels.grouped_gemm.torch_grouped_mm import TorchGroupedMM

__all__ = ["GroupedGemm", "LoopGemm", "TorchGroupedMM"]
