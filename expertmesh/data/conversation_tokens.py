"""A source of conversations as two streams of token ids on disk, with what is to be learned."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from expertmesh.data.cache import building, cache_root, made_once, verified
from expertmesh.data.conversation import Conversation, Turn, conversation
from expertmesh.data.fetch import Say, say_to_stderr
from expertmesh.data.hub import PREFIX, HubSource
from expertmesh.data.instructions import tokens_of
from expertmesh.data.records import RECORD_READERS, ending, read_records
from expertmesh.data.source_files import find_files
from expertmesh.data.split import HeldOut
from expertmesh.data.templates import Template
from expertmesh.data.text import content_sha256
from expertmesh.data.tokenizer import Tokenizer
from expertmesh.data.tokens import StreamWriter, TokenStream, id_dtype, open_stream
from expertmesh.errors import UserError

# Change when the files' layout, the split or what is read of a text changes: old caches are then
# not read.
_FORMAT = 2
_PROBE = Conversation((Turn("a", "b"), Turn("c", "d", "")), "e")


@dataclass(frozen=True, kw_only=True)
class Conversations:
    """Conversations that can be read any number of times, always the same."""

    read: Callable[[], Iterator[Conversation]]
    """Starts a new pass."""
    identity: str
    """SHA-256 over the content and the way in which it is read."""
    provenance: dict[str, Any]
    """Where they came from, in JSON values."""


@dataclass(frozen=True, kw_only=True)
class LearnedTokens:
    """Both streams, which of their tokens are to be learned, and what is known about them."""

    streams: dict[str, TokenStream]
    learned: dict[str, NDArray[np.bool_]]
    facts: dict[str, Any]


def read_conversations(
    source: str,
    *,
    fields: tuple[str, ...] = (),
    cache: str | PathLike[str] | None = None,
    say: Say = say_to_stderr,
) -> Conversations:
    """Find the conversations that a run file names.

    Args:
        source: A file or folder of records; a name of the catalog; or ``hf:NAME[@CONFIG][:SPLIT]``.
        fields: The keys of question and answer, where they have other names; see ``conversation``.
        cache: As in ``fetch``.
        say: As in ``fetch``.

    Raises:
        UserError: If nothing is there, or it holds no records; errors of a record name its line
            and are raised when it is read.
    """
    if fields and len(fields) != 2:
        raise UserError(
            'data.fields must name two keys with data.kind = "instructions", the question\'s and '
            f"the answer's, got {list(fields)}; leave it out to have them found"
        )
    if source.startswith(PREFIX):
        return _hub(source, fields)
    files = find_files(source, tuple(RECORD_READERS), cache=cache, say=say)
    for path in files.paths:
        if ending(path) not in RECORD_READERS:
            raise UserError(
                f'{path} holds no records: data.kind = "instructions" reads '
                f"{', '.join(RECORD_READERS)}"
            )

    def read() -> Iterator[Conversation]:
        for path in files.paths:
            number = 0
            for where, record in read_records(path):
                number += 1
                yield conversation(record, where, fields)
            if not number:
                raise UserError(f"{path} is empty: expected at least one record")

    identity = files.identity(("conversation", *fields))
    return Conversations(
        read=read, identity=identity, provenance={**files.facts, "sha256": identity}
    )


def _hub(source: str, fields: tuple[str, ...]) -> Conversations:
    parts = HubSource.parse(source)
    if parts.field:
        raise UserError(
            f"data.source {source!r} names one field, {parts.field!r}, but a conversation has two; "
            "leave it out, and name the question's and the answer's in data.fields"
        )
    table = parts.load()

    def read() -> Iterator[Conversation]:
        for number, record in enumerate(table):
            yield conversation(record, f"{source}: record {number}", fields)

    identity = content_sha256(repr(one) for one in read())
    facts = {"source": source, "split": parts.split, "sha256": identity}
    return Conversations(read=read, identity=identity, provenance=facts)


def tokenize_conversations(
    conversations: Conversations,
    template: Template,
    tokenizer: Tokenizer,
    *,
    val_fraction: float,
    cache: str | PathLike[str] | None = None,
    say: Say = say_to_stderr,
) -> LearnedTokens:
    """Token streams of conversations, made once and then mapped from the cache.

    The ``val_fraction`` of conversations whose questions have the lowest SHA-256 is held out, so
    that no question is on both sides. Those without an answer are left out and counted.

    Args:
        conversations: What is read.
        template: How they are written.
        tokenizer: Gives the ids.
        val_fraction: Share held out, in ``[0, 1)``.
        cache: As in ``fetch``.
        say: As in ``fetch``.

    Raises:
        UserError: For a record that is no conversation, and if there is none with an answer.
    """
    recipe = [conversations.identity, tokenizer.identity, template.pieces(_PROBE), val_fraction]
    key = hashlib.sha256(json.dumps([_FORMAT, "conversations", recipe]).encode()).hexdigest()[:24]
    folder = cache_root(cache) / "tokens" / key

    def make() -> None:
        facts: dict[str, Any] = {}
        with building(folder, facts) as work:
            facts |= _write(work, conversations, template, tokenizer, val_fraction)

    return made_once(folder, _load, make, say)


def _load(folder: Path) -> LearnedTokens:
    manifest = verified(folder, "it is made anew")
    facts = {name: value for name, value in manifest.items() if name not in ("files", "dtype")}
    return LearnedTokens(
        streams={part: open_stream(folder, part, manifest["dtype"]) for part in ("train", "val")},
        learned={
            part: open_stream(folder, f"{part}_learned", "bool").tokens for part in ("train", "val")
        },
        facts=facts,
    )


def _write(
    work: Path,
    conversations: Conversations,
    template: Template,
    tokenizer: Tokenizer,
    val_fraction: float,
) -> dict[str, Any]:
    dtype, source = id_dtype(tokenizer), conversations.provenance["source"]
    questions = (_question(one) for one in conversations.read()) if val_fraction else ()
    held_out = HeldOut.of(questions, val_fraction)
    if val_fraction and held_out.num_texts < 2:
        raise UserError(
            f"{source!r} has {held_out.num_texts} question, too few to hold some out; "
            "set data.val_fraction = 0"
        )
    records = unanswered = 0
    with (
        _PartWriter(work, "train", dtype) as train,
        _PartWriter(work, "val", dtype) as val,
    ):
        for one in conversations.read():
            records += 1
            if not one.is_answered:
                unanswered += 1
                continue
            part = val if _question(one) in held_out else train
            part.add(*tokens_of(one, template, tokenizer))
    if val.ids.num_documents and not train.ids.num_documents:
        raise UserError(
            f"data.val_fraction={val_fraction} holds out all {val.ids.num_documents} conversations "
            f"of data.source {source!r} that have an answer; set a lower one"
        )
    if not train.ids.num_documents:
        raise UserError(f"data.source {source!r} holds no conversation with an answer to train on")
    return {
        "dtype": dtype.name,
        "records": records,
        "unanswered": unanswered,
        "train_tokens": train.ids.num_tokens,
        "val_tokens": val.ids.num_tokens,
    }


class _PartWriter:
    """The stream of one part, and beside it the flags."""

    def __init__(self, work: Path, part: str, dtype: np.dtype[Any]) -> None:
        self.ids = StreamWriter(work, part, dtype)
        self._learned = StreamWriter(work, f"{part}_learned", np.dtype(np.bool_))

    def add(self, ids: NDArray[Any], learned: NDArray[np.bool_]) -> None:
        self.ids.add(ids)
        self._learned.add(learned)

    def __enter__(self) -> "_PartWriter":
        return self

    def __exit__(self, *details: object) -> None:
        self.ids.__exit__(*details)
        self._learned.__exit__(*details)


def _question(one: Conversation) -> str:
    return "\0".join(turn.question for turn in one.turns)
