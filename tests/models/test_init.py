"""Initial values: a function of the seed and the names, and of nothing else."""

import itertools

import torch

from expertmesh.models import DecoderConfig, DecoderLM
from tests.models.conftest import GROUPED


def test_same_seed_same_values_other_seed_others(config: DecoderConfig) -> None:
    first, again, other = (DecoderLM(config, seed=seed) for seed in (3, 3, 4))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        if value.dim() > 1:
            assert not torch.equal(value, other.state_dict()[name]), name


def test_meta_and_to_empty_give_the_values_of_direct_construction(config: DecoderConfig) -> None:
    direct = DecoderLM(config, seed=3)
    with torch.device("meta"):
        late = DecoderLM(config, seed=3)
    assert all(tensor.is_meta for tensor in itertools.chain(late.parameters(), late.buffers()))
    late.to_empty(device="cpu")
    for tensor in itertools.chain(late.parameters(), late.buffers()):
        tensor.data.fill_(77)
    late.init_weights(3)
    for (name, value), (_, expected) in zip(
        itertools.chain(late.named_parameters(), late.named_buffers()),
        itertools.chain(direct.named_parameters(), direct.named_buffers()),
        strict=True,
    ):
        assert torch.equal(value, expected), name


def test_no_two_matrices_or_experts_start_equal(config: DecoderConfig) -> None:
    model = DecoderLM(config)
    matrices = []
    for name, param in model.named_parameters():
        if ".experts." in name:
            matrices += list(param.unbind(0))
        elif param.dim() > 1:
            matrices.append(param)
    heads = [tuple(matrix.flatten()[:8].tolist()) for matrix in matrices]
    assert len(set(heads)) == len(heads)


def test_construction_leaves_torchs_generator_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    DecoderLM(DecoderConfig(**GROUPED))
    assert torch.equal(torch.rand(3), expected)


def test_scales() -> None:
    model = DecoderLM(DecoderConfig(**{**GROUPED, "dim": 64, "init_std": 0.05}))
    for name, param in model.named_parameters():
        if name.endswith("norm.weight"):
            assert (param == 1).all()
        elif "router" not in name:
            std = param.double().std().item()
            assert abs(std - 0.05) < 6 * 0.05 / (2 * param.numel()) ** 0.5, name


def test_default_dtype_governs() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = DecoderLM(DecoderConfig(**GROUPED))
    finally:
        torch.set_default_dtype(before)
    assert model.embedding.weight.dtype == torch.bfloat16
    assert model(torch.zeros(1, 3, dtype=torch.int64)).dtype == torch.bfloat16


def test_tied_output_is_one_parameter() -> None:
    model = DecoderLM(DecoderConfig(**{**GROUPED, "tied_embeddings": True}))
    assert model.head is None
    model(torch.zeros(1, 3, dtype=torch.int64)).sum().backward()
    # Rows of tokens that were not put in get a gradient through the output alone.
    assert (model.embedding.weight.grad[1:].abs().sum(dim=1) > 0).all()
