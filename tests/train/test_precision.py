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


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("cdua", "cuda"),
        ("cuda0", "cuda"),
        ("CUDA", "cuda"),
        ("CPU", "cpu"),
        ("gpu", "auto"),
        ("gpu:0", "auto"),
        ("autom", "auto"),
        ("tea kettle", None),
        ("", None),
    ],
)
def test_a_misspelt_device_is_one_sentence(name: str, meant: str | None) -> None:
    with pytest.raises(UserError) as raised:
        pick_device(name)
    hint = "" if meant is None else f"; did you mean {meant!r}?"
    assert str(raised.value) == (
        f"run.device must be auto, cpu, cuda, cuda:0 or another device of torch, got {name!r}{hint}"
    )


# No build that this package runs on has these; of the second torch says an assertion of its own.
@pytest.mark.parametrize("name", ["fpga:9", "opengl"])
@pytest.mark.parametrize(
    ("found", "choices"),
    [
        (None, "auto or cpu"),
        (("cuda", 1), "auto, cpu, cuda or cuda:0"),
        (("xpu", 4), "auto, cpu, xpu or xpu:0 to xpu:3"),
    ],
)
def test_a_device_that_is_not_here(
    monkeypatch: pytest.MonkeyPatch, found: tuple[str, int] | None, choices: str, name: str
) -> None:
    accelerator = None if found is None else torch.device(found[0])
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda *, check_available: accelerator
    )
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: found and found[1])
    with pytest.raises(UserError) as raised:
        pick_device(name)
    assert str(raised.value) == (
        f"run.device must be {choices} on this machine, got {name!r}: "
        "this torch is not built for it"
    )


def test_device_by_name_and_automatically() -> None:
    assert pick_device("cpu") == CPU
    assert pick_device("auto").type in ("cpu", "cuda", "mps", "xpu")
