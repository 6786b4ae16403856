"""Output layer and loss at once, against the definition: value, gradients, memory."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from expertmesh.kernels.cross_entropy import (
    CrossEntropy,
    chunked,
    linear_cross_entropy,
    token_loss,
)
from expertmesh.testing import assert_close

KINDS = [
    CrossEntropy(),
    CrossEntropy(label_smoothing=0.1),
    CrossEntropy(z_loss=1e-2),
    CrossEntropy(label_smoothing=0.3, z_loss=1e-4),
]


def plain(hidden: Tensor, weight_VD: Tensor, targets: Tensor, kind: CrossEntropy) -> Tensor:
    return token_loss(F.linear(hidden, weight_VD), targets, kind)


def values_and_gradients(
    function: Callable[..., Tensor], hidden: Tensor, weight_VD: Tensor, upstream: float
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight_VD = (t.detach().clone().requires_grad_() for t in (hidden, weight_VD))
    loss = function(hidden, weight_VD)
    (loss * upstream).backward()
    assert hidden.grad is not None
    assert weight_VD.grad is not None
    return loss.detach(), hidden.grad, weight_VD.grad


def compare(
    hidden: Tensor, weight_VD: Tensor, targets: Tensor, kind: CrossEntropy, at_once: int
) -> None:
    expected = values_and_gradients(lambda h, w: plain(h, w, targets, kind), hidden, weight_VD, 0.7)
    got = values_and_gradients(
        lambda h, w: linear_cross_entropy(h, w, targets, kind, logits_at_once=at_once),
        hidden,
        weight_VD,
        0.7,
    )
    for name, one, other in zip(("loss", "hidden", "weight"), got, expected, strict=True):
        assert one.dtype == other.dtype
        assert_close(name, one, other, 1e-12)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(
    ("shape", "num_words", "dim"),
    [
        ((), 5, 3),
        ((3, 5), 17, 4),
        ((1, 1), 2, 1),
        ((13,), 5, 3),
        ((2, 3, 4), 101, 7),
        ((1, 29), 1, 6),
    ],
    ids=str,
)
@pytest.mark.parametrize("at_once", [1, 40, 1 << 28])
def test_value_and_gradients(
    shape: tuple[int, ...], num_words: int, dim: int, kind: CrossEntropy, at_once: int
) -> None:
    torch.manual_seed(1)
    hidden = torch.randn(*shape, dim, dtype=torch.float64)
    weight_VD = torch.randn(num_words, dim, dtype=torch.float64)
    targets = torch.randint(num_words, shape)
    compare(hidden, weight_VD, targets, kind, at_once)
    compare(hidden, weight_VD, targets.masked_fill(torch.rand(shape) < 0.5, -100), kind, at_once)


@pytest.mark.parametrize("shape", [(0,), (2, 0), (3, 4)], ids=str)
def test_no_target_at_all(shape: tuple[int, ...]) -> None:
    hidden = torch.randn(*shape, 3, dtype=torch.float64)
    weight_VD = torch.randn(7, 3, dtype=torch.float64)
    targets = torch.full(shape, -100)
    loss, *gradients = values_and_gradients(
        lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight_VD, 1.0
    )
    assert loss == 0
    assert all(bool((gradient == 0).all()) for gradient in gradients)


@pytest.mark.parametrize("size", [1e4, -1e4, 3e2])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_large_logits(kind: CrossEntropy, size: float) -> None:
    torch.manual_seed(2)
    weight_VD = torch.cat([torch.randn(6, 2), torch.full((1, 2), size)]).double()
    hidden = torch.ones(3, 2, dtype=torch.float64)
    compare(hidden, weight_VD, torch.tensor([0, 6, 3]), kind, 7)
    # Equal large logits: in float32 the difference is still exact.
    equal = linear_cross_entropy(hidden.float(), torch.full((5, 2), size), torch.tensor([0, 1, 2]))
    assert equal.item() == pytest.approx(3 * torch.tensor(5.0).log().item(), rel=1e-6)


def test_one_of_the_two_may_be_frozen() -> None:
    torch.manual_seed(3)
    hidden, weight_VD = torch.randn(4, 3).double(), torch.randn(5, 3).double()
    targets = torch.tensor([0, 4, -100, 2])
    whole = values_and_gradients(
        lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight_VD, 1.0
    )
    for place, frozen in ((1, weight_VD), (2, hidden)):
        free = (hidden if place == 1 else weight_VD).clone().requires_grad_()
        pair = (free, frozen) if place == 1 else (frozen, free)
        linear_cross_entropy(*pair, targets).backward()
        assert free.grad is not None
        assert torch.equal(free.grad, whole[place])
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight_VD, targets), whole[0])


def test_without_gradients_none_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight_VD = torch.randn(4, 3), torch.randn(5, 3, requires_grad=True)
    targets = torch.tensor([0, 4, -100, 2])
    expected = linear_cross_entropy(hidden, weight_VD, targets)

    def refuse(*arguments: object) -> None:
        raise AssertionError("a gradient that nobody asked for")

    monkeypatch.setattr(chunked, "_to_gradient", refuse)
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight_VD, targets), expected)
    with pytest.raises(AssertionError, match="nobody asked for"):
        linear_cross_entropy(hidden, weight_VD, targets)


def test_tokens_without_a_target_have_exactly_no_gradient() -> None:
    hidden = torch.randn(6, 3, requires_grad=True)
    targets = torch.tensor([-100, 1, -100, 0, 2, -100])
    linear_cross_entropy(hidden, torch.randn(4, 3), targets, KINDS[3]).backward()
    assert hidden.grad is not None
    assert hidden.grad.any(1).tolist() == [False, True, False, True, True, False]


def test_the_weights_gradient_is_summed_in_float32_under_bfloat16() -> None:
    torch.manual_seed(4)
    hidden, weight_VD = torch.randn(4096, 8), torch.randn(3, 8)
    targets = torch.randint(3, (4096,))
    exact = values_and_gradients(
        lambda h, w: linear_cross_entropy(h, w, targets), hidden.double(), weight_VD.double(), 1.0
    )

    def narrow(h: Tensor, w: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(h, w, targets, logits_at_once=3)

    loss, grad_hidden, grad_VD = values_and_gradients(narrow, hidden, weight_VD, 1.0)
    assert (loss.dtype, grad_hidden.dtype, grad_VD.dtype) == (torch.float32,) * 3
    assert_close("loss", loss.double(), exact[0], 1e-2)
    assert_close("hidden", grad_hidden.double(), exact[1], 2e-2)
    # One token at a time: a sum in bfloat16 would stop growing long before the last one.
    assert_close("weight", grad_VD.double(), exact[2], 2e-2)


def test_bfloat16_weights_get_a_bfloat16_gradient() -> None:
    torch.manual_seed(5)
    hidden, weight_VD = torch.randn(64, 8).bfloat16(), torch.randn(9, 8).bfloat16()
    targets = torch.randint(9, (64,))
    loss, _, grad_VD = values_and_gradients(
        lambda h, w: linear_cross_entropy(h, w, targets, logits_at_once=9), hidden, weight_VD, 1.0
    )
    exact = values_and_gradients(
        lambda h, w: plain(h, w, targets, KINDS[0]), hidden.double(), weight_VD.double(), 1.0
    )
    assert (loss.dtype, grad_VD.dtype) == (torch.float32, torch.bfloat16)
    assert_close("weight", grad_VD.double(), exact[2], 2e-2)


@pytest.mark.parametrize("scale", [1 / 769, 1 / 3, 3e-6])
def test_what_the_loss_is_multiplied_by_is_not_rounded(scale: float) -> None:
    """Rounded to bfloat16 it would scale all gradients below by up to 0.4 % too much."""
    torch.manual_seed(6)
    hidden, weight_VD = torch.randn(500, 16).bfloat16(), torch.randn(300, 16).bfloat16()
    targets = torch.randint(300, (500,))
    _, *once = values_and_gradients(
        lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight_VD, 1.0
    )
    _, *scaled = values_and_gradients(
        lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight_VD, scale
    )
    for whole, part in zip(once, scaled, strict=True):
        whole, part = whole.double().flatten(), part.double().flatten()
        ratio = float(whole @ part / (whole @ whole))
        assert ratio == pytest.approx(scale, rel=1e-3)


def test_a_second_backward_pass_is_refused() -> None:
    hidden = torch.randn(2, 3, requires_grad=True)
    loss = linear_cross_entropy(hidden, torch.randn(4, 3), torch.tensor([0, 1]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_shapes_that_differ_are_refused() -> None:
    weight_VD = torch.randn(4, 3)
    for hidden, targets in (
        (torch.randn(2, 3), torch.zeros(3, dtype=torch.int64)),
        (torch.randn(2, 5), torch.zeros(2, dtype=torch.int64)),
        (torch.tensor(1.0), torch.tensor(0)),
    ):
        with pytest.raises(ValueError, match=r"expected hidden \(\.\.\., D\)"):
            linear_cross_entropy(hidden, weight_VD, targets)


def test_it_works_inside_a_compiled_function() -> None:
    hidden, weight_VD = torch.randn(4, 3), torch.randn(5, 3)
    targets = torch.tensor([0, 4, -100, 2])

    @torch.compile(backend="eager")
    def compiled(h: Tensor) -> Tensor:
        return linear_cross_entropy(h * 2, weight_VD, targets) * 3

    expected = linear_cross_entropy(hidden * 2, weight_VD, targets) * 3
    assert torch.equal(compiled(hidden), expected)


class _LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]  # torch's signature
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self.largest = max(self.largest, value.numel())
        return result


def most_elements(num_tokens: int, num_words: int, loss: Callable[..., Tensor]) -> int:
    hidden = torch.randn(num_tokens, 4, requires_grad=True)
    weight_VD = torch.randn(num_words, 4, requires_grad=True)
    with _LargestTensor() as seen:
        loss(hidden, weight_VD, torch.randint(num_words, (num_tokens,)), KINDS[3]).backward()
    return seen.largest


def test_no_tensor_grows_with_tokens_times_words() -> None:
    def chunked(*arguments: object) -> Tensor:
        return linear_cross_entropy(*arguments, logits_at_once=2000)  # type: ignore[arg-type]  # as they come

    assert most_elements(800, 1000, plain) >= 800 * 1000
    assert most_elements(200, 1000, chunked) == 1000 * 4
    # Four times the tokens, and four times the words: the largest is the weight, or its gradient.
    assert most_elements(800, 1000, chunked) == 1000 * 4
    assert most_elements(800, 4000, chunked) == 4000 * 4


def peak_mib(kind: str, num_tokens: int, num_words: int) -> float:
    command = [sys.executable, "-m", "tests.kernels.cross_entropy.peak", kind]
    run = subprocess.run(
        [*command, str(num_tokens), str(num_words)],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return float(run.stdout)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_tokens_times_words() -> None:
    """All logits would be 128 MiB, then 512; a chunk of them is 1 MiB."""
    assert peak_mib("plain", 1024, 1 << 15) > 128
    for num_tokens in (1024, 4096):
        assert peak_mib("chunked", num_tokens, 1 << 15) < 16
