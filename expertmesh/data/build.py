"""What a ``[data]`` table turns into: data sets to train on and to evaluate on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from expertmesh.data.config import DataConfig
from expertmesh.data.conversation_tokens import read_conversations, tokenize_conversations
from expertmesh.data.dataset import Dataset
from expertmesh.data.denoising import UL2, UL2_OPENMOE
from expertmesh.data.fetch import Say, say_to_stderr
from expertmesh.data.instructions import InstructionDataset
from expertmesh.data.mixture import Mixture
from expertmesh.data.packing import (
    DocumentDataset,
    DocumentFromBosDataset,
    PackedDataset,
    PackedFromBosDataset,
)
from expertmesh.data.templates import find_template
from expertmesh.data.text import check_fields, read_corpus
from expertmesh.data.tokenizer import Tokenizer, load_tokenizer
from expertmesh.data.tokens import TokenStream, tokenize
from expertmesh.data.ul2 import DenoisingDataset
from expertmesh.errors import UserError

_MIXTURES = {"ul2": UL2, "ul2-openmoe": UL2_OPENMOE}
Parts = tuple[dict[str, Dataset], dict[str, Any]]
"""The data sets ``train`` and, if something is held out, ``val``; and facts of the source."""


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
    if config.kind == "text":
        check_fields(list(weights), config.fields)
    parts = _text_parts if config.kind == "text" else _instruction_parts
    built = {source: parts(source, config, tokenizer, say) for source in weights}
    train = {source: found["train"] for source, (found, _) in built.items()}
    val = {source: found["val"] for source, (found, _) in built.items() if "val" in found}
    records = [
        {**facts, **_sizes(found), "weight": weights[source]}
        for source, (found, facts) in built.items()
    ]
    of_kind: dict[str, dict[str, Any]] = {
        "text": {"pack": config.packs, "objective": config.objective},
        "instructions": {
            "template": config.template,
            "train_on_prompt": config.train_on_prompt,
        },
    }
    return DataBundle(
        train=_mixed(train, weights),
        # Evaluation goes through them in order, so all of them are in it, whatever their weights.
        val=_mixed(val, {source: len(dataset) for source, dataset in val.items()}) if val else None,
        tokenizer=tokenizer,
        provenance={
            "tokenizer": config.tokenizer,
            "tokenizer_identity": tokenizer.identity,
            "kind": config.kind,
            "seq_len": config.seq_len,
            **of_kind[config.kind],
            "val_fraction": config.val_fraction,
            "sources": records,
        },
    )


def _text_parts(source: str, config: DataConfig, tokenizer: Tokenizer, say: Say) -> Parts:
    corpus = read_corpus(source, fields=config.fields, cache=config.cache, say=say)
    tokens = tokenize(
        corpus, tokenizer, val_fraction=config.val_fraction, cache=config.cache, say=say
    )
    streams = {"train": tokens.train, "val": tokens.val} if config.val_fraction else {}
    streams["train"] = tokens.train
    found = {
        part: _cut(source, part, stream, config, tokenizer) for part, stream in streams.items()
    }
    return found, {**corpus.provenance, **tokens.facts}


def _cut(
    source: str, part: str, stream: TokenStream, config: DataConfig, tokenizer: Tokenizer
) -> Dataset:
    seq_len, bos_id, pad_id = config.seq_len, tokenizer.bos_id, tokenizer.pad_id
    dataset: Dataset
    if config.objective != "causal":
        denoising = DenoisingDataset(stream, seq_len, tokenizer, _MIXTURES[config.objective])
        dataset, need = denoising, denoising.window
    elif bos_id is None and config.packs:
        dataset, need = PackedDataset(stream, seq_len), seq_len + 1
    elif bos_id is None:
        dataset, need = DocumentDataset(stream, seq_len, pad_id), 2
    elif config.packs:
        dataset, need = PackedFromBosDataset(stream, seq_len, bos_id), seq_len
    else:
        dataset = DocumentFromBosDataset(stream, seq_len, bos_id=bos_id, pad_id=pad_id)
        need = 1
    if len(dataset) == 0:
        raise UserError(
            f"{source!r}: the {part} part has {len(stream.tokens)} tokens, a sample needs {need}; "
            "give more text, set a lower data.seq_len, or set another data.val_fraction"
        )
    return dataset


def _instruction_parts(source: str, config: DataConfig, tokenizer: Tokenizer, say: Say) -> Parts:
    conversations = read_conversations(source, fields=config.fields, cache=config.cache, say=say)
    tokens = tokenize_conversations(
        conversations,
        find_template(config.template),
        tokenizer,
        val_fraction=config.val_fraction,
        cache=config.cache,
        say=say,
    )
    found = {
        part: InstructionDataset(
            stream,
            tokens.learned[part],
            config.seq_len,
            pad_id=tokenizer.pad_id,
            train_on_prompt=config.train_on_prompt,
        )
        for part, stream in tokens.streams.items()
        if part == "train" or config.val_fraction
    }
    for part, dataset in found.items():
        if not len(dataset):
            raise UserError(
                f"{source!r}: no conversation of the {part} part has an answer within "
                f"data.seq_len={config.seq_len}; set a higher one, or another data.val_fraction"
            )
    facts = {
        name: sum(getattr(dataset, f"num_{name}") for dataset in found.values())
        for name in ("truncated", "without_answer")
    }
    _tell_cuts(source, facts, tokens.facts["records"], config.seq_len, say)
    targets = {f"{part}_targets": dataset.num_targets for part, dataset in found.items()}
    return dict(found), {**conversations.provenance, **tokens.facts, **facts, **targets}


def _tell_cuts(source: str, facts: dict[str, int], records: int, seq_len: int, say: Say) -> None:
    if facts["truncated"]:
        say(
            f"{source}: {facts['truncated']} of {records} conversations are longer than "
            f"data.seq_len={seq_len} and are cut at their end"
        )
    if facts["without_answer"]:
        say(
            f"{source}: {facts['without_answer']} of {records} conversations have no answer within "
            f"data.seq_len={seq_len} and are left out"
        )


def _sizes(found: dict[str, Dataset]) -> dict[str, int]:
    return {f"{part}_samples": len(dataset) for part, dataset in found.items()}


def _mixed(parts: dict[str, Dataset], weights: Mapping[str, float]) -> Dataset:
    return Mixture(parts, weights) if len(parts) > 1 else next(iter(parts.values()))
