import json

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from expertmesh.data.conversation_tokens import read_conversations, tokenize_conversations
from expertmesh.data.templates import find_template
from expertmesh.data.tokenizer import ByteTokenizer
from expertmesh.errors import UserError

BYTES = ByteTokenizer()


def tokens(source, val_fraction=0.0, **options):
    found = read_conversations(str(source), **options)
    return tokenize_conversations(found, find_template("plain"), BYTES, val_fraction=val_fraction)


def texts(found, part):
    stream = found.streams[part]
    starts = zip(stream.offsets, stream.offsets[1:], strict=False)
    return [BYTES.decode(stream.tokens[a:b]) for a, b in starts]


RECORDS = [{"prompt": f"question {n}: ", "completion": f"answer {n}"} for n in range(30)]


@pytest.mark.parametrize("ending", ["json", "jsonl", "csv", "parquet"])
def test_each_kind_of_file(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    if ending == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path)
    elif ending == "csv":
        rows = [f"{r['prompt']},{r['completion']}\n" for r in RECORDS]
        path.write_text("prompt,completion\n" + "".join(rows))
    else:
        lines = [json.dumps(record) for record in RECORDS]
        path.write_text("\n".join(lines) if ending == "jsonl" else f"[{','.join(lines)}]")
    found = tokens(path)
    assert texts(found, "train") == [r["prompt"] + r["completion"] for r in RECORDS]
    assert found.facts["records"] == 30
    learned = found.learned["train"]
    stream = found.streams["train"]
    assert BYTES.decode(stream.tokens[learned]) == "".join(r["completion"] for r in RECORDS)
    assert int(learned.sum()) == sum(len(r["completion"]) + 1 for r in RECORDS)


def test_no_question_is_on_both_sides(tmp_path):
    path = tmp_path / "a.jsonl"
    again = [{**record, "completion": "other"} for record in RECORDS]
    path.write_text("\n".join(map(json.dumps, RECORDS + again)))
    found = tokens(path, 0.1)
    held = {text.split(":")[0] for text in texts(found, "val")}
    trained = {text.split(":")[0] for text in texts(found, "train")}
    assert len(held) == 3
    assert len(trained) == 27
    assert len(texts(found, "val")) == 6


def test_blank_answers_are_left_out_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({**r, "completion": " "}) for r in RECORDS[:4]))
    with pytest.raises(UserError, match="holds no conversation with an answer"):
        tokens(path)
    with path.open("a") as file:
        file.write("\n" + json.dumps(RECORDS[5]))
    assert tokens(path).facts["unanswered"] == 4


def test_a_folder_in_the_layout_of_the_hub(tmp_path, monkeypatch):
    """A configuration is a task, as in the data set that OpenMoE's trainer names."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    for task in ("self_instruct", "super_natural_instructions"):
        (tmp_path / "set" / task).mkdir(parents=True)
        record = {"prompt": f"{task}: ", "completion": "yes"}
        (tmp_path / "set" / task / "train.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "set" / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: self_instruct\n  data_dir: self_instruct\n"
        "- config_name: super_natural_instructions\n  data_dir: super_natural_instructions\n---\n"
    )
    source = f"hf:{tmp_path / 'set'}@super_natural_instructions"
    assert texts(tokens(source), "train") == ["super_natural_instructions: yes"]
    assert read_conversations(source).identity == read_conversations(source).identity
    other = f"hf:{tmp_path / 'set'}@self_instruct"
    assert read_conversations(source).identity != read_conversations(other).identity


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl is empty: expected at least one record"),
        ("a.jsonl", "\n\n", r"a\.jsonl is empty"),
        ("a.json", "[]", r"a\.json is empty"),
        ("a.csv", "prompt,completion\n", r"a\.csv is empty"),
        (
            "a.jsonl",
            '{"prompt": "a", "completion": "b"}\n{"prompt": "a"',
            r"a\.jsonl:2 is not JSON",
        ),
        ("a.jsonl", '\n{"prompt": "a"}', r"a\.jsonl:2: expected prompt and completion"),
        ("a.json", '[\n{"prompt": "a",\n"answer": "b"}]', r"a\.json:2: expected prompt"),
        ("a.json", '[{"prompt": "a", "completion": null}]', r"a\.json:1: field 'completion'"),
        ("a.csv", "prompt,completion\na\n", r"a\.csv:2 has 1 fields, the header 2"),
        ("a.txt", "words", r"a\.txt holds no records: .* reads \.jsonl"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        tokens(tmp_path / name)


def test_named_fields(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"q": "a", "a": "b"}\n')
    assert texts(tokens(tmp_path / "a.jsonl", fields=("q", "a")), "train") == ["a\nb"]
    with pytest.raises(UserError, match=r"data\.fields must name two keys .* got \['q'\]"):
        tokens(tmp_path / "a.jsonl", fields=("q",))


def test_one_question_cannot_be_held_out(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(RECORDS[0]) + "\n")
    with pytest.raises(UserError, match=r"has 1 question, too few .* set data\.val_fraction = 0"):
        tokens(tmp_path / "a.jsonl", 0.05)


@pytest.mark.slow
def test_the_instructions_that_a_package_ships_really_come():
    found = tokens("alpaca-demo", 0.05)
    assert found.facts["records"] == 999
    assert found.facts["unanswered"] < 10
    assert len(texts(found, "val")) in range(45, 56)
    known = "Given the parameters of a triangle, find out its perimeter."
    assert sum(text.startswith(known) for part in ("train", "val") for text in texts(found, part))


def test_one_field_of_the_hub_is_no_conversation():
    with pytest.raises(UserError, match=r"names one field, 'text', but a conversation has two"):
        read_conversations("hf:a/b:train:text")


def test_a_fraction_that_leaves_nothing_to_train_on(tmp_path):
    lines = [f'{{"prompt": "{n}", "completion": "a"}}\n' for n in range(2)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    with pytest.raises(UserError, match=r"val_fraction=0.9 holds out all 2 conversations"):
        tokens(tmp_path / "a.jsonl", val_fraction=0.9)
