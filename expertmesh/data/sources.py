"""Where an archive comes from: one class per kind of package, each through its own client."""

import json
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

Progress = Callable[[int, int], None]
"""Told the bytes so far and the bytes in all (0 when unknown)."""


class Unreachable(Exception):
    """This source cannot deliver here and now; another may."""


@dataclass(frozen=True, kw_only=True)
class Source(ABC):
    """One release of one package that holds a data set."""

    package: str
    """Name in the registry."""
    version: str
    """Exact version."""
    sha256: str
    """SHA-256 of the archive, in hex."""
    size: int
    """Bytes of the archive."""
    keep: tuple[str, ...]
    """Shell patterns of the members to unpack; ``*`` crosses ``/``."""
    fields: tuple[str, ...] = ("text",)
    """Columns or keys that make a document, where the files hold records."""

    @property
    @abstractmethod
    def where(self) -> str:
        """Registry, package and version in words."""

    @abstractmethod
    def download(self, folder: Path, progress: Progress) -> Path:
        """Store the archive in a folder as it came, running nothing of it.

        Raises:
            Unreachable: If it cannot be had; the message says why.
        """


@final
@dataclass(frozen=True, kw_only=True)
class Wheel(Source):
    """A wheel in the index that pip is configured with."""

    @property
    def where(self) -> str:
        return f"PyPI {self.package} {self.version} (wheel)"

    def download(self, folder: Path, progress: Progress) -> Path:
        return _through_pip("wheel", self, folder, progress)


@final
@dataclass(frozen=True, kw_only=True)
class Sdist(Source):
    """A source archive in the index that pip is configured with; it is never built."""

    @property
    def where(self) -> str:
        return f"PyPI {self.package} {self.version} (sdist)"

    def download(self, folder: Path, progress: Progress) -> Path:
        return _through_pip("sdist", self, folder, progress)


@final
@dataclass(frozen=True, kw_only=True)
class NpmPackage(Source):
    """A tarball in the registry that npm is configured with; needs the npm client."""

    @property
    def where(self) -> str:
        return f"npm {self.package} {self.version}"

    def download(self, folder: Path, progress: Progress) -> Path:
        npm = shutil.which("npm")
        if npm is None:
            raise Unreachable("the npm client is not installed")
        spec = f"{self.package}@{self.version}"
        # A registry's tarball has no script to run when packed; the option says so once more.
        command = [npm, "pack", spec, "--ignore-scripts", "--loglevel=error"]
        command += ["--fetch-retries=1", "--fetch-timeout=60000"]
        done = subprocess.run(
            command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        archives = sorted(folder.glob("*.tgz"))
        if done.returncode or not archives:
            raise Unreachable(_npm_error(done.stderr) or f"npm pack ended with {done.returncode}")
        return archives[0]


def _through_pip(kind: str, source: Source, folder: Path, progress: Progress) -> Path:
    script = Path(__file__).with_name("pip_index.py")
    # -P keeps this folder out of the child's import path: pip must find the standard library's
    # modules, not files of ours that may one day have their names.
    command = [sys.executable, "-P", os.fspath(script), os.fspath(folder), kind]
    command += [source.package, source.version, source.sha256]
    path: Path | None = None
    with (folder / "pip.log").open("w+", encoding="utf-8", errors="replace") as log:
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log, text=True
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                told = json.loads(line) if line.startswith("{") else {}
                if "file" in told:
                    path = Path(told["file"])
                elif "done" in told:
                    progress(told["done"], told["total"])
        log.seek(0)
        words = log.read()
    if child.returncode or path is None:
        if "No module named 'pip'" in words:
            raise Unreachable(f"pip is not installed here; run: {sys.executable} -m ensurepip")
        raise Unreachable(_last_line(words) or f"pip ended with {child.returncode}")
    return path


def _npm_error(words: str) -> str:
    """The first line that is a sentence; a code comes before it and advice after."""
    lines = [line.removeprefix("npm error ").strip() for line in words.splitlines()]
    told = [line for line in lines if line and not line.startswith(("code ", "syscall ", "errno "))]
    return told[0] if told else ""


def _last_line(words: str) -> str:
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    return lines[-1].removeprefix("ERROR: ") if lines else ""
