# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of kernels: only its own may stand there.
"""Activations by name inside kernels, in float32, with their derivatives.

Constants stand to the right of tensors: the interpreter takes a product for a constant otherwise.
"""

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_RSQRT_2PI = tl.constexpr(0.3989422804014327)
_TWO_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBIC = tl.constexpr(0.044715)


@triton.jit
def activate(x, NAME: tl.constexpr):
    """The activation of ``x``."""
    if NAME == "silu":
        y = x / (1 + tl.exp(-x))
    elif NAME == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * _SQRT_HALF))
    elif NAME == "gelu_tanh":
        # 1 + tanh(z) = 2 sigmoid(2 z) is 0 or 2 long before the bound, which keeps cubes finite.
        bounded = tl.minimum(tl.maximum(x, -16), 16)
        inner = bounded * (1 + bounded * bounded * _CUBIC) * _TWO_SQRT_2_OVER_PI
        y = x / (1 + tl.exp(-inner))
    elif NAME == "relu2":
        positive = tl.maximum(x, 0)
        y = positive * positive
    else:
        tl.static_assert(NAME == "relu")
        y = tl.maximum(x, 0)
    return y


@triton.jit
def activate_with_slope(x, NAME: tl.constexpr):
    """The activation of ``x`` and its derivative."""
    if NAME == "silu":
        share = 1 / (1 + tl.exp(-x))
        y = x * share
        slope = share + y * (1 - share)
    elif NAME == "gelu":
        share = 0.5 * (1 + tl.erf(x * _SQRT_HALF))
        y = x * share
        slope = share + x * tl.exp(-0.5 * x * x) * _RSQRT_2PI
    elif NAME == "gelu_tanh":
        bounded = tl.minimum(tl.maximum(x, -16), 16)
        square = bounded * bounded
        inner = bounded * (1 + square * _CUBIC) * _TWO_SQRT_2_OVER_PI
        share = 1 / (1 + tl.exp(-inner))
        y = x * share
        growth = (1 + 3 * square * _CUBIC) * _TWO_SQRT_2_OVER_PI
        slope = share + bounded * share * (1 - share) * growth
    elif NAME == "relu2":
        positive = tl.maximum(x, 0)
        y = positive * positive
        slope = 2 * positive
    else:
        tl.static_assert(NAME == "relu")
        y = tl.maximum(x, 0)
        slope = tl.where(x > 0, 1.0, 0.0)
    return y, slope
