"""Triton kernels of ``moe_mlp`` for training; imported only where triton is to run."""
