"""MessagePack as flax writes it: tables, lists, numbers, texts, and small arrays.

The format is that of msgpack.org; flax adds extension 1, an array, and 3, a number of one of
its dtypes: both hold another message ``[shape, dtype's name, bytes]``.
"""

import math
import struct
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from expertmesh.errors import UserError

_ARRAY, _SCALAR = 1, 3
# First byte of what follows with a number of this format, and what it is the length of.
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_BYTES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
_TEXTS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_LISTS = {0xDC: ">H", 0xDD: ">I"}
_TABLES = {0xDE: ">H", 0xDF: ">I"}
_EXTENSIONS = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def unpack(message: bytes) -> Any:
    """What a message says.

    Raises:
        UserError: If it ends early, goes on after its end, or has a part of no known kind.
    """
    reader = _Reader(message)
    try:
        value = reader.value()
    except (struct.error, IndexError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"is no MessagePack: {error}") from error
    if reader.place != len(message):
        raise UserError(f"is no MessagePack: {len(message) - reader.place} bytes after its end")
    return value


def pack(value: Any) -> bytes:
    """A message of tables with texts as keys, lists, texts, whole numbers and None."""
    if value is None:
        return b"\xc0"
    if isinstance(value, int) and not isinstance(value, bool):
        return b"\xd3" + struct.pack(">q", value)
    if isinstance(value, str):
        text = value.encode()
        return b"\xdb" + struct.pack(">I", len(text)) + text
    if isinstance(value, list | tuple):
        return b"\xdd" + struct.pack(">I", len(value)) + b"".join(map(pack, value))
    if isinstance(value, dict):
        items = b"".join(pack(key) + pack(entry) for key, entry in value.items())
        return b"\xdf" + struct.pack(">I", len(value)) + items
    raise TypeError(f"cannot pack a {type(value).__name__}")


class _Reader:
    def __init__(self, message: bytes) -> None:
        self.message = message
        self.place = 0

    def value(self) -> Any:
        kind = self._take(1)[0]
        if kind < 0x80:
            return kind
        if kind >= 0xE0:
            return kind - 0x100
        if kind < 0x90:
            return self._table(kind & 0x0F)
        if kind < 0xA0:
            return self._list(kind & 0x0F)
        if kind < 0xC0:
            return self._take(kind & 0x1F).decode()
        if kind in _CONSTANTS:
            return _CONSTANTS[kind]
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        return self._long(kind)

    def _long(self, kind: int) -> Any:
        """What begins with its length."""
        readers: tuple[tuple[dict[int, str], Callable[[int], Any]], ...] = (
            (_BYTES, self._take),
            (_TEXTS, lambda length: self._take(length).decode()),
            (_LISTS, self._list),
            (_TABLES, self._table),
            (_EXTENSIONS, self._extension),
        )
        for formats, read in readers:
            if kind in formats:
                return read(self._number(formats[kind]))
        if kind in _FIXED_EXTENSIONS:
            return self._extension(_FIXED_EXTENSIONS[kind])
        raise UserError(f"is no MessagePack: no part begins with {kind:#x}")

    def _extension(self, length: int) -> Any:
        kind = self._number(">b")
        content = self._take(length)
        if kind not in (_ARRAY, _SCALAR):
            raise UserError(f"extension {kind} of MessagePack is not one of flax's arrays")
        shape, dtype, values = unpack(content)
        array = _array(values, dtype, tuple(shape))
        return array if kind == _ARRAY else array.item()

    def _list(self, length: int) -> list[Any]:
        return [self.value() for _ in range(length)]

    def _table(self, length: int) -> dict[Any, Any]:
        table = {}
        for _ in range(length):
            key = self.value()
            table[key] = self.value()
        return table

    def _number(self, kind: str) -> Any:
        return struct.unpack(kind, self._take(struct.calcsize(kind)))[0]

    def _take(self, length: int) -> bytes:
        part = self.message[self.place : self.place + length]
        if len(part) < length:
            raise UserError("is no MessagePack: it ends early")
        self.place += length
        return part


def _array(values: bytes, dtype: str, shape: tuple[int, ...]) -> Tensor:
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise UserError(f"holds an array of dtype {dtype!r}, which torch does not have")
    if math.prod(shape) * kind.itemsize != len(values):
        raise UserError(f"holds an array of shape {shape} in {len(values)} bytes")
    if not values:
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(bytearray(values), dtype=kind).view(shape)
