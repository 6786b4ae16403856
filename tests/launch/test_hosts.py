import pytest

from expertmesh.errors import UserError
from expertmesh.launch.hosts import Host, read_hostfile


def hostfile(tmp_path, text):
    path = tmp_path / "hosts"
    path.write_text(text)
    return path


def test_names_slots_comments_and_empty_lines(tmp_path):
    path = hostfile(tmp_path, "# ours\none slots=4\n\n  two  # the old one\nuser@three slots=1\n")
    assert read_hostfile(path, 8) == [
        Host(name="one", num_processes=4),
        Host(name="two", num_processes=8),
        Host(name="user@three", num_processes=1),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must name at least one host, got .*hosts without any"),
        ("# nobody\n", "must name at least one host"),
        ("a slots=0\n", "hosts:1: expected `host .slots=N.` with N of at least 1, got 'slots=0'"),
        ("a slots=two\n", "got 'slots=two'"),
        ("a\nb max=2\n", "hosts:2: .*got 'max=2'"),
        ("a\nb\na slots=2\n", "must name each host once, got a more than once; set slots=N"),
        ("-oProxyCommand=x\n", "must not begin with '-'"),
    ],
)
def test_a_line_that_makes_no_sense_is_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_hostfile(hostfile(tmp_path, text), 1)


def test_a_host_without_a_number_of_processes(tmp_path):
    with pytest.raises(UserError, match="b runs is not said; set slots=N there, or --nproc-per"):
        read_hostfile(hostfile(tmp_path, "a slots=2\nb\n"), None)


def test_no_file(tmp_path):
    with pytest.raises(UserError, match=r"--hostfile must be a file .* got .*nowhere"):
        read_hostfile(tmp_path / "nowhere", 1)


def test_a_file_that_is_no_text(tmp_path):
    (tmp_path / "hosts").write_bytes(b"a\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"--hostfile .*hosts cannot be read: 'utf-8' codec"):
        read_hostfile(tmp_path / "hosts", 1)
