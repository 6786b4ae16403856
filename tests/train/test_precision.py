import pytest
import torch

from expertmesh.errors import UserError
from expertmesh.train.precision import Precision, PrecisionName, pick_device

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_autocast_decides_the_dtype_of_products(name: PrecisionName, dtype: torch.dtype) -> None:
    with Precision(name).autocast(CPU):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == dtype


def test_only_fp16_scales_the_loss() -> None:
    enabled = {name: Precision(name).scaler(CPU).is_enabled() for name in ("fp32", "bf16", "fp16")}
    assert enabled == {"fp32": False, "bf16": False, "fp16": True}


def test_the_meta_device_is_refused() -> None:
    with pytest.raises(UserError, match="the meta device computes nothing"):
        pick_device("meta")


def test_device_by_name_and_automatically() -> None:
    assert pick_device("cpu") == CPU
    with pytest.raises(UserError, match=r"run.device must be auto, cpu or .*got 'gpu'"):
        pick_device("gpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps", "xpu")
