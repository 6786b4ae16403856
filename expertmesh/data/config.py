"""The ``[data]`` table of a run file, and what it turns into."""

from dataclasses import dataclass, field
from typing import Any

from expertmesh.data.dataset import Dataset
from expertmesh.data.fetch import Say, say_to_stderr
from expertmesh.data.mixture import Mixture
from expertmesh.data.packing import DocumentDataset, PackedDataset
from expertmesh.data.text import read_corpus
from expertmesh.data.tokenizer import Tokenizer, load_tokenizer
from expertmesh.data.tokens import SplitTokens, TokenStream, tokenize
from expertmesh.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which text, how it is tokenised, and how it is cut."""

    source: str = ""
    """A file or folder, a name of `expertmesh data list`, or hf:NAME[@CONFIG][:SPLIT[:FIELD]]."""
    mix: dict[str, float] = field(default_factory=dict)
    """Several sources with their weights, instead of `source`."""
    fields: tuple[str, ...] = ("text",)
    """Keys or columns that make a document of a jsonl, json, csv or parquet record."""
    tokenizer: str = "byte"
    """byte, a tokenizer.json, a SentencePiece .model, a folder, or a name of the catalog."""
    seq_len: int = 256
    """Tokens of a sample."""
    pack: bool = True
    """Fill rows across documents; false gives a document its own rows, padded."""
    val_fraction: float = 0.05
    """Share held out for evaluation; 0 holds nothing out."""
    cache: str | None = None
    """Folder for fetched files and tokens; default EXPERTMESH_CACHE or ~/.cache/expertmesh."""

    def __post_init__(self) -> None:
        if self.source and self.mix:
            raise UserError(
                "data: set either source (one data set) or mix (several with weights), "
                f"got source={self.source!r} and mix={self.mix!r}"
            )
        if not self.fields:
            raise UserError('data.fields must name at least one field, got none; set ["text"]')
        if self.seq_len < 1:
            raise UserError(f"data.seq_len must be at least 1, got {self.seq_len}")
        if not 0 <= self.val_fraction < 1:
            raise UserError(
                f"data.val_fraction must be at least 0 and below 1, got {self.val_fraction}"
            )


@dataclass(frozen=True, kw_only=True)
class DataBundle:
    """What a trainer needs of the data."""

    train: Dataset
    """At least one sample."""
    val: Dataset | None
    """Held-out samples; None when ``val_fraction`` is 0."""
    tokenizer: Tokenizer
    """Made the ids."""
    provenance: dict[str, Any]
    """JSON values for the run's record: sources with hashes, split, counts, tokenizer."""


def build_data(config: DataConfig, *, say: Say = say_to_stderr) -> DataBundle:
    """Fetch, read, tokenise and cut what a config names; cached after the first time.

    Args:
        config: The ``[data]`` table.
        say: Called with one line of text for each thing worth telling.

    Raises:
        UserError: For a source that is missing, unreadable, corrupt, empty or too short.
    """
    if not (config.source or config.mix):
        raise UserError(
            "data.source is not set: expected a file, a folder, or a name that "
            "`expertmesh data list` shows; or set data.mix"
        )
    tokenizer = load_tokenizer(config.tokenizer, cache=config.cache, say=say)
    weights = config.mix or {config.source: 1.0}
    train: dict[str, Dataset] = {}
    val: dict[str, Dataset] = {}
    records = []
    for source in weights:
        corpus = read_corpus(source, fields=config.fields, cache=config.cache, say=say)
        tokens = tokenize(
            corpus, tokenizer, val_fraction=config.val_fraction, cache=config.cache, say=say
        )
        train[source] = _cut(source, "train", tokens, config, tokenizer)
        if config.val_fraction:
            val[source] = _cut(source, "val", tokens, config, tokenizer)
        records.append({**corpus.provenance, **tokens.facts, "weight": weights[source]})
    return DataBundle(
        train=_mixed(train, weights),
        val=_mixed(val, weights) if val else None,
        tokenizer=tokenizer,
        provenance={
            "tokenizer": config.tokenizer,
            "tokenizer_identity": tokenizer.identity,
            "seq_len": config.seq_len,
            "pack": config.pack,
            "val_fraction": config.val_fraction,
            "sources": records,
        },
    )


def _cut(
    source: str, part: str, tokens: SplitTokens, config: DataConfig, tokenizer: Tokenizer
) -> Dataset:
    stream: TokenStream = getattr(tokens, part)
    dataset: Dataset
    if config.pack:
        dataset = PackedDataset(stream, config.seq_len)
    else:
        dataset = DocumentDataset(stream, config.seq_len, tokenizer.pad_id)
    if len(dataset) == 0:
        need = config.seq_len + 1 if config.pack else 2
        raise UserError(
            f"{source!r}: the {part} part has {len(stream.tokens)} tokens, a sample needs {need}; "
            "give more text, set a lower data.seq_len, or set another data.val_fraction"
        )
    return dataset


def _mixed(parts: dict[str, Dataset], weights: dict[str, float]) -> Dataset:
    return Mixture(parts, weights) if len(parts) > 1 else next(iter(parts.values()))
