"""What ranks do in tests of checkpoints that go wrong; each returns what became of it."""

import errno
import os
import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from expertmesh.errors import UserError
from expertmesh.parallel.agreement import Agreement
from expertmesh.parallel.checkpoint import save
from expertmesh.parallel.mesh import Mesh
from expertmesh.train.checkpoint import Checkpoint, CheckpointFolder
from tests.parallel import cuts


def _begin(path: Path) -> tuple[CheckpointFolder, cuts.Model, torch.optim.Optimizer]:
    model, optimizer = cuts.build(cuts.zero_3, seed=0)
    cuts.train(model, optimizer)
    return CheckpointFolder(path, group=Mesh().everyone), model, optimizer


def message(call: Any, *args: Any, **kwargs: Any) -> str:
    """What a call raises."""
    with pytest.raises((UserError, RuntimeError)) as error:
        call(*args, **kwargs)
    return f"{type(error.value).__name__}: {error.value}"


def killed_while_saving(path: Path) -> None:
    """Save step 2, then die in the middle of step 3, on all ranks."""
    folder, model, optimizer = _begin(path)
    folder.save(2, model, optimizer, {"tokens": 5})
    flushed = 0

    def die_at_the_second_file(handle: int) -> None:
        nonlocal flushed
        flushed += 1
        if flushed == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    pytest.MonkeyPatch().setattr(os, "fsync", die_at_the_second_file)
    folder.save(3, model, optimizer, {"tokens": 6})


