import numpy as np
import pytest

from expertmesh.data.packing import (
    DocumentDataset,
    DocumentFromBosDataset,
    PackedDataset,
    PackedFromBosDataset,
)
from expertmesh.data.tokens import TokenStream

EOS, PAD = 100, 101


def stream(*lengths):
    """Documents of the given numbers of tokens, counted through, each closed by EOS."""
    tokens, offsets = [], [0]
    for length in lengths:
        tokens += [len(tokens) + i for i in range(length)] + [EOS]
        offsets.append(len(tokens))
    return TokenStream(np.asarray(tokens, np.uint16), np.asarray(offsets))


@pytest.mark.parametrize("seq_len", [1, 3, 4, 7])
def test_packed_targets_are_the_next_tokens(seq_len):
    data = stream(3, 1, 6, 2)
    packed = PackedDataset(data, seq_len)
    samples = [packed[i] for i in range(len(packed))]
    used = len(packed) * seq_len
    assert np.concatenate([s.tokens_S for s in samples]).tolist() == data.tokens[:used].tolist()
    targets = np.concatenate([s.targets_S for s in samples])
    assert targets.tolist() == data.tokens[1 : used + 1].tolist()
    assert len(data.tokens) - 1 - used < seq_len
    assert all(s.tokens_S.shape == s.targets_S.shape == (seq_len,) for s in samples)


@pytest.mark.parametrize(("lengths", "rows"), [((), 0), ((1,), 0), ((4,), 1), ((3,), 0)])
def test_packed_rows_of_short_streams(lengths, rows):
    assert len(PackedDataset(stream(*lengths), 4)) == rows


def test_a_document_is_padded():
    sample = DocumentDataset(stream(2), 5, PAD)[0]
    assert sample.tokens_S.tolist() == [0, 1, PAD, PAD, PAD]
    assert sample.targets_S.tolist() == [1, EOS, -100, -100, -100]
    assert sample.num_tokens == 2


@pytest.mark.parametrize("seq_len", [1, 2, 3, 5, 20])
def test_every_token_of_a_document_but_its_first_is_a_target_once(seq_len):
    lengths = (1, 2, 3, 4, 5, 6, 11)
    data = stream(*lengths)
    rows = DocumentDataset(data, seq_len, PAD)
    assert len(rows) == sum(-(-length // seq_len) for length in lengths)
    seen = []
    for i in range(len(rows)):
        sample = rows[i]
        kept = sample.num_tokens
        assert (sample.targets_S[kept:] == -100).all()
        assert (sample.tokens_S[kept:] == PAD).all()
        assert (sample.targets_S[:kept] >= 0).all()
        assert not np.isin(sample.tokens_S[:kept], [EOS, PAD]).any()
        assert sample.tokens_S[1:kept].tolist() == sample.targets_S[: kept - 1].tolist()
        seen += sample.targets_S[:kept].tolist()
    firsts = data.offsets[:-1]
    assert seen == np.delete(data.tokens, firsts).tolist()


def test_no_document_no_row():
    assert len(DocumentDataset(stream(), 4, PAD)) == 0


@pytest.mark.parametrize("seq_len", [1, 3, 4, 7])
def test_packed_rows_behind_a_first_token(seq_len):
    data = stream(3, 1, 6, 2)
    packed = PackedFromBosDataset(data, seq_len, 99)
    samples = [packed[i] for i in range(len(packed))]
    targets = np.concatenate([s.targets_S for s in samples])
    assert targets.tolist() == data.tokens[: len(targets)].tolist()
    assert len(data.tokens) - len(targets) < seq_len
    for sample in samples:
        assert sample.tokens_S.tolist() == [99, *sample.targets_S[:-1].tolist()]


@pytest.mark.parametrize("seq_len", [1, 2, 3, 5, 9])
def test_documents_behind_a_first_token(seq_len):
    data = stream(3, 1, 6, 2)
    rows = DocumentFromBosDataset(data, seq_len, bos_id=99, pad_id=PAD)
    samples = [rows[i] for i in range(len(rows))]
    targets = np.concatenate([s.targets_S for s in samples])
    assert targets[targets != -100].tolist() == data.tokens.tolist()
    for sample in samples:
        kept = sample.targets_S != -100
        assert int(kept.sum()) == sample.num_tokens
        assert sample.tokens_S[kept].tolist() == [99, *sample.targets_S[kept][:-1].tolist()]
        assert (sample.tokens_S[~kept] == PAD).all()
