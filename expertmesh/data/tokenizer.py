"""Text to token ids and back."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from expertmesh.data.cache import file_sha256
from expertmesh.data.catalog import CATALOG
from expertmesh.data.fetch import Say, fetch, say_to_stderr
from expertmesh.errors import UserError, require

Ids = NDArray[np.int32]

_EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<eos>", "[SEP]")
_PAD_NAMES = ("<pad>", "[PAD]", "<|padding|>", "<|endoftext|>")


class Tokenizer(ABC):
    """Maps text to ids in ``[0, vocab_size)``; no special token is added by ``encode``."""

    vocab_size: int
    """Number of ids, special tokens included."""
    eos_id: int
    """Ends a document."""
    pad_id: int
    """Fills a row behind its document; equals ``eos_id`` where the vocabulary has no own."""
    bos_id: int | None = None
    """Stands before each row that a model reads; None where nothing does."""
    sentinel_ids: Sequence[int] = ()
    """Ids that stand for cut-out spans, in the order of their use."""
    identity: str
    """Equal for two tokenizers that give equal ids; part of the key of cached tokens."""

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """Token ids of a text, ``(num_tokens,)`` int32."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids. Special tokens vanish; broken UTF-8 becomes U+FFFD."""

    @abstractmethod
    def token_text(self, token_id: int) -> str:
        """One token in printable characters, for tables and pictures."""

    def encode_many(self, texts: Sequence[str]) -> list[Ids]:
        """``encode`` of each text; a subclass may do them in parallel."""
        return [self.encode(text) for text in texts]


@final
class ByteTokenizer(Tokenizer):
    """The 256 bytes of UTF-8, then end of document (256) and padding (257)."""

    vocab_size = 258
    eos_id = 256
    pad_id = 257
    identity = "byte"

    def encode(self, text: str) -> Ids:
        # A lone surrogate (from a broken JSON escape) has no UTF-8; "?" takes its place.
        return np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if int(i) < 256).decode("utf-8", errors="replace")

    def token_text(self, token_id: int) -> str:
        if token_id >= 256:
            return {self.eos_id: "<eos>", self.pad_id: "<pad>"}[token_id]
        return printable(chr(token_id)) if token_id < 128 else f"<0x{token_id:02X}>"


@final
class HFTokenizer(Tokenizer):
    """A tokenizer of the ``tokenizers`` library.

    Args:
        path: A ``tokenizer.json``, a folder that holds one (as ``save_pretrained`` writes it, with
            ``tokenizer_config.json`` naming the special tokens), or a folder with GPT-2's
            ``encoder.json`` and ``vocab.bpe``.
    """

    def __init__(self, path: Path) -> None:
        files = _hf_files(path)
        self._inner = _load_bpe(*files) if len(files) == 2 else _load_json(files[0])
        # A file may say to cut or to fill what it is given; a document has all its tokens and no
        # others.
        self._inner.no_truncation()
        self._inner.no_padding()
        # Not the number of tokens: a vocabulary may have holes.
        ids = self._inner.get_vocab(with_added_tokens=True).values()
        self.vocab_size = 1 + max(ids, default=-1)
        named = _special_names(files[0].parent)
        self.eos_id = self._special(named.get("eos_token"), _EOS_NAMES, path)
        pad = [named["pad_token"]] if named.get("pad_token") else _PAD_NAMES
        found = [self._inner.token_to_id(name) for name in pad]
        self.pad_id = next((i for i in found if i is not None), self.eos_id)
        if named.get("bos_token"):
            self.bos_id = self._special(named["bos_token"], (), path)
        self.identity = "hf:" + ",".join(file_sha256(file) for file in files)
        # What the files that are hashed do not say, but a config beside them does.
        ends = map(self._inner.token_to_id, _EOS_NAMES)
        usual = next((token_id for token_id in ends if token_id is not None), None)
        if (self.bos_id, self.eos_id) != (None, usual):
            self.identity += f";bos={self.bos_id};eos={self.eos_id}"

    def _special(self, name: str | None, usual: Sequence[str], path: Path) -> int:
        for candidate in [name] if name else usual:
            token_id = self._inner.token_to_id(candidate)
            if token_id is not None:
                return int(token_id)
        if name:
            raise UserError(
                f"{path}: tokenizer_config.json names {name!r}, which is not in the vocabulary"
            )
        raise UserError(
            f"{path} has no end-of-document token: expected one of {list(usual)}, "
            "or eos_token in the tokenizer_config.json beside it"
        )

    def encode(self, text: str) -> Ids:
        encoded = self._inner.encode(without_surrogates(text), add_special_tokens=False)
        return np.asarray(encoded.ids, np.int32)

    def encode_many(self, texts: Sequence[str]) -> list[Ids]:
        readable = [without_surrogates(text) for text in texts]
        encoded = self._inner.encode_batch(readable, add_special_tokens=False)
        return [np.asarray(one.ids, np.int32) for one in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._inner.decode([int(i) for i in ids], skip_special_tokens=True))

    def token_text(self, token_id: int) -> str:
        text = self._inner.decode([token_id], skip_special_tokens=False)
        return printable(text) if text and "\ufffd" not in text else self._piece(token_id)

    def _piece(self, token_id: int) -> str:
        # Part of a character, or an id in a hole of the vocabulary: its own name is all there is.
        return str(self._inner.id_to_token(token_id) or f"<{token_id}>")


