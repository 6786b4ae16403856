import torch

from expertmesh.routing.logits import coarse, wide_dtype, wide_logits, without_padding


def test_coarse_values_are_near_keep_their_order_and_forget_rounding():
    value = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    value = value.sort().values
    rounded = coarse(value)
    assert (rounded.diff() >= 0).all()
    torch.testing.assert_close(rounded.double(), value, rtol=2**-12 + 1e-6, atol=0)
    assert torch.equal(coarse(value * (1 + 1e-15)), rounded)
    assert coarse(torch.zeros(2)).tolist() == [0.0, 0.0]


def test_padding_becomes_zero_and_products_are_wide():
    x = torch.tensor([[torch.nan, torch.inf], [1.0, 2.0]], dtype=torch.bfloat16)
    clean = without_padding(x, torch.tensor([True, False]))
    assert clean.tolist() == [[0.0, 0.0], [1.0, 2.0]]
    assert without_padding(x, None) is x
    weight = torch.ones(3, 2, dtype=torch.bfloat16)
    assert wide_logits(clean, weight).dtype == torch.float32
    assert wide_logits(clean.double(), weight).tolist() == [[0.0] * 3, [3.0] * 3]
    assert wide_dtype(weight, clean.double()) == torch.float64
