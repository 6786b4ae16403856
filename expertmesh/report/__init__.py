"""Figures and one HTML page of a run, from the files that training left in its folder."""

import os
from pathlib import Path

from expertmesh.report import figures, page
from expertmesh.report.read import read_run


def write_report(run_dir: str | Path, output_dir: str | Path | None = None) -> Path:
    """Draw a run and write its page.

    Writes ``report.html``, which holds everything, and each picture as ``figures/NAME.png``. The
    same run gives the same bytes. A run that is still going is drawn as far as it has come.

    Args:
        run_dir: The folder that ``expertmesh train`` wrote.
        output_dir: Where to write, made if absent; the run's folder by default.

    Returns:
        The page's path.

    Raises:
        UserError: If the run, or its ``metrics.jsonl``, is missing.
        MissingDependency: If matplotlib is not installed.
    """
    run = read_run(run_dir)
    pictures = figures.draw(run)
    output = run.path if output_dir is None else Path(output_dir)
    folder = output / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {picture.subject.name: picture.png for picture in pictures}
    for subject in figures.SUBJECTS:
        path = folder / f"{subject.name}.png"
        if subject.name in drawn:
            _write(path, drawn[subject.name])
        else:
            # An earlier report's picture of something that this run no longer has would mislead.
            path.unlink(missing_ok=True)
    written = output / "report.html"
    _write(written, page.render(run, pictures).encode("utf-8"))
    return written


def _write(path: Path, content: bytes) -> None:
    """Replace a file whole, so that a browser never reloads half a page."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
