import json

import pytest

from expertmesh.data import DataConfig, Loader, build_data
from expertmesh.data.preview import parts, preview


@pytest.fixture
def instructions(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"prompt": f"q{n}:\n", "completion": f"a{n}"}) for n in range(9)]
    path.write_text("\n".join(lines))
    return DataConfig(kind="instructions", source=str(path), seq_len=8, val_fraction=0)


def test_what_is_given_and_what_is_learned(instructions):
    data = build_data(instructions)
    assert parts(data.train[3], data.tokenizer) == [(False, "q3:\n"), (True, "a3<eos>")]


def test_a_row_that_was_cut_has_no_end(instructions, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "question", "completion": "x"}')
    data = build_data(instructions)
    assert parts(data.train[0], data.tokenizer) == [(False, "question"), (True, "x")]


def test_all_of_packed_text_but_its_first_token_is_learned(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghi" * 9)
    data = build_data(DataConfig(source=str(tmp_path / "a.txt"), seq_len=8, val_fraction=0))
    assert parts(data.train[0], data.tokenizer) == [(False, "a"), (True, "bcdefghi")]


def test_lines_of_the_samples_that_a_run_begins_with(instructions):
    data = build_data(instructions)
    lines = list(preview(data.train, data.tokenizer, 2, seed=5))
    first, second = Loader(data.train, batch_size=2, seed=5).batch(0).sample_index_B.tolist()
    assert lines == [
        f"sample {first} of 9: 6 tokens, 3 to learn, 2 padding",
        f"  given | q{first}:",
        "  given | ",
        f"  learn | a{first}<eos>",
        "",
        f"sample {second} of 9: 6 tokens, 3 to learn, 2 padding",
        f"  given | q{second}:",
        "  given | ",
        f"  learn | a{second}<eos>",
        "",
    ]


def test_sentinels_are_shown_by_name(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefghij" * 400)
    config = DataConfig(
        source=str(tmp_path / "a.txt"),
        seq_len=64,
        tokenizer="byte-ul2",
        objective="ul2",
        val_fraction=0,
    )
    data = build_data(config)
    lines = list(preview(data.train, data.tokenizer, 30, seed=0))
    assert any("<extra_id_0>" in line and line.startswith("  given | [N") for line in lines)
    assert any(line.startswith("  learn | <extra_id_0>") for line in lines)
