"""Writing a published folder, tensor after tensor, none of them ever whole in memory.

``model-00001-of-00003.safetensors`` and so on, an index, the configuration, and a manifest with
the SHA-256 of every tensor's bytes. The folder is written beside its place and renamed last.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from expertmesh.convert.source import INDEX, SINGLE, Stored
from expertmesh.convert.tokenizer import name_beside_model
from expertmesh.errors import UserError
from expertmesh.parallel.checkpoint import flush_folder, write_json
from expertmesh.parallel.checkpoint.files import DTYPES, as_bytes, dtype_name, header

CONFIG, MANIFEST = "config.json", "manifest.json"
SHARD_BYTES = 5 * 10**9
UNFINISHED = ".unfinished-"


def aligned(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The same with wide elements first, so that each begins at a multiple of its size."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))


def shards(tensors: Mapping[str, Stored], most_bytes: int = SHARD_BYTES) -> dict[str, list[str]]:
    """Which tensors go into which file, in order.

    Args:
        tensors: All of them, as ``aligned`` gives them.
        most_bytes: Of a file; a larger tensor has a file of its own.
    """
    files: list[list[str]] = [[]]
    room = most_bytes
    for name, stored in tensors.items():
        size = math.prod(stored.shape) * stored.dtype.itemsize
        if size > room and files[-1]:
            files.append([])
            room = most_bytes
        files[-1].append(name)
        room -= size
    if len(files) == 1:
        return {SINGLE: files[0]}
    return {
        f"model-{number + 1:05d}-of-{len(files):05d}.safetensors": names
        for number, names in enumerate(files)
    }


class ShardWriter:
    """One safetensors file, whose bytes come in order.

    Args:
        file: Its path.
        tensors: What it will hold, in order.

    Attributes:
        hashes: SHA-256 in hex of each tensor's bytes that are written.
    """

    def __init__(self, file: Path, tensors: Mapping[str, Stored]) -> None:
        self.hashes: dict[str, str] = {}
        self._digest: Any = hashlib.sha256()
        self._handle = open(file, "wb")  # noqa: SIM115  # closed by `close`
        self._handle.write(header(tensors, {"format": "pt"}))

    def write(self, values: Tensor) -> None:
        """The next bytes of the tensor that is being written."""
        piece = as_bytes(values).numpy().data
        self._handle.write(piece)
        self._digest.update(piece)

    def end_of(self, name: str) -> None:
        """All bytes of a tensor are written."""
        self.hashes[name] = self._digest.hexdigest()
        self._digest = hashlib.sha256()

    def close(self) -> None:
        """To the disk itself."""
        self._handle.flush()
        os.fsync(self._handle.fileno())
        self._handle.close()


def unfinished(final: Path) -> Path:
    """Where a folder is written before it has its name."""
    return final.with_name(f"{UNFINISHED}{final.name}")


def begin(final: Path) -> Path:
    """An empty folder beside ``final``, to write into.

    Raises:
        UserError: If ``final`` holds anything but such a folder written earlier.
    """
    if final.exists() and not _may_go(final):
        raise UserError(f"{final} holds other files; give the path of a new folder")
    folder = unfinished(final)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _may_go(folder: Path) -> bool:
    """Whether a folder is empty, or was written here: other programs have manifests too."""
    try:
        return not any(folder.iterdir()) or bool(read_manifest(folder))
    except (UserError, NotADirectoryError):
        return False


def describe(
    folder: Path,
    files: Mapping[str, Sequence[str]],
    tensors: Mapping[str, Stored],
    hashes: Mapping[str, str],
    config: Mapping[str, Any],
) -> None:
    """Write the configuration, the index and the manifest.

    Args:
        folder: What ``begin`` gave.
        files: Names of tensors by file.
        tensors: Dtype and shape of each.
        hashes: SHA-256 of each one's bytes, in hex.
        config: Goes into ``config.json``.
    """
    for file in files:
        if not (folder / file).is_file():
            raise UserError(
                f"{folder / file} was written by another rank and is not to be seen here; save "
                "to a folder that all hosts share"
            )
    write_json(folder / CONFIG, config, indent=2)
    if SINGLE not in files:
        size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in tensors.values())
        place = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(place.items()))}
        write_json(folder / INDEX, index, indent=2)
    write_manifest(folder, tensors, hashes)


def write_manifest(folder: Path, tensors: Mapping[str, Stored], hashes: Mapping[str, str]) -> None:
    """Write dtype, shape and SHA-256 of every tensor."""
    described = {
        name: {"dtype": dtype_name(dtype), "shape": list(shape), "sha256": hashes[name]}
        for name, (dtype, shape) in tensors.items()
    }
    write_json(folder / MANIFEST, {"tensors": described})


def read_manifest(folder: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """What ``write_manifest`` was given.

    Raises:
        UserError: If there is none, or it cannot be read.
    """
    path = folder / MANIFEST
    try:
        described = json.loads(path.read_text())["tensors"].items()
        tensors = {name: Stored(DTYPES[s["dtype"]], tuple(s["shape"])) for name, s in described}
        hashes = {name: str(saved["sha256"]) for name, saved in described}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read as a manifest of tensors: {error!r}") from error
    return tensors, hashes


def copy_into(folder: Path, files: Iterable[Path]) -> None:
    """Copy a tokenizer's files."""
    for file in files:
        shutil.copyfile(file, folder / name_beside_model(file))


def finish(folder: Path, final: Path) -> None:
    """Make a folder durable and give it its name; one that was written there before goes."""
    flush_folder(folder)
    if final.exists():
        # Renamed first: whoever looks meanwhile must not find half of it under its name.
        leaving = final.with_name(f"{UNFINISHED}{final.name}-old")
        shutil.rmtree(leaving, ignore_errors=True)
        final.rename(leaving)
        folder.rename(final)
        shutil.rmtree(leaving, ignore_errors=True)
    else:
        folder.rename(final)
    flush_folder(final.parent)
