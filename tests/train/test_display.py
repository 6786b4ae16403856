import io

import pytest

from expertmesh.train.display import PlainDisplay, TerminalDisplay, make_display, step_line

METRICS = {
    "step": 20,
    "loss": 3.25,
    "lr": 3e-4,
    "grad_norm": 1.5,
    "tokens_per_second": 12345.6,
    "memory_mib": 512.3,
    "imbalance": 1.375,
    "dropped": 0.0125,
}


def test_line_holds_every_number() -> None:
    assert step_line({**METRICS, "val_loss": 3.5}, 600) == (
        "step  20/600  loss 3.2500  val 3.5000  lr 3.00e-04  grad 1.500  12,346 tok/s  512 MiB  "
        "load 1.38x  drops 1.2%"
    )


def test_columns_stay_in_place_without_evaluation_and_when_skipped() -> None:
    full = step_line({**METRICS, "val_loss": 3.5}, 600)
    bare = step_line({key: METRICS[key] for key in METRICS if key != "grad_norm"}, 600)
    assert bare.index("lr ") == full.index("lr ")
    assert "skipped" in bare


def test_dense_models_show_no_load() -> None:
    dense = {key: value for key, value in METRICS.items() if key not in ("imbalance", "dropped")}
    assert "load" not in step_line(dense, 600)


def test_a_pipe_gets_plain_lines() -> None:
    stream = io.StringIO()
    with PlainDisplay(600, stream) as display:
        display.message("hello")
        display.advance(20, 3.25)
        display.log(METRICS)
    assert stream.getvalue() == f"hello\n{step_line(METRICS, 600)}\n"
    assert "\x1b" not in stream.getvalue()


def test_no_terminal_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(make_display(10), PlainDisplay)


def test_a_terminal_gets_the_lines_and_a_bar(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    with TerminalDisplay(600, start=19) as display:
        display.log(METRICS)
        display.advance(20, 3.25)
    out = capsys.readouterr().out
    assert "loss 3.2500" in out
    assert "20/600" in out
