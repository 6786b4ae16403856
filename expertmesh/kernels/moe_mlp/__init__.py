"""The experts of one layer as one operation: group, multiply, activate, multiply, sum."""

from expertmesh.kernels.moe_mlp.op import MLP_BACKENDS, moe_mlp
from expertmesh.kernels.moe_mlp.problem import MLPBackend, MLPOperands, MLPSpec

__all__ = ["MLP_BACKENDS", "MLPBackend", "MLPOperands", "MLPSpec", "moe_mlp"]
