"""A corpus as two streams of token ids on disk, one to train on and one held out."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertmesh.data.cache import building, cache_root, made_once, verified
from expertmesh.data.fetch import Say, say_to_stderr
from expertmesh.data.split import split
from expertmesh.data.text import Corpus
from expertmesh.data.tokenizer import Tokenizer
from expertmesh.errors import UserError

# Change when the files' layout, the split or what is read of a text changes: old caches are then
# not read.
_FORMAT = 2
_DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class TokenStream:
    """Documents laid end to end, each closed by the end-of-document token.

    Attributes:
        tokens: ``(num_tokens,)``, memory-mapped.
        offsets: ``(num_documents + 1,)`` int64, where documents start; the last is the end.
    """

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True, kw_only=True)
class SplitTokens:
    """Both streams and what is known about them."""

    train: TokenStream
    val: TokenStream
    facts: dict[str, Any]
    """Counts and the kind of split, in JSON values."""


def tokenize(
    corpus: Corpus,
    tokenizer: Tokenizer,
    *,
    val_fraction: float,
    cache: str | PathLike[str] | None = None,
    say: Say = say_to_stderr,
) -> SplitTokens:
    """Token streams of a corpus, made once and then mapped from the cache.

    The cache key is made of the corpus's content, the tokenizer and the split, so a changed file is
    never mistaken for the old one. A damaged copy is made anew, and ``say`` is told.

    Args:
        corpus: The documents.
        tokenizer: Gives the ids.
        val_fraction: Share held out, in ``[0, 1)``; see ``split``.
        cache: As in ``fetch``.
        say: As in ``fetch``.

    Raises:
        UserError: If the corpus holds no text.
    """
    recipe = json.dumps([_FORMAT, corpus.identity, tokenizer.identity, val_fraction])
    key = hashlib.sha256(recipe.encode()).hexdigest()[:24]
    folder = cache_root(cache) / "tokens" / key

    def make() -> None:
        facts: dict[str, Any] = {}
        with building(folder, facts) as work:
            facts |= _write(work, corpus, tokenizer, val_fraction)

    return made_once(folder, _load, make, say)


class StreamWriter:
    """Writes one stream, document by document, with memory of 8 bytes for each.

    Args:
        folder: Where ``NAME.bin`` and ``NAME_offsets.npy`` go.
        name: Of the stream.
        dtype: Of the ids.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any]) -> None:
        self._offsets = folder / f"{name}_offsets.npy"
        self._file = (folder / f"{name}.bin").open("wb")
        self._dtype = dtype
        self._ends = array("q", [0])

    def add(self, ids: NDArray[Any]) -> None:
        """Append a document."""
        ids.astype(self._dtype).tofile(self._file)
        self._ends.append(self._ends[-1] + len(ids))

    @property
    def num_documents(self) -> int:
        return len(self._ends) - 1

    @property
    def num_tokens(self) -> int:
        return self._ends[-1]

    def __enter__(self) -> "StreamWriter":
        return self

    def __exit__(self, *details: object) -> None:
        self._file.close()
        np.save(self._offsets, np.asarray(self._ends, np.int64), allow_pickle=False)


def open_stream(folder: Path, name: str, dtype: str) -> TokenStream:
    """Map a stream that ``StreamWriter`` wrote."""
    offsets = np.load(folder / f"{name}_offsets.npy", mmap_mode="r", allow_pickle=False)
    path = folder / f"{name}.bin"
    # An empty file cannot be mapped.
    tokens = np.memmap(path, dtype, mode="r") if offsets[-1] else np.zeros(0, dtype)
    return TokenStream(tokens, offsets)


def id_dtype(tokenizer: Tokenizer) -> np.dtype[Any]:
    """The smallest of two unsigned types that holds every id."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def _load(folder: Path) -> SplitTokens:
    manifest = verified(folder, "it is made anew")
    streams = [open_stream(folder, part, manifest["dtype"]) for part in ("train", "val")]
    facts = {name: value for name, value in manifest.items() if name not in ("files", "dtype")}
    return SplitTokens(train=streams[0], val=streams[1], facts=facts)


def _write(work: Path, corpus: Corpus, tokenizer: Tokenizer, val_fraction: float) -> dict[str, Any]:
    dtype = id_dtype(tokenizer)
    how, pieces = split(corpus.documents, val_fraction)
    with StreamWriter(work, "train", dtype) as train, StreamWriter(work, "val", dtype) as val:
        streams = {"train": train, "val": val}
        for part, ids in _encoded(pieces, tokenizer):
            streams[part].add(np.append(ids, tokenizer.eos_id))
    if val.num_documents and not train.num_documents:
        raise UserError(
            f"data.val_fraction={val_fraction} holds out all {val.num_documents} documents of "
            f"data.source {corpus.provenance['source']!r}; set a lower one"
        )
    if not train.num_documents:
        raise UserError(f"data.source {corpus.provenance['source']!r} holds no text")
    return {
        "dtype": dtype.name,
        "split": how,
        "train_documents": train.num_documents,
        "val_documents": val.num_documents,
        "train_tokens": train.num_tokens,
        "val_tokens": val.num_tokens,
    }


def _encoded(
    pieces: Iterable[tuple[str, str]], tokenizer: Tokenizer
) -> Iterator[tuple[str, NDArray[np.int32]]]:
    """Ids of each piece, many at once for tokenizers that are parallel inside."""
    pieces = iter(pieces)
    while chunk := list(islice(pieces, _DOCUMENTS_AT_ONCE)):
        for (part, _), ids in zip(
            chunk, tokenizer.encode_many([text for _, text in chunk]), strict=True
        ):
            if len(ids):
                yield part, ids