@final
class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece ``.model`` file.

    Args:
        path: The file.
        inner: What the library makes of it.
    """

    def __init__(self, path: Path, inner: Any) -> None:
        self._inner = inner
        self.vocab_size = self._inner.vocab_size()
        self.eos_id = self._inner.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{path} has no end-of-document piece (its eos_id is -1)")
        self.pad_id = self._inner.pad_id() if self._inner.pad_id() >= 0 else self.eos_id
        self.identity = "sentencepiece:" + file_sha256(path)

    def encode(self, text: str) -> Ids:
        return np.asarray(self._inner.encode(without_surrogates(text)), np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._inner.decode([int(i) for i in ids]))

    def token_text(self, token_id: int) -> str:
        return printable(self._inner.id_to_piece(token_id).replace("\u2581", " "))


def load_tokenizer(
    spec: str, *, cache: str | PathLike[str] | None = None, say: Say = say_to_stderr
) -> Tokenizer:
    """A tokenizer from its name or file.

    Args:
        spec: ``"byte"`` or ``"byte-ul2"``; a ``tokenizer.json``; a SentencePiece ``.model`` file; a
            folder that holds either; or a tokenizer's name in the catalog, which is then fetched.
        cache: As in ``fetch``.
        say: As in ``fetch``.

    Raises:
        UserError: If there is no such file, or it is not a tokenizer.
    """
    from expertmesh.data.sentinels import BYTE_SENTINELS, ByteSentinelTokenizer

    if spec in ("byte", BYTE_SENTINELS):
        return ByteTokenizer() if spec == "byte" else ByteSentinelTokenizer()
    path = tokenizer_path(spec, cache=cache, say=say)
    if path is None:
        known = [name for name, entry in CATALOG.items() if entry.kind == "tokenizer"]
        raise UserError(
            f"tokenizer {spec!r} is neither a file nor a folder; "
            f"set it to 'byte', {BYTE_SENTINELS!r}, a path, or one of {known}"
        )
    if path.is_dir():
        models = sorted(path.glob("*.model"))
        # T5's file wins over tokenizer.json, which reads "</s>" within a text as its end.
        if models and (models[0].name == "spiece.model" or not (path / "tokenizer.json").exists()):
            path = models[0]
    if path.is_dir() or path.suffix == ".json":
        return HFTokenizer(path)
    return _sentencepiece(path)


def tokenizer_path(
    spec: str, *, cache: str | PathLike[str] | None = None, say: Say = say_to_stderr
) -> Path | None:
    """The file or folder that ``load_tokenizer`` reads; None where bytes are all there is.

    The arguments are those of ``load_tokenizer``.
    """
    path = Path(spec).expanduser()
    if spec in CATALOG and not path.exists():
        path = _fetched(spec, cache, say)
    return path if path.exists() else None


def _sentencepiece(path: Path) -> Tokenizer:
    from expertmesh.data.sentinels import T5Tokenizer, is_t5

    sentencepiece = require("sentencepiece", extra="hf")
    try:
        inner = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"{path} is not a SentencePiece model: {error}") from error
    return T5Tokenizer(path, inner) if is_t5(inner) else SentencePieceTokenizer(path, inner)


def _fetched(name: str, cache: str | PathLike[str] | None, say: Say) -> Path:
    if CATALOG[name].kind != "tokenizer":
        raise UserError(f"{name!r} is a data set, not a tokenizer; set data.source to it instead")
    fetched = fetch(name, cache=cache, say=say)
    file = fetched.folder / next(iter(fetched.files))
    return file if len(fetched.files) == 1 else file.parent


def _hf_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for names in (["tokenizer.json"], ["encoder.json", "vocab.bpe"]):
        if all((path / name).is_file() for name in names):
            return [path / name for name in names]
    raise UserError(f"{path} holds neither tokenizer.json nor a SentencePiece .model file")


def _load_json(path: Path) -> Any:
    tokenizers = require("tokenizers", extra="hf")
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    # The library raises plain Exception for every kind of bad file.
    except Exception as error:
        raise UserError(f"{path} is not a file of the tokenizers library: {error}") from error


def _load_bpe(vocabulary: Path, merges: Path) -> Any:
    """GPT-2's two files: a vocabulary, and merges below one comment line."""
    tokenizers = require("tokenizers", extra="hf")
    lines = merges.read_text(encoding="utf-8").split("\n")[1:]
    pairs = [(left, right) for left, right in (line.split() for line in lines if line.strip())]
    vocab = json.loads(vocabulary.read_text(encoding="utf-8"))
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=pairs))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([name for name in _EOS_NAMES if name in vocab])
    return inner


def _special_names(folder: Path) -> dict[str, str]:
    """``eos_token`` and ``pad_token`` of a tokenizer_config.json, where there is one.

    And ``bos_token``, where it says that one is added.
    """
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return {}
    config = json.loads(path.read_text(encoding="utf-8"))
    keys = ["eos_token", "pad_token", *(["bos_token"] if config.get("add_bos_token") else [])]
    tokens = {key: config.get(key) for key in keys}
    return {
        key: token["content"] if isinstance(token, dict) else token
        for key, token in tokens.items()
        if token
    }


def without_surrogates(text: str) -> str:
    """The text with "?" for each lone surrogate, which no library can encode."""
    return text.encode("utf-8", errors="replace").decode("utf-8")


def printable(text: str) -> str:
    """Spaces and control characters made visible."""
    shown = text.replace(" ", "\u2423")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
