"""Vocabularies for tests: a small one in umT5's manner, made here, and umT5's own."""

from pathlib import Path

import sentencepiece

from expertmesh.data.fetch import fetch

TEXT = """
you are a helpful, respectful and honest assistant. how do i kill a process? with a signal.
the experts share the work, and the router says who does what; a question has an answer.
what is seven times six? forty two. where do the geese go in winter? to the south, i think.
"""


def write_small(folder: Path, vocab_size: int = 400) -> Path:
    """A ``spiece.model`` with umT5's first pieces and bytes for what it does not know."""
    text = folder / "text.txt"
    text.write_text(TEXT * 4)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text),
        model_prefix=str(folder / "spiece"),
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        minloglevel=2,
    )
    return folder / "spiece.model"


def umt5() -> Path:
    """umT5's own ``spiece.model``, fetched once."""
    fetched = fetch("tokenizer-umt5")
    return fetched.folder / next(iter(fetched.files))
