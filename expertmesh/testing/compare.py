"""Closeness by relative norm: one number that says how far a tensor is from what was expected."""

import torch
from torch import Tensor

_DEFAULT = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 2e-2,
}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in float64; ``||actual||`` where expected is zero.

    NaN anywhere gives NaN. An infinity gives NaN or infinity, never a small number.
    """
    has_imaginary = actual.is_complex() or expected.is_complex()
    wide = torch.complex128 if has_imaginary else torch.float64
    wide_actual = actual.detach().to(wide).cpu()
    wide_expected = expected.detach().to(wide).cpu()
    norm = wide_expected.norm().item()
    return (wide_actual - wide_expected).norm().item() / (norm or 1.0)


def assert_close(
    name: str, actual: Tensor | None, expected: Tensor | None, tol: float | None = None
) -> None:
    """Fail unless two tensors agree in shape, in dtype, and in value by relative norm.

    Args:
        name: What is compared; printed with the error, also on success (pytest shows it when a
            test fails).
        actual: What was computed.
        expected: What it should be. Where it is exactly zero, ``actual``'s own norm counts.
        tol: The greatest relative error; None chooses by dtype (float64 1e-12, float32 1e-5,
            float16 2e-3, bfloat16 2e-2, others exact).

    Raises:
        AssertionError: If they differ, or either holds NaN.
    """
    if actual is None or expected is None:
        raise AssertionError(f"{name}: got {actual}, expected {expected}; None is not a tensor")
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}")
    if actual.dtype != expected.dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype}, not {expected.dtype}")
    limit = _DEFAULT.get(actual.dtype, 0.0) if tol is None else tol
    error = relative_error(actual, expected)
    print(f"{name}: relative error {error:.3g}, at most {limit:.3g}")
    if not error <= limit:
        raise AssertionError(f"{name}: relative error {error:.3g} exceeds {limit:.3g}")
    # Integers that float64 rounds to the same number differ by no relative error.
    if limit == 0.0 and not torch.equal(actual.cpu(), expected.cpu()):
        raise AssertionError(f"{name}: not exactly equal")
