import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh.data import Batch
from expertmesh.data.dataset import IGNORE
from expertmesh.errors import UserError
from expertmesh.kernels.cross_entropy import token_loss
from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.train.micro_batch import micro_batches
from expertmesh.train.optimizer import OptimConfig, build_optimizer
from expertmesh.train.passes import OneByOne
from expertmesh.train.precision import LossScale, Precision, PrecisionName
from expertmesh.train.step import Stepper
from tests.train.tiny import MODEL

CPU = torch.device("cpu")


def make_batch(rows: int = 4, seq_len: int = 8, *, lengths: list[int] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(3)
    tokens_BS = torch.randint(0, 258, (rows, seq_len), generator=generator)
    targets_BS = torch.randint(0, 258, (rows, seq_len), generator=generator)
    padding = None
    if lengths is not None:
        padding = torch.arange(seq_len) >= torch.tensor(lengths)[:, None]
        targets_BS = targets_BS.masked_fill(padding, IGNORE)
    return Batch(tokens_BS, targets_BS, padding, torch.arange(rows))


def make_stepper(
    sequences: int = 4,
    *,
    precision: PrecisionName = "fp32",
    dtype: torch.dtype = torch.float64,
    clip: float = 0.0,
    lr: float = 1e-2,
    **model: Any,
) -> Stepper:
    decoder = DecoderLM(DecoderConfig(**{**MODEL, **model}), seed=5).to(dtype)
    passes = OneByOne(decoder, precision=Precision(precision), device=CPU, sequences=sequences)
    return Stepper(passes, build_optimizer(decoder, OptimConfig(lr=lr)), seed=1, clip=clip)


def gradients(stepper: Stepper, batch: Batch) -> dict[str, Tensor]:
    stepper.model.train()
    stepper.accumulate(1, batch)
    return {name: p.grad for name, p in stepper.model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor], tolerance: float) -> None:
    assert one.keys() == two.keys()
    for name, grad in one.items():
        error = (grad - two[name]).norm() / grad.norm().clamp_min(1e-12)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


# The z-loss is a mean over tokens, so shares of micro-batches add up to it exactly. The balance
# loss is a product of two statistics of its micro-batch, and does not.
Z_ONLY = {"balance_coef": 0.0, "z_coef": 0.5}


@pytest.mark.parametrize("lengths", [None, [8, 3, 1, 6], [8, 8, 0, 5]])
@pytest.mark.parametrize("sequences", [1, 2, 3])
def test_accumulation_gives_the_gradients_of_the_whole_batch(
    lengths: list[int] | None, sequences: int
) -> None:
    batch = make_batch(lengths=lengths)
    whole = gradients(make_stepper(4, router_options=Z_ONLY), batch)
    parts = gradients(make_stepper(sequences, router_options=Z_ONLY), batch)
    assert any("router" in name for name in whole)
    assert_same(whole, parts, 1e-12)


def test_the_attached_loss_is_in_these_gradients() -> None:
    batch = make_batch()
    with_loss = gradients(make_stepper(2, router_options=Z_ONLY), batch)
    without = gradients(make_stepper(2, router_options={"balance_coef": 0.0, "z_coef": 0.0}), batch)
    router = next(name for name in with_loss if "router" in name)
    assert (with_loss[router] - without[router]).norm() > 1e-3 * without[router].norm()


def test_noise_does_not_depend_on_micro_batches() -> None:
    options = {"balance_coef": 0.0, "capacity": {"factor": 100.0}}
    model: dict[str, Any] = {"router": "switch", "experts_per_token": 1, "router_options": options}
    batch = make_batch()
    assert_same(
        gradients(make_stepper(4, **model), batch),
        gradients(make_stepper(1, **model), batch),
        1e-12,
    )
    quiet = {**options, "noise": None}
    silent = gradients(make_stepper(4, **{**model, "router_options": quiet}), batch)
    noisy = gradients(make_stepper(4, **model), batch)
    assert any(not torch.equal(noisy[name], silent[name]) for name in noisy)


def test_loss_is_the_sum_over_the_number_of_targets() -> None:
    batch = make_batch(lengths=[8, 3, 1, 6])
    stepper = make_stepper(2)
    loss = float(stepper.accumulate(1, batch))
    stepper.model.train()
    logits = stepper.model(batch.tokens_BS, padding_mask=batch.padding_mask_BS)
    expected = token_loss(logits, batch.targets_BS).item() / 18
    assert loss == pytest.approx(expected, rel=1e-6)


