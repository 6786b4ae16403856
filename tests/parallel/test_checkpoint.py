"""Saved on one mesh, loaded on another; and what happens when a rank cannot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from expertmesh.testing import assert_close
from expertmesh.testing.ranks import RankError, run_on_ranks
from expertmesh.train.checkpoint import CheckpointFolder
from tests.parallel import cuts, decoder, faults

Cut = Callable[[cuts.Model], None]


def assert_same(saved: list[cuts.Values], loaded: list[cuts.Values]) -> None:
    expected, found = cuts.union(saved), cuts.union(loaded)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor, found[name]), name


def same(answers: list[str]) -> str:
    """What all ranks said, which is the same."""
    assert len(set(answers)) == 1, answers
    return answers[0]


@pytest.mark.parametrize(
    ("num_savers", "saver", "num_loaders", "loader"),
    [
        (1, cuts.alone, 4, cuts.zero_3),
        (4, cuts.zero_3, 2, cuts.zero_3),
        pytest.param(3, cuts.zero_3, 2, cuts.alone, marks=pytest.mark.slow),
        (4, cuts.ep_4, 4, cuts.ep_2_edp_2),
        pytest.param(4, cuts.ep_2_edp_2, 1, cuts.alone, marks=pytest.mark.slow),
        (4, cuts.ep_2_etp_2, 4, cuts.ep_4),
        pytest.param(1, cuts.alone, 4, cuts.ep_2_etp_2, marks=pytest.mark.slow),
        (2, cuts.zero_1, 2, cuts.zero_3),
        pytest.param(2, cuts.zero_0, 4, cuts.tp_2_dp_2, marks=pytest.mark.slow),
        (2, cuts.zero_3, 4, cuts.tp_2_dp_2),
        pytest.param(4, cuts.tp_2_dp_2, 4, cuts.ep_2_edp_2, marks=pytest.mark.slow),
        (2, cuts.pp_2, 1, cuts.alone),
        pytest.param(2, cuts.alone, 2, cuts.pp_2, marks=pytest.mark.slow),
        pytest.param(4, cuts.ep_4, 2, cuts.pp_2, marks=pytest.mark.slow),
    ],
)
def test_any_mesh_loads_what_any_other_saved(
    tmp_path: Path, num_savers: int, saver: Cut, num_loaders: int, loader: Cut
) -> None:
    saved = run_on_ranks(num_savers, cuts.save, tmp_path, saver)
    assert_same(saved, run_on_ranks(num_loaders, cuts.load, tmp_path, loader))


@pytest.mark.parametrize(
    ("num_savers", "saver", "num_loaders", "loader"),
    [
        (4, (2, {"ep": 4}), 4, (2, {"ep": 2})),
        pytest.param(3, (1, {}), 2, (3, {"ep": 2}), marks=pytest.mark.slow),
        pytest.param(
            4, (3, {"tp": 2, "ep": 2, "etp": 2}), 2, (0, {"pp": 2}), marks=pytest.mark.slow
        ),
        (4, (2, {"pp": 2, "ep": 2}), 4, (2, {"tp": 2, "cp": 2, "ep": 4})),
    ],
)
def test_a_decoder_and_its_optimizer(
    tmp_path: Path, num_savers: int, saver: Any, num_loaders: int, loader: Any
) -> None:
    run_on_ranks(num_savers, decoder.save, tmp_path, *saver)
    expected = decoder.one_process()
    alone = decoder.load_in_one_process(tmp_path)
    assert set(alone) == set(expected)
    for name, tensor in expected.items():
        assert_close(name, alone[name], tensor)
    assert_same([alone], run_on_ranks(num_loaders, decoder.load, tmp_path, *loader))


def test_a_process_without_a_group_reads_and_goes_on(tmp_path: Path) -> None:
    saved = run_on_ranks(4, cuts.save, tmp_path, cuts.ep_2_edp_2)
    found = cuts.load(tmp_path, cuts.alone)
    assert_same(saved, [found])


@pytest.mark.parametrize("cut", [cuts.alone, cuts.zero_3, cuts.ep_2_edp_2])
def test_each_element_is_written_once_and_the_work_is_shared(tmp_path: Path, cut: Cut) -> None:
    saved = cuts.union(run_on_ranks(4, cuts.save, tmp_path, cut))
    written = {}
    for file in (tmp_path / "step_00000002").glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            names = tensors.keys()
            written[file.name] = sum(tensors.get_tensor(name).nbytes for name in names)
    assert len(written) == 8
    assert sum(written.values()) == sum(tensor.nbytes for tensor in saved.values())
    assert max(written[name] for name in written if name.startswith("model")) < 2 * 1024


def test_there_is_nothing_but_tensors_and_json(tmp_path: Path) -> None:
    run_on_ranks(2, cuts.save, tmp_path, cuts.zero_3)
    folder = tmp_path / "step_00000002"
    names = {
        *(
            f"{stem}-0000{n}-of-00002.safetensors"
            for stem in ("model", "optimizer")
            for n in (1, 2)
        ),
        *("model.index.json", "optimizer.index.json", "state.json"),
    }
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == names
    assert {file.name for file in folder.iterdir()} == names | {"manifest.json"}


def test_training_goes_on_while_files_are_written(tmp_path: Path) -> None:
    of_ranks = run_on_ranks(2, faults.trains_while_saving, tmp_path)
    assert [(before, after) for _, before, after in of_ranks] == [(0, 1), (0, 1)]
    found = run_on_ranks(1, cuts.load, tmp_path, cuts.alone)
    assert_same([saved for saved, _, _ in of_ranks], found)


def test_killed_in_the_middle_of_a_save_the_one_before_is_used(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="SIGKILL"):
        run_on_ranks(2, faults.killed_while_saving, tmp_path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        ".unfinished-step_00000003",
        "step_00000002",
    ]
    assert run_on_ranks(2, faults.newest, tmp_path) == [(2, [])] * 2
    run_on_ranks(2, cuts.load, tmp_path, cuts.zero_3)
    CheckpointFolder(tmp_path).save(4, *cuts.build(cuts.alone, seed=0), {})
    assert not (tmp_path / ".unfinished-step_00000003").exists()


def test_the_others_hear_of_a_rank_that_died_while_saving(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 .*SIGKILL"):
        run_on_ranks(3, faults.one_killed_while_saving, tmp_path)
    for rank in (0, 2):
        assert "one of them has ended" in (tmp_path / f"heard-{rank}").read_text()
    assert CheckpointFolder(tmp_path).complete() == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_on_one_rank_is_an_error_on_all(tmp_path: Path, asynchronous: bool) -> None:
    answers = run_on_ranks(2, faults.disk_full_on_one, tmp_path, asynchronous)
    assert same([text for text, _ in answers]) == (
        f"UserError: could not save the checkpoint of step 3 in {tmp_path}: rank 1: File too "
        f"large; the last good one is {tmp_path}/step_00000002; make room on the disk and start "
        "the same command again"
    )
    assert [names for _, names in answers] == [["step_00000002"]] * 2
    run_on_ranks(2, cuts.load, tmp_path, cuts.zero_3)


def test_a_full_disk_at_the_last_file_is_too(tmp_path: Path) -> None:
    text = same(run_on_ranks(2, faults.no_space_for_the_manifest, tmp_path))
    assert "rank 0: No space left on device; there is no earlier one" in text
    assert list(tmp_path.iterdir()) == []


def test_a_defect_on_one_rank_ends_all(tmp_path: Path) -> None:
    zero, one = run_on_ranks(2, faults.defect_on_one, tmp_path)
    assert (zero, one) == ("RuntimeError: rank 1: KeyError: 'oops'", "KeyError: 'oops'")
    assert CheckpointFolder(tmp_path).complete() == []


def test_a_damaged_shard_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    run_on_ranks(3, cuts.save, tmp_path, cuts.zero_3)
    good = tmp_path / "step_00000002"
    good.rename(tmp_path / "step_00000001")
    run_on_ranks(3, cuts.save, tmp_path, cuts.zero_3)
    (good / "model-00003-of-00003.safetensors").unlink()
    broken = good / "optimizer-00001-of-00003.safetensors"
    content = bytearray(broken.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    of_ranks = run_on_ranks(2, faults.newest, tmp_path)
    assert of_ranks[0] == of_ranks[1]
    step, (refused,) = of_ranks[0]
    assert step == 1
    assert f"{good}/model-00003-of-00003.safetensors is missing" in refused
    assert f"{broken} is corrupt: expected SHA-256" in refused
    (tmp_path / "step_00000001" / "state.json").unlink()
    text = same([refused[0] for _, refused in run_on_ranks(2, faults.newest, tmp_path)])
    assert "no usable checkpoint: " in text
    assert f"{tmp_path}/step_00000001/state.json is missing" in text


def test_the_first_rank_says_what_there_is(tmp_path: Path) -> None:
    CheckpointFolder(tmp_path / "0").save(2, *cuts.build(cuts.alone, seed=0), {"tokens": 5})
    missing = f"UserError: rank 0: {tmp_path}/0/step_00000003/state.json: No such file or directory"
    expected = ([2], {"step": 2, "tokens": 5}, missing)
    assert run_on_ranks(2, faults.on_disks_of_their_own, tmp_path, timeout=30) == [expected] * 2


def test_a_shard_that_is_gone_when_it_is_read_is_named(tmp_path: Path) -> None:
    run_on_ranks(2, cuts.save, tmp_path, cuts.zero_3)
    name = "model-00002-of-00002.safetensors"
    text = same(run_on_ranks(2, faults.load_without_a_file, tmp_path, name))
    assert f"{tmp_path}/step_00000002/{name} is missing; it holds " in text


def test_every_tensor_that_does_not_fit_is_named_and_none_is_loaded(tmp_path: Path) -> None:
    run_on_ranks(2, cuts.save, tmp_path, cuts.zero_3)
    answers = run_on_ranks(2, faults.load_another_model, tmp_path)
    assert all(untouched for _, _, untouched in answers)
    text = same([model for model, _, _ in answers])
    for part in (
        f"rank 1: {tmp_path}/step_00000002 was saved from another model; missing: extra",
        "unexpected: count",
        "misshapen: gain (expected (2,), got (1,))",
        "of another dtype: load (expected torch.float64, got torch.int64)",
    ):
        assert part in text
    text = same([optimizer for _, optimizer, _ in answers])
    assert "holds the optimizer state of another model; misshapen: gain (expected (2,), " in text


def test_ranks_load_what_they_saved_before_the_first_step(tmp_path: Path) -> None:
    num_parameters = len(list(cuts.Model().parameters()))
    assert run_on_ranks(2, faults.before_the_first_step, tmp_path) == [num_parameters] * 2


def test_a_part_is_not_saved_as_the_whole(tmp_path: Path) -> None:
    for text in run_on_ranks(2, faults.alone_with_a_part, tmp_path):
        assert "and this process, which saves alone, holds only (" in text
        assert "group=mesh.everyone" in text
    assert list(tmp_path.iterdir()) == []


def test_one_name_for_different_tensors_is_refused(tmp_path: Path) -> None:
    text = same(run_on_ranks(2, faults.different_tensors_of_one_name, tmp_path))
    assert "own is torch.float32 (2,) on rank 1" in text
    assert list(tmp_path.iterdir()) == []


def test_memory_rises_by_little_beyond_the_tensors(tmp_path: Path) -> None:
    for shard, saving, loading in run_on_ranks(2, faults.peaks, tmp_path):
        assert shard == 64 * 2**20
        assert saving < shard / 4
        assert loading < shard / 4
