import sys
from pathlib import Path

import pytest

from expertmesh.cli import main as cli
from expertmesh.cli import report
from expertmesh.train.loop import Trainer
from tests.report.synthetic import write_run
from tests.train.tiny import Silent, make_run


def test_says_where_things_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_run(tmp_path / "run", steps=20)
    assert report.main([str(path)]) == 0
    page, pictures = capsys.readouterr().out.splitlines()
    assert page.split() == ["page", str(path / "report.html")]
    assert pictures.split() == ["pictures", str(path / "figures" / "*.png")]
    assert (path / "report.html").is_file()
    assert (path / "figures" / "loss.png").is_file()


def test_the_page_of_a_real_run_holds_its_samples(tmp_path: Path) -> None:
    run = make_run(tmp_path, "--train.steps=2")
    Trainer(run).fit(Silent())
    sample = ["--prompt", "7 <bottles>", "--max-new-tokens", "4"]
    output = ["--output", str(run.folder / "samples.txt")]
    assert cli.main(["generate", str(run.folder), *sample, *output]) == 0
    assert cli.main(["report", str(run.folder)]) == 0
    page = (run.folder / "report.html").read_text()
    assert "7 &lt;bottles&gt;" in page
    assert "bits per byte" in page


def test_output_leaves_the_run_alone(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=20)
    before = sorted(path.iterdir())
    assert report.main([str(path), "--output", str(tmp_path / "out")]) == 0
    assert sorted(path.iterdir()) == before
    assert (tmp_path / "out" / "report.html").is_file()


def test_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "no metrics.jsonl" in captured.err
    assert captured.err.count("\n") == 1


def test_missing_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path / "run", steps=20)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["report", str(path)]) == 2
    assert "run: pip install 'expertmesh[report]'" in capsys.readouterr().err
    assert not (path / "report.html").exists()
    assert not (path / "figures").exists()
