"""MessagePack, against its specification."""

import struct
from typing import Any

import pytest
import torch

from expertmesh.convert.msgpack import pack, unpack
from expertmesh.errors import UserError


@pytest.mark.parametrize(
    ("message", "value"),
    [
        (b"\x00", 0),
        (b"\x7f", 127),
        (b"\xff", -1),
        (b"\xe0", -32),
        (b"\xcc\xff", 255),
        (b"\xcd\x01\x00", 256),
        (b"\xce\x00\x01\x00\x00", 65536),
        (b"\xcf" + struct.pack(">Q", 2**40), 2**40),
        (b"\xd0\x80", -128),
        (b"\xd1\xff\x00", -256),
        (b"\xd2" + struct.pack(">i", -(2**20)), -(2**20)),
        (b"\xd3" + struct.pack(">q", -(2**40)), -(2**40)),
        (b"\xca" + struct.pack(">f", 0.5), 0.5),
        (b"\xcb" + struct.pack(">d", 0.1), 0.1),
        (b"\xc0", None),
        (b"\xc2", False),
        (b"\xc3", True),
        (b"\xa3abc", "abc"),
        (b"\xd9\x02\xc3\xa9", "é"),
        (b"\xda\x00\x01a", "a"),
        (b"\xdb\x00\x00\x00\x01a", "a"),
        (b"\xc4\x02\x00\xff", b"\x00\xff"),
        (b"\xc5\x00\x01x", b"x"),
        (b"\xc6\x00\x00\x00\x00", b""),
        (b"\x92\x01\xa1a", [1, "a"]),
        (b"\xdc\x00\x01\x05", [5]),
        (b"\xdd\x00\x00\x00\x01\x05", [5]),
        (b"\x82\xa1a\x01\xa1b\x90", {"a": 1, "b": []}),
        (b"\xde\x00\x01\xa1a\x80", {"a": {}}),
        (b"\xdf\x00\x00\x00\x01\xa1a\x01", {"a": 1}),
    ],
)
def test_every_kind_of_part(message: bytes, value: Any) -> None:
    assert unpack(message) == value


def array(shape: bytes, dtype: bytes, raw: bytes) -> bytes:
    return b"\x93" + shape + bytes([0xA0 | len(dtype)]) + dtype + b"\xc4" + bytes([len(raw)]) + raw


def extension(kind: int, content: bytes) -> bytes:
    return b"\xc7" + bytes([len(content), kind]) + content


def test_arrays_and_numbers_of_flax() -> None:
    content = array(b"\x92\x02\x01", b"float32", struct.pack("<2f", 1.5, -2.0))
    found = unpack(extension(1, content))
    assert torch.equal(found, torch.tensor([[1.5], [-2.0]]))
    content = array(b"\x91\x03", b"bfloat16", b"\x80\x3f" * 3)
    found = unpack(b"\xc8\x00" + bytes([len(content)]) + b"\x01" + content)
    assert torch.equal(found, torch.ones(3, dtype=torch.bfloat16))
    content = array(b"\x90", b"int32", struct.pack("<i", 7))
    assert unpack(extension(3, content)) == 7
    content = array(b"\x91\x00", b"float32", b"")
    assert unpack(extension(1, content)).shape == (0,)


@pytest.mark.parametrize(
    "value", [None, 0, -5, 2**40, "", "a" * 300, [1, ["b", None]], {"a": {"b": []}, "c": 1}]
)
def test_there_and_back(value: Any) -> None:
    assert unpack(pack(value)) == value


def test_what_cannot_be_packed() -> None:
    with pytest.raises(TypeError, match="cannot pack a float"):
        pack({"a": 0.5})


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"", "ends early"),
        (b"\xa3ab", "ends early"),
        (b"\x92\x01", "ends early"),
        (b"\xcd\x01", "ends early"),
        (b"\x01\x02", "1 bytes after its end"),
        (b"\xc1", "no part begins with 0xc1"),
        (b"\xa1\xff", "is no MessagePack"),
        (b"\xd4\x09\x00", "extension 9"),
        (extension(1, array(b"\x91\x01", b"quux", b"1234")), "dtype 'quux'"),
        (extension(1, array(b"\x91\x02", b"float32", b"1234")), r"\(2,\) in 4 bytes"),
    ],
)
def test_spoiled_messages(message: bytes, text: str) -> None:
    with pytest.raises(UserError, match=text):
        unpack(message)
