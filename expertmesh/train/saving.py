"""One checkpoint on its way to the disk, on all ranks together."""

import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from expertmesh.errors import UserError
from expertmesh.parallel.agreement import Agreement
from expertmesh.parallel.checkpoint import Part, Written, flush_folder, write_json

STATE, MANIFEST = "state.json", "manifest.json"
UNFINISHED = ".unfinished-"


class Saving:
    """Writes a checkpoint's folder: ``run`` here and now, or ``start`` and ``wait``.

    Args:
        parts: What this rank writes.
        state: Goes into ``state.json``.
        final: The folder; there is none, or one that is replaced, until all is written.
        ranks: Those that write.
        last_good: Paths of earlier checkpoints, oldest first, for the message.
        then: What the first rank does once the checkpoint is there.
    """

    def __init__(
        self,
        *,
        parts: Sequence[Part],
        state: Mapping[str, Any],
        final: Path,
        ranks: Agreement,
        last_good: Callable[[], list[str]],
        then: Callable[[], None],
    ) -> None:
        self._parts = parts
        self._state = state
        self._final = final
        self._unfinished = final.with_name(f"{UNFINISHED}{final.name}")
        self._ranks = ranks
        self._last_good = last_good
        self._then = then
        self._error: BaseException | None = None
        # No daemon: a program that ends without waiting still leaves the whole checkpoint.
        self._thread = threading.Thread(target=self._run_in_thread, name="checkpoint")

    def run(self) -> None:
        """Write it.

        Raises:
            UserError: The same on every rank, if one could not; nothing of it is left.
        """
        try:
            with self._ranks.together():
                if self._ranks.first:
                    self._make_folder()
            written: list[Written] = []
            with self._ranks.together():
                written = [part.write(self._unfinished) for part in self._parts]
            everyones = self._ranks.gather(written)
            with self._ranks.together():
                if self._ranks.first:
                    self._complete([file for files in everyones for file in files])
        except UserError as error:
            if self._ranks.first:
                shutil.rmtree(self._unfinished, ignore_errors=True)
            message = self._ranks.gather(self._cannot(error))[0]
            raise UserError(message) from error

    def start(self) -> None:
        """Write it in a thread. The ranks' other communication may go on meanwhile."""
        self._thread.start()

    def wait(self) -> None:
        """Return when it is written; raises what ``run`` would have."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run_in_thread(self) -> None:
        try:
            self.run()
        except BaseException as error:
            self._error = error

    def _make_folder(self) -> None:
        for left_over in self._final.parent.glob(f"{UNFINISHED}*"):
            shutil.rmtree(left_over, ignore_errors=True)
        self._unfinished.mkdir(parents=True)

    def _complete(self, written: list[Written]) -> None:
        """Describe the files, flush all names, and rename the folder: now it is a checkpoint."""
        folder = self._unfinished
        for file in written:
            path = folder / file.name
            if not path.is_file() or path.stat().st_size != file.num_bytes:
                raise UserError(
                    f"{path} was written by another rank and is not to be seen here; set run.dir "
                    "to a folder that all hosts share"
                )
        described = [file for part in self._parts for file in part.write_index(folder)]
        described.append(write_json(folder / STATE, self._state))
        hashes = {file.name: file.sha256 for file in [*written, *described]}
        write_json(folder / MANIFEST, {"files": hashes})
        flush_folder(folder)
        self._put_in_place()
        self._then()

    def _put_in_place(self) -> None:
        """Rename the folder to its name; one that has it goes only when it is replaced."""
        replaced = self._final.with_name(f"{self._unfinished.name}-old")
        if self._final.exists():
            self._final.rename(replaced)
        self._unfinished.rename(self._final)
        flush_folder(self._final.parent)
        shutil.rmtree(replaced, ignore_errors=True)

    def _cannot(self, error: UserError) -> str:
        earlier = self._last_good()
        last = f"the last good one is {earlier[-1]}" if earlier else "there is no earlier one"
        step = self._state["step"]
        return (
            f"could not save the checkpoint of step {step} in {self._final.parent}: {error}; "
            f"{last}; make room on the disk and start the same command again"
        )