def one_killed_while_saving(path: Path) -> str:
    """Rank 1 dies while step 2 is saved in a thread; the others hear of it."""
    folder, model, optimizer = _begin(path)

    def die(handle: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def at_once(handle: int) -> None:
        """The others have no time to wait for a disk: they are ended soon after the first."""

    pytest.MonkeyPatch().setattr(os, "fsync", die if dist.get_rank() == 1 else at_once)
    folder.save(2, model, optimizer, {}, asynchronous=True)
    text = message(folder.wait)
    (path / f"heard-{dist.get_rank()}").write_text(text)
    return text


def disk_full_on_one(path: Path, asynchronous: bool) -> tuple[str, list[str]]:
    """Save step 2; fail to save step 3 because rank 1 may not write more than a few bytes."""
    folder, model, optimizer = _begin(path)
    folder.save(2, model, optimizer, {"tokens": 5})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    if asynchronous:
        folder.save(3, model, optimizer, {}, asynchronous=True)
        text = message(folder.save, 4, model, optimizer, {})
    else:
        text = message(folder.save, 3, model, optimizer, {})
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    dist.barrier()
    return text, sorted(os.listdir(path))


def no_space_for_the_manifest(path: Path) -> str:
    """The first rank fails where only it writes."""
    folder, model, optimizer = _begin(path)

    def no_space(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("expertmesh.train.saving.write_json", no_space)
        return message(folder.save, 3, model, optimizer, {})


def defect_on_one(path: Path) -> str:
    """Rank 1 fails in a way that is nobody's mistake but ours."""
    folder, model, optimizer = _begin(path)

    def defect(*args: object) -> None:
        raise KeyError("oops")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr("expertmesh.parallel.checkpoint.save.write_tensors", defect)
        with pytest.raises((RuntimeError, KeyError)) as error:
            folder.save(3, model, optimizer, {})
    return f"{error.type.__name__}: {error.value}"


def newest(path: Path) -> tuple[int | None, list[str]]:
    """Step of the newest good checkpoint and the refused ones; None and the error without one."""
    try:
        checkpoint, refused = CheckpointFolder(path, group=Mesh().everyone).newest_valid()
    except UserError as error:
        return None, [str(error)]
    assert checkpoint is not None
    return checkpoint.step, refused


def load_another_model(path: Path) -> tuple[str, str, bool]:
    """Load into a model of another shape, dtype and names, on rank 1 only in part."""
    model, optimizer = cuts.build(cuts.alone, seed=1)
    model.gain = torch.nn.Parameter(torch.zeros(2))
    model.load = model.load.double()
    if dist.get_rank() == 1:
        model.extra = torch.nn.Parameter(torch.zeros(3))
    del model.count
    optimizer = torch.optim.AdamW(model.parameters())
    before = cuts.values(model, optimizer)
    checkpoint, _ = CheckpointFolder(path, group=Mesh().everyone).newest_valid()
    assert checkpoint is not None
    messages = (
        message(checkpoint.load_model, model),
        message(checkpoint.load_optimizer, model, optimizer),
    )
    after = cuts.values(model, optimizer)
    untouched = all(torch.equal(before[name], after[name]) for name in before)
    return *messages, untouched


def on_disks_of_their_own(path: Path) -> tuple[list[int], dict[str, Any], str]:
    """What a rank is told where only the first rank's folder holds checkpoints."""
    group, own = Mesh().everyone, path / str(dist.get_rank())
    state = Checkpoint(own / "step_00000002", 2, Agreement(group)).state()
    lacking = message(Checkpoint(own / "step_00000003", 3, Agreement(group)).state)
    return CheckpointFolder(own, group=group).steps(), state, lacking


def load_without_a_file(path: Path, name: str) -> str:
    """A file is gone after the hashes were compared."""
    model, _ = cuts.build(cuts.zero_3, seed=1)
    checkpoint, _ = CheckpointFolder(path, group=Mesh().everyone).newest_valid()
    assert checkpoint is not None
    dist.barrier()
    if dist.get_rank() == 0:
        (checkpoint.path / name).unlink()
    dist.barrier()
    return message(checkpoint.load_model, model)


def trains_while_saving(path: Path) -> tuple[cuts.Values, int, int]:
    """Files are written only after training went on, over the ranks' usual group."""
    folder, model, optimizer = _begin(path)
    before = cuts.values(model, optimizer)
    may_write = threading.Event()
    write = save.write_tensors

    def write_later(*args: Any) -> Any:
        assert may_write.wait(30)
        return write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(save, "write_tensors", write_later)
        folder.save(2, model, optimizer, {"tokens": 5}, asynchronous=True)
        cuts.train(model, optimizer)
        dist.all_reduce(torch.ones(3))
        num_before = len(folder.complete())
        may_write.set()
        folder.wait()
    return before, num_before, len(folder.complete())


def before_the_first_step(path: Path) -> int:
    """Save and load an optimizer that has no state yet, and go on; how much it has then."""
    group = Mesh().everyone
    folder = CheckpointFolder(path, group=group)
    folder.save(1, *cuts.build(cuts.zero_3, seed=0), {})
    checkpoint, _ = folder.newest_valid()
    assert checkpoint is not None
    model, optimizer = cuts.build(cuts.zero_3, seed=1)
    checkpoint.load_model(model)
    checkpoint.load_optimizer(model, optimizer)
    assert not optimizer.state
    cuts.train(model, optimizer)
    return len(optimizer.state)


def alone_with_a_part(path: Path) -> str:
    """Each rank saves what it holds without saying who holds the rest."""
    model, optimizer = cuts.build(cuts.zero_3, seed=0)
    return message(CheckpointFolder(path).save, 3, model, optimizer, {})


def different_tensors_of_one_name(path: Path) -> str:
    """Ranks that mean different things by one name."""
    folder, model, optimizer = _begin(path)
    model.register_buffer("own", torch.zeros(1 + dist.get_rank()))
    return message(folder.save, 3, model, optimizer, {})


def peaks(path: Path) -> tuple[int, int, int]:
    """Bytes of one shard, and by how much memory rose while it was saved and while loaded."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def shards(whole: torch.Tensor, dim: int) -> nn.ParameterList:
        tensors = (distribute_tensor(whole, mesh, [Shard(dim)]) for _ in range(16))
        return nn.ParameterList(nn.Parameter(tensor) for tensor in tensors)

    rows = torch.arange(1024.0).unsqueeze(1).expand(1024, 2048).contiguous()
    model, other = shards(rows, 0), shards(torch.full_like(rows, -1), 1)
    optimizer = torch.optim.SGD(model.parameters())
    folder = CheckpointFolder(path, group=Mesh().everyone)
    with _Peak() as saving:
        folder.save(1, model, optimizer, {})
    checkpoint, _ = folder.newest_valid()
    assert checkpoint is not None
    with pytest.MonkeyPatch.context() as patch, _Peak() as loading:
        patch.setattr("expertmesh.parallel.checkpoint.load.MAPPED_BYTES", 2**22)
        checkpoint.load_model(other)
    assert all(torch.equal(param.to_local()[:, 0], rows[:, 0]) for param in other)
    return sum(param.to_local().nbytes for param in other), saving.rise, loading.rise


class _Peak:
    """By how much this process's memory rose within a block."""

    rise = 0

    def __enter__(self) -> "_Peak":
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        self._before = self._peak()
        return self

    def __exit__(self, *error: object) -> None:
        self.rise = self._peak() - self._before

    def _peak(self) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
