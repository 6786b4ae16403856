"""Samples as a person reads them: what the model is given, and what it is to learn."""

from collections.abc import Iterator
from itertools import groupby

from expertmesh.data.dataset import IGNORE, Dataset, Sample
from expertmesh.data.loader import Loader
from expertmesh.data.tokenizer import Tokenizer


def preview(dataset: Dataset, tokenizer: Tokenizer, count: int, seed: int) -> Iterator[str]:
    """The first samples that a run with this seed trains on, as text.

    Args:
        dataset: Its samples.
        tokenizer: Made their ids.
        count: How many.
        seed: Of the run.

    Yields:
        A line about the sample, then its parts: ``given`` has no target, ``learn`` has.
    """
    loader = Loader(dataset, batch_size=1, seed=seed)
    for place in range(count):
        index, sample = loader.sample(place)
        targets = int((sample.targets_S != IGNORE).sum())
        yield (
            f"sample {index:,} of {len(dataset):,}: {sample.num_tokens} tokens, "
            f"{targets} to learn, {dataset.seq_len - sample.num_tokens} padding"
        )
        for learns, text in parts(sample, tokenizer):
            label = "learn" if learns else "given"
            yield from (f"  {label} | {line}" for line in text.split("\n"))
        yield ""


def parts(sample: Sample, tokenizer: Tokenizer) -> list[tuple[bool, str]]:
    """A sample's text in pieces, each with whether it is to be learned; padding left out.

    Special tokens, which decoding drops, are shown by their names.
    """
    real = sample.num_tokens
    flags = [False, *(sample.targets_S[:real] != IGNORE).tolist()]
    ids = [int(sample.tokens_S[0]), *sample.tokens_S[1:real].tolist()]
    # The row's last token is a target only.
    ids.append(int(sample.targets_S[real - 1]))
    if not flags[-1]:
        ids.pop()
    rows = list(zip(flags, ids, strict=False))
    return [
        (learns, _text([token for _, token in run], tokenizer))
        for learns, run in groupby(rows, key=lambda row: row[0])
    ]


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    special = {tokenizer.eos_id, tokenizer.pad_id, tokenizer.bos_id, *tokenizer.sentinel_ids}
    return "".join(
        "".join(map(tokenizer.token_text, run)) if named else tokenizer.decode(run)
        for named, run in ((n, list(r)) for n, r in groupby(ids, key=special.__contains__))
    )
