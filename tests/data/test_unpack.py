import io
import stat
import tarfile
import zipfile

import pytest

from expertmesh.data.unpack import unpack
from expertmesh.errors import UserError


def test_only_matching_members_of_a_wheel(index, tmp_path):
    path = index.wheel("tales", {"t/a.txt": "a", "t/deep/b.txt": "b", "t/c.py": "c"})
    unpack(path, ["t/*.txt"], tmp_path / "index")
    assert (tmp_path / "index" / "t" / "deep" / "b.txt").read_text() == "b"
    assert not (tmp_path / "index" / "t" / "c.py").exists()


def test_only_matching_members_of_a_tar(index, tmp_path):
    path = index.tar("tales-1.0.tar.gz", {"tales-1.0/a.txt": "a", "tales-1.0/setup.py": "1/0"})
    unpack(path, ["*/a.txt"], tmp_path)
    assert (tmp_path / "tales-1.0" / "a.txt").read_text() == "a"
    assert not (tmp_path / "tales-1.0" / "setup.py").exists()


@pytest.mark.parametrize(
    "name", ["../evil.txt", "a/../../evil.txt", "/evil.txt", "a\\..\\evil.txt"]
)
@pytest.mark.parametrize("kind", ["tar", "wheel"])
def test_a_member_that_would_land_elsewhere_is_refused(index, tmp_path, name, kind):
    members = {name: "evil"}
    path = index.tar("bad.tar.gz", members) if kind == "tar" else index.wheel("bad", members)
    (tmp_path / "out" / "in").mkdir(parents=True)
    with pytest.raises(UserError, match=r"evil\.txt' would land elsewhere"):
        unpack(path, ["*"], tmp_path / "out" / "in")
    assert not list((tmp_path / "out").rglob("*evil*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("a.txt")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(UserError, match=r"'a\.txt' is a link"):
        unpack(tmp_path / "x.tar", ["*"], tmp_path)


def test_a_link_in_a_zip_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.whl", "w") as wheel:
        info = zipfile.ZipInfo("a.txt")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        wheel.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match=r"'a\.txt' is a link"):
        unpack(tmp_path / "x.whl", ["*"], tmp_path)


def test_permissions_are_not_the_archives(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        info = tarfile.TarInfo("run.txt")
        info.size, info.mode = 1, 0o4777
        tar.addfile(info, io.BytesIO(b"x"))
    unpack(tmp_path / "x.tar", ["*"], tmp_path)
    assert not (tmp_path / "run.txt").stat().st_mode & (stat.S_ISUID | stat.S_IXUSR)


def test_a_pattern_without_a_member(index, tmp_path):
    path = index.wheel("tales", {"a.txt": "a"})
    with pytest.raises(UserError, match=r"holds no member like \['\*\.md'\]"):
        unpack(path, ["*.txt", "*.md"], tmp_path)


def test_not_an_archive(tmp_path):
    (tmp_path / "x.tgz").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"x\.tgz is not a readable archive"):
        unpack(tmp_path / "x.tgz", ["*"], tmp_path)
