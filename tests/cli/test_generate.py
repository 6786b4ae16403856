import json
import sys
from pathlib import Path

import pytest
import torch

from expertmesh.cli.main import main
from expertmesh.train.loop import Trainer
from tests.openmoe.folders import write_folder
from tests.openmoe.vocabulary import write_small
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
        ("--temperature", "1e-300"),
        ("--temperature", "inf"),
        ("--seed", "9" * 30),
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


@pytest.mark.parametrize(
    ("flag", "value", "got"),
    [
        ("--top-p", "0.1", "--top-p 0.1 and --top-k 0"),
        ("--top-k", "3", "--top-p 1.0 and --top-k 3"),
    ],
)
def test_what_the_likeliest_token_leaves_no_use_for_is_refused(
    flag: str, value: str, got: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", "nowhere", "--temperature", "0", flag, value]) == 2
    assert f"got {got}; leave them out" in capsys.readouterr().err


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


@pytest.fixture(scope="module")
def openmoe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A published-style folder with its tokenizer."""
    path = tmp_path_factory.mktemp("openmoe")
    vocabulary = write_small(tmp_path_factory.mktemp("vocabulary"))
    write_folder(path, num_layers=2, tokenizer=vocabulary, vocab_size=1000, max_seq_len=40)
    return str(path)


def test_a_published_folder_writes_text(
    openmoe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import expertmesh.hf  # noqa: F401

    tokenizer = AutoTokenizer.from_pretrained(openmoe)
    model = AutoModelForCausalLM.from_pretrained(openmoe)
    prompt = tokenizer("the router says", return_tensors="pt")
    beyond = list(range(len(tokenizer), 1000))
    expected = model.generate(**prompt, max_new_tokens=5, do_sample=False, suppress_tokens=beyond)
    command = ["generate", "--model", openmoe, "--prompt", "the router says", "--temperature", "0"]
    file = tmp_path / "out.txt"
    assert main([*command, "--max-new-tokens", "5", "--output", str(file)]) == 0
    out = capsys.readouterr().out
    assert out == tokenizer.decode(expected[0], skip_special_tokens=True) + "\n"
    assert out.startswith("the router says")
    assert file.read_text() == out


def test_weights_go_where_the_map_says(
    openmoe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", "--model", openmoe, "--temperature", "0", "--max-new-tokens", "4"]
    assert main([*command, "--dtype", "fp32"]) == 0
    expected = capsys.readouterr().out
    device_map = json.dumps({"": "cpu", "model.layers.1": "disk"})
    placing = ["--device-map", device_map, "--offload-folder", str(tmp_path / "offload")]
    assert main([*command, *placing]) == 0
    assert capsys.readouterr().out == expected
    assert list((tmp_path / "offload").iterdir())
    memory = ["--device-map", "auto", "--max-memory", "cpu=10GiB"]
    assert main([*command, *memory]) == 0
    assert capsys.readouterr().out == expected


def test_llamas_folder_writes_text(
    openmoe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
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
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path)
    assert main(["generate", "--model", str(tmp_path), "--prompt", "a b"]) == 0
    assert capsys.readouterr().out.startswith("a b")
    # An empty text begins with the end of the one before, if there is such a token.
    assert main(["generate", "--model", str(tmp_path)]) == 0
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    assert main(["generate", "--model", str(tmp_path)]) == 2
    said = "--prompt must have at least one token, got none, and the tokenizer has no bos_token"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give either a RUN"),
        (["a", "--model", "b"], "give either a RUN"),
        (["a", "--dtype", "bf16"], "--dtype goes with --model"),
        (["a", "--prompt", "half \udce9 character"], "--prompt must be UTF-8 text, got '\\udce9'"),
        (["a", "--output", "runs"], "--output must be a file in a folder that is there, got runs"),
        (["a", "--output", "not/there.txt"], "--output must be a file in a folder that is there"),
        (["--model", ""], "--model : there is no such folder"),
        (["--model", "./runs"], "--model ./runs has no config.json"),
        (["--model", "./nowhere"], "--model ./nowhere: there is no such folder"),
        (["--model", "runs/nowhere"], "--model runs/nowhere: there is no such folder"),
        (["--model", "OPENMOE", "--device-map", "{0:"], "--device-map is no JSON"),
        (["--model", "OPENMOE", "--device-map", "{}"], "device_map says nothing of"),
        (["--model", "OPENMOE", "--max-memory", "40GiB"], "--max-memory must be such as"),
        (["--model", "OPENMOE", "--max-memory", "cpu=much"], "`size` much is not in a valid"),
        (
            ["--model", "OPENMOE", "--max-memory", "cpu=1GiB", "--device-map", "cpu"],
            "--max-memory goes with --device-map auto, got --device-map cpu",
        ),
        (["--model", "OPENMOE", "--device-map", "gpu"], "device"),
        (["--model", "OPENMOE", "--max-new-tokens", "40"], "set --max-new-tokens=39"),
        (["--model", "OPENMOE", "--prompt", "z" * 60], "max_position_embeddings=40"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    openmoe: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    words = [openmoe if word == "OPENMOE" else word for word in options]
    assert main(["generate", *words]) == 2
    errors = capsys.readouterr().err
    assert f"error: {message}" in errors or message in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("published", [False, True])
def test_a_run_is_no_folder_of_transformers(
    tmp_path: Path, published: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    run.folder.mkdir()
    run.save()
    if published:
        (run.folder / "published").mkdir()
    assert main(["generate", "--model", str(run.folder)]) == 2
    told = capsys.readouterr().err
    assert f"--model {run.folder} is a run: `expertmesh generate {run.folder}` reads it; " in told
    advice = f"--model {run.folder}/published holds" if published else "train.save_published writes"
    assert advice in told


def test_what_libraries_say_of_a_folder_is_one_line_with_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert main(["generate", "--model", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --model {tmp_path} cannot be loaded: ")


def test_a_broken_checkpoint_is_one_line(
    openmoe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path, num_layers=2, tokenizer=Path(openmoe) / "spiece.model", vocab_size=1000)
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    assert main(["generate", "--model", str(tmp_path)]) == 2
    assert f"error: --model {tmp_path} cannot be loaded" in capsys.readouterr().err


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    openmoe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path, num_layers=2, tokenizer=Path(openmoe) / "spiece.model", vocab_size=512)
    assert main(["generate", "--model", str(tmp_path)]) == 2
    assert "the model only vocab_size=512" in capsys.readouterr().err
