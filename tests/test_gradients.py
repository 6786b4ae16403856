"""Norms and scaling of many gradients at once against one at a time."""

import math

import pytest
import torch
from torch import nn

from expertmesh.gradients import clip_factor, gradients_of, norms, scale_

BF16 = torch.bfloat16


def mixed(*dtypes: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 5), (7,), (0, 4), (2, 2, 2), (1,)]
    return [
        torch.randn(shape, generator=generator).to(dtypes[number % len(dtypes)])
        for number, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize(
    ("dtypes", "wide"),
    [
        ((torch.float32,), torch.float32),
        ((BF16, torch.float32), torch.float32),
        ((BF16, torch.float64), torch.float64),
    ],
    ids=str,
)
def test_norms_are_added_up_in_a_wide_type(
    dtypes: tuple[torch.dtype, ...], wide: torch.dtype
) -> None:
    gradients = mixed(*dtypes)
    found = norms(gradients)
    assert [norm.dtype for norm in found] == [wide] * len(gradients)
    expected = [float(gradient.double().norm()) for gradient in gradients]
    assert [float(norm) for norm in found] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("dtypes", [(torch.float64,), (BF16, torch.float32)], ids=str)
def test_scale_rounds_once(dtypes: tuple[torch.dtype, ...]) -> None:
    gradients, factor = mixed(*dtypes), 1 / 3
    expected = [
        (gradient.to(torch.promote_types(gradient.dtype, torch.float32)) * factor).to(
            gradient.dtype
        )
        for gradient in gradients
    ]
    scale_(gradients, factor)
    for got, want in zip(gradients, expected, strict=True):
        assert torch.equal(got, want)


def test_one_leaves_gradients_alone() -> None:
    gradients = mixed(BF16, torch.float32)
    versions = [gradient._version for gradient in gradients]
    scale_(gradients, 1.0)
    assert [gradient._version for gradient in gradients] == versions
    scale_(gradients, 0.5)
    assert [gradient._version for gradient in gradients] == [v + 1 for v in versions]


def test_factor_brings_the_norm_to_the_bound() -> None:
    assert clip_factor(4.0, 1.0) == pytest.approx(0.25, rel=1e-6)
    assert clip_factor(0.5, 1.0) == clip_factor(0.0, 1.0) == 1.0
    assert clip_factor(4.0, 0.0) == 0.0
    assert clip_factor(4.0, math.inf) == 1.0
    assert clip_factor(math.nan, 1.0) == clip_factor(math.inf, 1.0) == 1.0


def test_gradients_are_written_in_place_and_absent_ones_left_out() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    used.sum().backward()
    scale_(gradients_of([used, unused]), 0.25)
    assert used.grad is not None
    assert used.grad.tolist() == [0.25] * 3
    assert unused.grad is None
