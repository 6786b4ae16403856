"""The definition against torch's own loss, and against the formula written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from expertmesh.kernels.cross_entropy import CrossEntropy, token_loss


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.001])
def test_without_z_loss_it_is_torchs_cross_entropy(smoothing: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 11, dtype=torch.float64) * 3
    targets = torch.randint(11, (3, 4))
    targets[1, :2] = -100
    expected = F.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=smoothing
    )
    got = token_loss(logits, targets, CrossEntropy(label_smoothing=smoothing))
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)


def test_every_term_written_out() -> None:
    logits = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    z = sum(math.exp(v) for v in (0.5, -1.0, 2.0))
    p = [math.exp(v) / z for v in (0.5, -1.0, 2.0)]
    smooth = [0.1 / 3, 0.1 / 3, 0.9 + 0.1 / 3]
    expected = (
        -sum(q * math.log(r) for q, r in zip(smooth, p, strict=True)) + 0.3 * math.log(z) ** 2
    )
    kind = CrossEntropy(label_smoothing=0.1, z_loss=0.3)
    assert token_loss(logits, torch.tensor([2]), kind).item() == pytest.approx(expected, rel=1e-14)


def test_narrow_logits_are_widened_and_no_target_is_no_loss() -> None:
    logits = torch.randn(2, 5, dtype=torch.bfloat16)
    assert token_loss(logits, torch.tensor([1, 2])).dtype == torch.float32
    assert token_loss(logits, torch.tensor([-100, -100])) == 0
    assert token_loss(logits[:0], torch.zeros(0, dtype=torch.int64)) == 0
    assert token_loss(logits, torch.tensor([-7, 2]), CrossEntropy(ignore_index=-7)) > 0


@pytest.mark.parametrize(
    ("values", "message"),
    [({"label_smoothing": 1.0}, "label_smoothing"), ({"z_loss": -1e-4}, "z_loss")],
)
def test_values_out_of_range(values: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossEntropy(**values)
