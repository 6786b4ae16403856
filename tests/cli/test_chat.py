import io
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from expertmesh.cli.main import main
from tests.openmoe.folders import write_folder
from tests.openmoe.vocabulary import umt5, write_small

GREEDY = ["--temperature", "0", "--max-new-tokens", "6"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("openmoe")
    vocabulary = write_small(tmp_path_factory.mktemp("vocabulary"))
    write_folder(path, num_layers=2, tokenizer=vocabulary, vocab_size=1000, max_seq_len=300)
    return str(path)


def chat(monkeypatch: pytest.MonkeyPatch, folder: str, lines: str, *options: str) -> int:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    return main(["chat", "--model", folder, *options])


def answers(folder: str, messages: list[dict[str, str]]) -> str:
    """The definition: transformers' greedy answer to a rendered conversation."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import expertmesh.hf  # noqa: F401

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), return_tensors="pt")
    beyond = list(range(len(tokenizer), 1000))
    made = model.generate(**inputs, max_new_tokens=6, do_sample=False, suppress_tokens=beyond)
    return tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_each_line_is_answered_with_what_was_said_before(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first = [{"role": "user", "content": "six?"}]
    expected = [answers(folder, first)]
    said = [*first, {"role": "assistant", "content": expected[0].strip()}]
    expected.append(answers(folder, [*said, {"role": "user", "content": "and?"}]))
    expected.append(answers(folder, [{"role": "user", "content": "and?"}]))
    assert chat(monkeypatch, folder, "six?\n\nand?\n/new\nand?\n", *GREEDY) == 0
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in expected)


def test_a_system_message_is_part_of_the_prompt(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "six?"}]
    assert chat(monkeypatch, folder, "six?\n", "--system", "be brief", *GREEDY) == 0
    assert capsys.readouterr().out == answers(folder, messages) + "\n"


def test_what_no_longer_fits_is_left_out_and_said(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    question = "z" * 120
    assert chat(monkeypatch, folder, f"{question}\n{question}\n", *GREEDY) == 0
    captured = capsys.readouterr()
    assert "the first turns no longer fit" in captured.err
    alone = answers(folder, [{"role": "user", "content": question}])
    assert captured.out == f"{alone}\n" * 2


def test_a_message_that_is_too_long_is_one_line(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, folder, "z" * 400 + "\n") == 2
    errors = capsys.readouterr().err
    assert "error: the message must be shorter than the model's max_position_embeddings" in errors


def test_bytes_that_are_no_text_are_one_line(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chat(monkeypatch, folder, "caf\udce9\n") == 2
    assert "error: the message must be UTF-8 text, got '\\udce9'" in capsys.readouterr().err
    assert chat(monkeypatch, folder, "six?\n", "--system", "caf\udce9") == 2
    assert "error: --system must be UTF-8 text, got '\\udce9'" in capsys.readouterr().err
    strict = io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", strict)
    assert main(["chat", "--model", folder]) == 2
    assert "error: messages must be UTF-8 text: " in capsys.readouterr().err


def test_on_a_terminal_a_mistake_ends_nothing(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["z" * 400, "six?"])

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", read)
    assert main(["chat", "--model", folder, *GREEDY]) == 0
    captured = capsys.readouterr()
    assert "error: the message must be shorter" in captured.err
    expected = answers(folder, [{"role": "user", "content": "six?"}])
    assert captured.out == f"{expected}\n\n"


def test_a_chat_template_that_is_missing_or_gives_nothing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=3,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "</s>": 2}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path)
    assert chat(monkeypatch, str(tmp_path), "a\n") == 2
    assert "has no chat template" in capsys.readouterr().err
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ '' }}")
    assert chat(monkeypatch, str(tmp_path), "a\n") == 2
    assert "error: the message must have at least one token, got none" in capsys.readouterr().err
    template.write_text("{{ raise_exception('System role\\nnot supported') }}")
    assert chat(monkeypatch, str(tmp_path), "a\n", "--system", "b") == 2
    said = "its chat template cannot be filled: System role not supported\n"
    assert capsys.readouterr().err.endswith(said)


@pytest.mark.slow
def test_the_spelled_out_end_stops_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path, num_layers=2, tokenizer=umt5(), vocab_size=256_384)
    # A model whose next token follows from the last alone: "]" to "hello", then "</s>" spelled out.
    chain = {423: 154_424, 154_424: 15501, 15501: 281, 281: 926, 926: 154_424}
    file = tmp_path / "model.safetensors"
    tensors = {name: torch.zeros_like(tensor) for name, tensor in load_file(file).items()}
    tensors["model.norm.weight"] += 1
    for channel, (last, following) in enumerate(chain.items()):
        tensors["model.embed_tokens.weight"][last, channel] = 1
        tensors["lm_head.weight"][following, channel] = 1
    save_file(tensors, file, metadata={"format": "pt"})
    assert chat(monkeypatch, str(tmp_path), "a question\n", "--temperature", "0") == 0
    assert capsys.readouterr().out == "hello\n"