def test_the_loss_scale_reaches_main_and_attached_losses_alike() -> None:
    batch = make_batch()
    plain = make_stepper(2, dtype=torch.float32, router_options=Z_ONLY)
    scaled = make_stepper(2, dtype=torch.float32, router_options=Z_ONLY)
    scaled.loss_scale = LossScale(scale=1024.0)
    expected = gradients(plain, batch)
    got = {name: grad / 1024.0 for name, grad in gradients(scaled, batch).items()}
    assert_same(expected, got, 1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_loss_falls_in_every_precision(precision: PrecisionName) -> None:
    stepper = make_stepper(2, precision=precision, dtype=torch.float32)
    batch = make_batch()
    losses = [stepper.step(step, batch).loss for step in range(1, 21)]
    assert losses[-1] < losses[0] - 0.5
    assert next(stepper.model.parameters()).dtype == torch.float32


def test_fp16_overflow_skips_the_step_and_lowers_the_scale() -> None:
    stepper = make_stepper(precision="fp16", dtype=torch.float32)
    stepper.loss_scale = LossScale(scale=2.0**40)
    before = {name: p.detach().clone() for name, p in stepper.model.named_parameters()}
    result = stepper.step(1, make_batch())
    assert result.grad_norm is None
    assert stepper.loss_scale.scale == 2.0**39
    assert all(torch.equal(p, before[name]) for name, p in stepper.model.named_parameters())


def test_clipping_bounds_the_norm_that_is_applied() -> None:
    free, clipped = make_stepper(), make_stepper(clip=1e-3)
    norm = free.step(1, make_batch()).grad_norm
    assert clipped.step(1, make_batch()).grad_norm == norm
    applied = torch.nn.utils.get_total_norm(
        [p.grad for p in clipped.model.parameters() if p.grad is not None]
    )
    assert float(applied) == pytest.approx(1e-3, rel=1e-3)


def test_selection_bias_moves_once_per_step_by_the_whole_batch() -> None:
    options = {"bias_rate": 0.25}
    whole, parts = make_stepper(4, router_options=options), make_stepper(1, router_options=options)
    for stepper in (whole, parts):
        stepper.step(1, make_batch())
    (one,) = [b for name, b in whole.model.named_buffers() if name.endswith("bias_E")]
    (two,) = [b for name, b in parts.model.named_buffers() if name.endswith("bias_E")]
    assert set(one.abs().tolist()) <= {0.0, 0.25}
    assert one.abs().sum() > 0
    assert torch.equal(one, two)


def test_shares_add_up_to_one_and_index_the_whole_batch() -> None:
    parts = list(micro_batches(make_batch(lengths=[8, 3, 0, 6]), 3, CPU))
    assert [part.share for part in parts] == [11 / 17, 6 / 17]
    assert torch.cat([part.token_index_BS for part in parts]).flatten().tolist() == list(range(32))


@pytest.mark.parametrize("lengths", [[0, 0, 0, 0], []])
def test_a_batch_without_targets_is_refused(lengths: list[int]) -> None:
    batch = make_batch(len(lengths), lengths=lengths or None)
    kind = "all padding" if lengths else "empty"
    with pytest.raises(UserError, match=rf"the batch of step 4 is {kind}"):
        make_stepper().step(4, batch)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error_that_changes_nothing(value: float) -> None:
    stepper = make_stepper()
    parameters = dict(stepper.model.named_parameters())
    with torch.no_grad():
        parameters["norm.weight"].fill_(value)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    with pytest.raises(UserError, match=r"the loss is (nan|inf) at step 3; .*nothing was saved"):
        stepper.step(3, make_batch())
    for name, param in parameters.items():
        torch.testing.assert_close(param.detach(), before[name], equal_nan=True, rtol=0, atol=0)


def test_a_gradient_that_is_not_finite_is_an_error_too() -> None:
    stepper = make_stepper()
    norm = stepper.model.get_parameter("norm.weight")
    norm.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(UserError, match=r"the norm of the gradient is (nan|inf) at step 2"):
        stepper.step(2, make_batch())


def test_an_all_padding_micro_batch_adds_nothing() -> None:
    batch = make_batch(lengths=[8, 3, 0, 0])
    assert_same(
        gradients(make_stepper(2, router_options=Z_ONLY), batch),
        gradients(make_stepper(2, router_options=Z_ONLY), batch.rows(0, 2)),
        1e-12,
    )


def test_nothing_is_collected_within_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    stepper, found = make_stepper(), []
    backward = OneByOne.backward

    def watched(self: OneByOne, *args: Any, **options: Any) -> Tensor:
        found.append(gc.isenabled())
        return backward(self, *args, **options)

    monkeypatch.setattr(OneByOne, "backward", watched)
    stepper.step(1, make_batch())
    assert found == [False]
    assert gc.isenabled()
