"""Conversion that does nothing where there is nothing to convert."""

import torch

from expertmesh.kernels.dtypes import autocast_dtype, cast, without_autocast


def test_cast() -> None:
    x = torch.ones(2)
    assert cast(x, torch.float32) is x
    assert cast(x, torch.float64).dtype == torch.float64


def test_autocast_dtype_follows_the_context() -> None:
    assert autocast_dtype("cpu") is None
    assert autocast_dtype("meta") is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert autocast_dtype("cpu") == torch.bfloat16
        with without_autocast("cpu"):
            assert autocast_dtype("cpu") is None
