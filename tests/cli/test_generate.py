import sys
from pathlib import Path

import pytest

from expertmesh.cli.main import main
from expertmesh.train.loop import Trainer
from tests.train.tiny import Silent, make_run


@pytest.fixture
def folder(tmp_path: Path) -> str:
    run = make_run(tmp_path, "--train.steps=1")
    Trainer(run).fit(Silent())
    return str(run.folder)


def test_text_follows_the_prompt_and_the_seed(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = []
    for seed in ("1", "1", "2"):
        command = ["generate", folder, "--prompt", "7 bottles", "--max-new-tokens", "12"]
        assert main([*command, "--seed", seed, "--output", str(tmp_path / "out.txt")]) == 0
        texts.append((tmp_path / "out.txt").read_text())
        assert capsys.readouterr().out == texts[-1]
    assert texts[0].startswith("7 bottles")
    assert texts[0] == texts[1] != texts[2]


def test_greedy_text_is_the_models_likeliest(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from expertmesh.data.tokenizer import ByteTokenizer
    from expertmesh.train.finished import load_run

    model, tokenizer = load_run(folder).model, ByteTokenizer()
    ids = [int(i) for i in tokenizer.encode("7 bott")]
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    command = ["generate", folder, "--prompt", "7 bott", "--temperature", "0"]
    assert main([*command, "--max-new-tokens", "6"]) == 0
    assert capsys.readouterr().out == tokenizer.decode(ids) + "\n"


def test_several_samples_from_an_empty_prompt(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--max-new-tokens", "4", "--num-samples", "2", "--top-k", "20", "--top-p", "0.9"]
    assert main(["generate", folder, *options]) == 0
    out = capsys.readouterr().out
    assert "--- sample 1 of 2" in out
    assert "--- sample 2 of 2" in out


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--max-new-tokens", "0"),
        ("--temperature", "-1"),
        ("--top-p", "0"),
        ("--top-k", "-1"),
        ("--num-samples", "0"),
    ],
)
def test_values_out_of_range_are_named(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "nowhere", flag, value]) == 2
    assert f"error: {flag} must be" in capsys.readouterr().err


def test_what_the_model_has_no_positions_for_is_refused(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from expertmesh.train.finished import load_run

    longest = load_run(folder).model.config.max_seq_len
    room = longest - len("7 bottles")
    prompt = ["generate", folder, "--prompt", "7 bottles"]
    assert main([*prompt, "--max-new-tokens", str(room + 1)]) == 2
    assert f"set --max-new-tokens={room}" in capsys.readouterr().err
    assert main(["generate", folder, "--prompt", "x" * longest]) == 2
    assert f"max_seq_len={longest}" in capsys.readouterr().err
    assert main([*prompt, "--max-new-tokens", str(room)]) == 0
    assert capsys.readouterr().err == ""


def test_without_transformers_the_pip_line_is_printed(
    folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert main(["generate", folder]) == 2
    assert "pip install 'expertmesh[hf]'" in capsys.readouterr().err


def test_a_folder_without_a_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(tmp_path)]) == 2
    assert "is no run's folder" in capsys.readouterr().err
