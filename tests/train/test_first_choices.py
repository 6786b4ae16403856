"""What a token's id tells of its first choice, against plain counting."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expertmesh.models import DecoderConfig, DecoderLM
from expertmesh.report.read import read_run
from expertmesh.testing import run_on_ranks
from expertmesh.train.first_choices import FirstChoices
from expertmesh.train.loop import Trainer
from tests.train.tiny import MODEL, Silent, make_run


def make_model(**overrides: object) -> DecoderLM:
    return DecoderLM(DecoderConfig(**{**MODEL, "init_std": 0.5, **overrides}), seed=2).eval()


def batch(rows: int = 12) -> tuple[Tensor, Tensor]:
    """Few ids, so that most occur often, and one that occurs once; some padding."""
    generator = torch.Generator().manual_seed(0)
    tokens_BS = torch.randint(0, 15, (rows, 8), generator=generator)
    tokens_BS[0, 0] = 200
    padding_BS = torch.zeros_like(tokens_BS, dtype=torch.bool)
    padding_BS[1, 5:] = True
    return tokens_BS, padding_BS


def firsts(model: DecoderLM, tokens_BS: Tensor, padding_BS: Tensor) -> dict[int, list[int]]:
    """The first choices of each id, in the model's only MoE layer."""
    record: dict = {}
    model(tokens_BS, padding_mask=padding_BS, record=record)
    (routing,) = record.values()
    found = defaultdict(list)
    for token, padded, first in zip(
        tokens_BS.flatten().tolist(),
        padding_BS.flatten().tolist(),
        routing.chosen_TK[:, 0].tolist(),
        strict=True,
    ):
        if not padded:
            found[token].append(first)
    return {token: chosen for token, chosen in found.items() if len(chosen) > 1}


def test_counts_are_plain_ones() -> None:
    model, (tokens_BS, padding_BS) = make_model(), batch()
    with FirstChoices(model) as choices:
        model(tokens_BS[:5], padding_mask=padding_BS[:5])
        model(tokens_BS[5:], padding_mask=padding_BS[5:])
    (found,) = choices.statistics().values()

    chosen = firsts(model, tokens_BS, padding_BS)
    guessed, total = 0, sum(map(len, chosen.values()))
    for own in chosen.values():
        for place, first in enumerate(own):
            (best, most), *rest = Counter(own[:place] + own[place + 1 :]).most_common(2)
            guessed += best == first and (not rest or rest[0][1] < most)
    assert found["guessed"] == pytest.approx(guessed / total)
    everyone = Counter(first for own in chosen.values() for first in own)
    assert found["unguided"] == pytest.approx(max(everyone.values()) / total)
    assert found["ids"] == sorted(chosen)
    for token, favourite in zip(found["ids"], found["favourite"], strict=True):
        counts = Counter(chosen[token])
        assert counts[favourite] == max(counts.values())
    assert 0 < found["guessed"] < 1


def test_a_router_of_ids_is_told_whole_and_the_most_frequent_ids_are_named() -> None:
    """Without attention that mixes them, a layer sees the ids alone."""
    model = make_model()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.zero_()
    tokens_BS = torch.arange(300).repeat_interleave(torch.arange(300) % 3 + 2)[None] % 257
    with FirstChoices(model) as choices:
        model(tokens_BS)
    (found,) = choices.statistics().values()
    assert found["guessed"] == 1
    assert len(found["ids"]) == len(found["favourite"]) == 256
    assert found["ids"] == sorted(found["ids"])


def test_nothing_is_told_by_ids_that_occur_once() -> None:
    model = make_model()
    with FirstChoices(model) as choices:
        model(torch.arange(8)[None])
    (found,) = choices.statistics().values()
    assert found == {"guessed": None, "unguided": None, "ids": [], "favourite": []}
    with FirstChoices(model) as choices:
        pass
    assert choices.statistics() == {}


def test_hooks_are_gone_afterwards() -> None:
    model, (tokens_BS, padding_BS) = make_model(), batch()
    with FirstChoices(model) as choices:
        model(tokens_BS, padding_mask=padding_BS)
    before = choices.statistics()
    model(tokens_BS.flip(1))
    assert choices.statistics() == before


def test_a_run_logs_them_at_its_evaluations(tmp_path: Path) -> None:
    run = make_run(tmp_path, "--train.steps=4", "--train.log_every=1", "--eval.every=2")
    Trainer(run).fit(Silent())
    lines = (run.folder / "routing.jsonl").read_text().splitlines()
    layers = [layer for line in map(json.loads, lines) for layer in line["layers"].values()]
    assert ["by_token" in layer for layer in layers] == [False, True, False, True]
    assert 0 < layers[-1]["by_token"]["guessed"] <= 1
    (routing,) = read_run(run.folder).routing
    assert routing.by_token.step.tolist() == [2, 4]
    assert routing.by_token.settled[-1] == 1


def on_rank(rows: int) -> dict:
    import torch.distributed as dist

    from expertmesh.parallel.agreement import Agreement
    from expertmesh.parallel.mesh import Mesh

    mesh = Mesh(dp=2)
    model, (tokens_BS, padding_BS) = make_model(), batch(rows)
    own = slice(0, 5) if dist.get_rank() == 0 else slice(5, None)
    with FirstChoices(model) as choices:
        model(tokens_BS[own], padding_mask=padding_BS[own])
    choices.add_other_ranks(Agreement(mesh.everyone))
    return choices.statistics()


def test_ranks_count_together() -> None:
    model, (tokens_BS, padding_BS) = make_model(), batch()
    with FirstChoices(model) as choices:
        model(tokens_BS, padding_mask=padding_BS)
    assert run_on_ranks(2, on_rank, 12) == [choices.statistics()] * 2
