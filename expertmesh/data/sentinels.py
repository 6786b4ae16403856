"""Tokenizers with sentinels: names for the holes that denoising objectives leave in a text."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, final

import numpy as np

from expertmesh.data.cache import file_sha256
from expertmesh.data.tokenizer import ByteTokenizer, Ids, Tokenizer, printable, without_surrogates

BYTE_SENTINELS = "byte-ul2"
"""Name of bytes with sentinels in a run file."""
_EXTRA_IDS = 100
_UMT5_PIECES, _UMT5_EXTRA_IDS = 256_000, 300


@final
class ByteSentinelTokenizer(Tokenizer):
    """Bytes, end of document and padding as in ``ByteTokenizer``, then 126 sentinels.

    The first sentinel is the last id, as in T5.
    """

    vocab_size = 384
    eos_id = 256
    pad_id = 257
    sentinel_ids = range(383, 257, -1)
    identity = BYTE_SENTINELS

    def __init__(self) -> None:
        self._bytes = ByteTokenizer()

    def encode(self, text: str) -> Ids:
        return self._bytes.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._bytes.decode(ids)

    def token_text(self, token_id: int) -> str:
        if token_id in self.sentinel_ids:
            return f"<extra_id_{self.sentinel_ids.index(token_id)}>"
        return self._bytes.token_text(token_id)


@final
class T5Tokenizer(Tokenizer):
    """A SentencePiece model of the T5 family: T5, mT5, umT5.

    Padding is 0 and end of text 1. T5's decoders read the padding id first, so it stands before
    each row here: it is ``bos_id``. The extra ids follow the pieces, ``<extra_id_0>`` last (Raffel
    et al., 2020, https://arxiv.org/abs/1910.10683); umT5 has 256,000 pieces and 300 of them (Chung
    et al., 2023, https://arxiv.org/abs/2304.09151).

    Names of special tokens within a text are text: ``</s>`` is read as three pieces.

    Args:
        path: The ``.model`` file. ``extra_ids`` of a ``tokenizer_config.json`` beside it says how
            many there are; otherwise umT5 has 300 and the others 100.
        inner: What the sentencepiece library makes of it; ``is_t5`` holds for it.
    """

    bos_id = 0
    eos_id = 1
    pad_id = 0

    def __init__(self, path: Path, inner: Any) -> None:
        self._inner = inner
        self.num_pieces: int = inner.vocab_size()
        self.vocab_size = self.num_pieces + _extra_ids(path, self.num_pieces)
        self.sentinel_ids = range(self.vocab_size - 1, self.num_pieces - 1, -1)
        self.identity = f"t5:{self.vocab_size}:{file_sha256(path)}"

    def encode(self, text: str) -> Ids:
        return np.asarray(self._inner.encode(without_surrogates(text)), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        # A model's rows may go beyond the vocabulary: 256,384 of them for umT5's 256,300 ids.
        return str(self._inner.decode([int(i) for i in ids if int(i) < self.num_pieces]))

    def token_text(self, token_id: int) -> str:
        if token_id >= self.vocab_size:
            return f"<{token_id}>"
        if token_id >= self.num_pieces:
            return f"<extra_id_{self.vocab_size - 1 - token_id}>"
        return printable(self._inner.id_to_piece(token_id).replace("\u2581", " "))


def is_t5(inner: Any) -> bool:
    """Whether a SentencePiece model has the special ids of the T5 family."""
    return bool(inner.pad_id() == 0 and inner.eos_id() == 1 and inner.bos_id() not in (0, 1))


def _extra_ids(path: Path, num_pieces: int) -> int:
    beside = path.with_name("tokenizer_config.json")
    if beside.is_file():
        given = json.loads(beside.read_text(encoding="utf-8")).get("extra_ids")
        if isinstance(given, int):
            return given
    return _UMT5_EXTRA_IDS if num_pieces == _UMT5_PIECES else _EXTRA_IDS
