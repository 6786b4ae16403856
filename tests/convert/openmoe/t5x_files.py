"""t5x checkpoints written by tensorstore alone, as t5x itself writes them."""

import math
import struct
from pathlib import Path
from typing import Any

import tensorstore
import torch
from torch import Tensor


def write(
    folder: Path,
    tensors: dict[str, Tensor],
    *,
    index: bool = True,
    driver: str = "file",
    pieces: int = 2,
    inline: tuple[str, ...] = (),
    compressor: str | None = "gzip",
) -> Path:
    """A checkpoint of these arrays and of an optimizer's state that nobody asked for.

    Args:
        folder: Its path.
        tensors: By name below ``target``.
        index: Whether it has one.
        driver: That the index names: t5x has written ``file``, ``gfile`` and ``gcs``.
        pieces: Chunks along each dim, at most.
        inline: Names of arrays that are in the index itself.
        compressor: Of the chunks.
    """
    folder.mkdir(parents=True)
    target: dict[str, Any] = {}
    for name, tensor in tensors.items():
        *tables, last = name.split("/")
        table = target
        for key in tables:
            table = table.setdefault(key, {})
        if name in inline:
            table[last] = tensor
            continue
        chunks = [max(1, math.ceil(size / pieces)) for size in tensor.shape]
        path = f"target.{name.replace('/', '.')}"
        array(folder / path, tensor, chunks, compressor)
        table[last] = spec(path, tensor, chunks, driver)
    array(folder / "state.param_states.decoder.decoder_norm.scale.v", torch.ones(3), [3])
    state = {"step": torch.tensor(7, dtype=torch.int32), "param_states": {}}
    if index:
        content = {"version": 3, "optimizer": {"state": state, "target": target}}
        (folder / "checkpoint").write_bytes(packed(content))
    return folder


def array(folder: Path, tensor: Tensor, chunks: list[int], compressor: str | None = "gzip") -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    store = tensorstore.open(
        {
            "driver": "zarr",
            "dtype": dtype,
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            "metadata": {
                "shape": list(tensor.shape),
                "chunks": chunks,
                "compressor": compressor and {"id": compressor},
            },
        },
        create=True,
    ).result()
    values = tensor.contiguous()
    if tensor.dtype == torch.bfloat16:
        store.write(values.view(torch.int16).numpy().view(store.dtype.numpy_dtype)).result()
    else:
        store.write(values.numpy()).result()


def spec(path: str, tensor: Tensor, chunks: list[int], driver: str) -> dict[str, Any]:
    said = {
        "driver": "zarr",
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "metadata": {
            "shape": list(tensor.shape),
            "chunks": chunks,
            "compressor": {"id": "gzip", "level": 1},
        },
    }
    if driver == "gcs":
        kvstore = {"driver": "gcs", "bucket": "t5x-dummy-bucket"}
        return said | {"kvstore": kvstore, "path": path}
    return said | {"kvstore": {"driver": driver, "path": f"{path}/"}}


def packed(value: Any) -> bytes:
    """MessagePack in its shortest form, as its own package writes it."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        raw = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        content = b"\x93" + packed(list(value.shape)) + packed(dtype) + _bytes(raw)
        kind = 1 if value.dim() else 3
        return b"\xc8" + struct.pack(">Hb", len(content), kind) + content
    if isinstance(value, str):
        text = value.encode()
        head = bytes([0xA0 | len(text)]) if len(text) < 32 else b"\xd9" + bytes([len(text)])
        return head + text
    if isinstance(value, int):
        return bytes([value]) if value < 128 else b"\xcd" + struct.pack(">H", value)
    if isinstance(value, list):
        return bytes([0x90 | len(value)]) + b"".join(map(packed, value))
    head = bytes([0x80 | len(value)])
    if len(value) > 15:
        head = b"\xde" + struct.pack(">H", len(value))
    return head + b"".join(packed(key) + packed(entry) for key, entry in value.items())


def _bytes(raw: bytes) -> bytes:
    return b"\xc5" + struct.pack(">H", len(raw)) + raw
