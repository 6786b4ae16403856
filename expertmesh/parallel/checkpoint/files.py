"""Files that are on the disk when a function returns, and what they hold by hash.

Tensors are written as safetensors: the length of a JSON header as 8 bytes, little endian, the
header, and the tensors' bytes. They are written here, and not by the package that reads them,
because that one takes all bytes at once: a second copy of what is saved. One tensor at a time is
enough, and is hashed on its way.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertmesh.errors import UserError

DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Readers want the header to end at a multiple of this, and every tensor aligned to its elements.
_ALIGNMENT = 8


@dataclass(frozen=True)
class Written:
    """A file that is on the disk.

    Attributes:
        name: Its name in the folder.
        sha256: Of its content, in hex.
        num_bytes: Its length.
    """

    name: str
    sha256: str
    num_bytes: int


def dtype_name(dtype: torch.dtype) -> str:
    """What a dtype is called in a file's header.

    Raises:
        UserError: If the format has no such dtype.
    """
    if dtype not in _NAMES:
        raise UserError(f"{dtype} cannot be saved; expected one of {', '.join(map(str, _NAMES))}")
    return _NAMES[dtype]


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> Written:
    """Write plain tensors of any device as safetensors, to the disk itself.

    Raises:
        OSError: If the system refuses, for example because the disk is full.
    """
    # Wide elements first: so each begins at a multiple of its size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    head = header({name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in order})
    pieces = (as_bytes(tensors[name].detach().cpu()).numpy().data for name in order)
    return _write(file, itertools.chain([head], pieces))


def header(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> bytes:
    """What a file of safetensors begins with.

    Args:
        tensors: Dtype and shape of each tensor, in the order in which their bytes follow.
        metadata: Said beside them.

    Raises:
        UserError: If the format has no such dtype.
    """
    content: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        content[name] = {
            "dtype": dtype_name(dtype),
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def as_bytes(values: Tensor) -> Tensor:
    """A tensor's bytes in the order of its elements, uint8; uncopied where they lie so."""
    whole = values.contiguous()
    # Not `reshape(-1)`: what has one element counts as contiguous with any stride, and keeps it.
    return whole.as_strided((whole.numel(),), (1,)).view(torch.uint8)


def write_json(file: Path, content: Mapping[str, Any], *, indent: int | None = 1) -> Written:
    """Write JSON to the disk itself."""
    text = json.dumps(content, indent=indent, separators=None if indent else (",", ":"))
    return _write(file, [f"{text}\n".encode()])


def flush_folder(path: Path) -> None:
    """Make names durable; systems without folder handles (Windows) do that by themselves."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sha256(file: Path) -> str:
    """Of a file's content, in hex."""
    with open(file, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _write(file: Path, pieces: Iterable[bytes | memoryview]) -> Written:
    digest = hashlib.sha256()
    num_bytes = 0
    with open(file, "wb") as handle:
        for piece in pieces:
            handle.write(piece)
            digest.update(piece)
            num_bytes += len(piece)
        handle.flush()
        os.fsync(handle.fileno())
    return Written(file.name, digest.hexdigest(), num_bytes)
