import pytest
import torch

from expertmesh.errors import UserError
from expertmesh.train.precision import LossScale, Precision, PrecisionName, pick_device

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
    scales = {name: Precision(name).loss_scale().scale for name in ("fp32", "bf16", "fp16")}
    assert scales == {"fp32": 1.0, "bf16": 1.0, "fp16": 2.0**16}


def test_the_scale_halves_at_an_overflow_and_doubles_after_good_steps() -> None:
    scale = LossScale(scale=8.0, interval=3)
    seen = []
    for overflowed in (True, False, False, False, False, True, False, False):
        scale.update(overflowed=overflowed)
        seen.append(scale.scale)
    assert seen == [4.0, 4.0, 4.0, 8.0, 8.0, 4.0, 4.0, 4.0]
    other = LossScale(interval=3)
    other.load_state_dict(scale.state_dict())
    other.update(overflowed=False)
    assert other.scale == 8.0


def test_a_scale_that_is_off_stays_one() -> None:
    off = LossScale(enabled=False)
    off.update(overflowed=True)
    assert (off.scale, off.state_dict()) == (1.0, {})
    on = LossScale(scale=4.0)
    on.load_state_dict(off.state_dict())
    assert on.scale == 4.0


def test_the_meta_device_is_refused() -> None:
    with pytest.raises(UserError, match="the meta device computes nothing"):
        pick_device("meta")


def test_device_by_name_and_automatically() -> None:
    assert pick_device("cpu") == CPU
    with pytest.raises(UserError, match=r"run.device must be auto, cpu or .*got 'gpu'"):
        pick_device("gpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps", "xpu")
