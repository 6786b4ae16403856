import io
import math
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from PIL import Image

from expertmesh.errors import MissingDependency
from expertmesh.report import figures
from expertmesh.report.read import read_run
from tests.report.synthetic import read_lines, write_lines, write_run

EVERY = [
    "loss",
    "optimizer",
    "throughput",
    "load",
    "load_over_time",
    "drops",
    "entropy",
    "by_token",
]


def draw(path: Path) -> dict[str, bytes]:
    return {picture.subject.name: picture.png for picture in figures.draw(read_run(path))}


def assert_shows_something(png: bytes) -> None:
    image = Image.open(io.BytesIO(png)).convert("RGB")
    colours = image.getcolors(maxcolors=image.width * image.height)
    counts = {colour: count for count, colour in colours or []}
    assert image.width == round(9.6 * 160)
    assert image.height >= 300
    assert len(counts) > 50
    assert 0.1 < counts[255, 255, 255] / (image.width * image.height) < 0.99


def test_every_figure(tmp_path: Path) -> None:
    drawn = draw(write_run(tmp_path / "run", drops=True))
    assert list(drawn) == EVERY
    for png in drawn.values():
        assert_shows_something(png)


@pytest.mark.parametrize("num_layers", [1, 3, 5, 9])
def test_any_number_of_layers(tmp_path: Path, num_layers: int) -> None:
    path = write_run(tmp_path / "run", steps=60, num_layers=num_layers, num_experts=4)
    for png in draw(path).values():
        assert_shows_something(png)


def test_many_experts_and_few_steps(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=5, num_layers=2, num_experts=64, drops=True)
    drawn = draw(path)
    assert list(drawn) == EVERY[:-1]  # no evaluation yet
    for png in drawn.values():
        assert_shows_something(png)


def test_no_figure_of_drops_without_drops(tmp_path: Path) -> None:
    assert "drops" not in draw(write_run(tmp_path / "run", steps=20))


def test_a_dense_model_has_no_routing_to_draw(tmp_path: Path) -> None:
    assert list(draw(write_run(tmp_path / "run", num_layers=0))) == EVERY[:3]


@pytest.mark.filterwarnings("error")
def test_nan_dead_experts_and_layers_of_different_size(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_layers=2)
    metrics, routing = read_lines(path / "metrics.jsonl"), read_lines(path / "routing.jsonl")
    for record in metrics:
        record["loss"] = float("nan")
    for record in routing:
        first, second = record["layers"].values()
        first["load"][3] = 0
        second["load"] = [5, 900, 1]
        del second["dropped_by_position"]
    routing[4]["layers"]["blocks.0.moe"]["load"] = [0] * 8
    write_lines(path / "metrics.jsonl", metrics)
    write_lines(path / "routing.jsonl", routing)
    for png in draw(path).values():
        assert_shows_something(png)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("key", ["loss", "val_loss"])
def test_losses_without_bounds(tmp_path: Path, key: str) -> None:
    path = write_run(tmp_path / "run", num_layers=0)
    metrics = read_lines(path / "metrics.jsonl")
    for record in metrics:
        if key in record and record["step"] > 200:
            record[key] = math.inf
    write_lines(path / "metrics.jsonl", metrics)
    assert_shows_something(draw(path)["loss"])


def test_same_run_same_bytes_and_nothing_left_behind(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=50)
    before = dict(matplotlib.rcParams)
    assert draw(path) == draw(path)
    assert dict(matplotlib.rcParams) == before


def test_drawing_needs_no_pyplot(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=20)
    code = (
        "import sys; from expertmesh.report import write_report; "
        f"assert 'matplotlib' not in sys.modules; write_report({str(path)!r}); "
        "assert 'matplotlib' in sys.modules; assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_missing_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(write_run(tmp_path / "run", steps=20))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependency, match=r"pip install 'expertmesh\[report\]'"):
        figures.draw(run)
