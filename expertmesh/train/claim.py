"""A run's folder taken for training: others' files in it are left alone, one process has it."""

import errno
import fcntl
import json
import os
import socket
import weakref
from pathlib import Path
from typing import final

from expertmesh.errors import UserError
from expertmesh.train.config import CONFIG, RunFile
from expertmesh.train.expert_tokens import EXPERT_TOKENS
from expertmesh.train.logger import METRICS, ROUTING
from expertmesh.train.provenance import DATA
from expertmesh.train.run_file import load_run_file

LOCK = ".lock"
# Shared file systems that are mounted without locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def claim_folder(run: RunFile, *, begun: bool) -> "FolderLock":
    """Make the run's folder and keep other processes from training in it.

    Args:
        run: The run file.
        begun: Whether the folder has a checkpoint, which only a run writes.

    Returns:
        What to hold on to while the run goes on.

    Raises:
        UserError: If a file that a run would write over is not a run's, or another process trains
            in the folder.
    """
    _refuse_other_files(run, begun=begun)
    run.folder.mkdir(parents=True, exist_ok=True)
    path = run.folder.resolve() / LOCK
    lock = _HELD.get(path)
    if lock is None or not lock.is_of(path):
        lock = _HELD[path] = FolderLock(path)
    return lock


@final
class FolderLock:
    """Of a folder, as long as this object lives; the kernel ends it with the process.

    Args:
        path: The file that is locked; it stays, since who opened it may be waiting.

    Raises:
        UserError: If another process has it, naming that one.
    """

    def __init__(self, path: Path) -> None:
        self._number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(self, os.close, self._number)
        try:
            fcntl.flock(self._number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who = os.pread(self._number, 200, 0).decode(errors="replace").strip()
            raise UserError(
                f"another process is training in {path.parent}{who and f' ({who})'}; wait until "
                "it ends, or set run.dir to another folder"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        os.ftruncate(self._number, 0)
        os.pwrite(self._number, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def is_of(self, path: Path) -> bool:
        """Whether this very file is there still, and not another of its name."""
        return path.exists() and os.path.samestat(os.fstat(self._number), path.stat())


# A process may build a run again, as one that continues does, and does not lock itself out.
_HELD: "weakref.WeakValueDictionary[Path, FolderLock]" = weakref.WeakValueDictionary()


def _refuse_other_files(run: RunFile, *, begun: bool) -> None:
    present = [path for name in _OURS if (path := run.folder / name).exists()]
    sources = [Path(source).expanduser() for source in run.data.mix or [run.data.source] if source]
    other = [
        path.name
        for path in present
        if any(source.exists() and source.samefile(path) for source in sources)
        or not (begun or _is_a_runs(path))
    ]
    if other:
        raise UserError(
            f"run.dir={run.run.dir!r} holds other files ({', '.join(other)}), which the run would "
            "write over; give the path of a new folder"
        )


def _is_a_runs(path: Path) -> bool:
    """Whether a file is such as a run writes; what a crash cut short too."""
    try:
        if path.name == CONFIG:
            load_run_file(path)
            return True
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else text
    except ValueError:
        return False
    if isinstance(content, str):
        return content.startswith(_FIRST_WORD) or _FIRST_WORD.startswith(content)
    return isinstance(content, dict) and _OURS[path.name] in content


_FIRST_WORD = '{"step": '
# The JSON files with a key that each has.
_OURS = {CONFIG: "", DATA: "tokenizer_identity", METRICS: "", ROUTING: "", EXPERT_TOKENS: "layers"}
