import datasets
import pytest

from expertmesh.data.hub import HubSource
from expertmesh.errors import UserError


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("hf:a/b", ("a/b", "", "train", "")),
        ("hf:a/b@c", ("a/b", "c", "train", "")),
        ("hf:a/b@c:test", ("a/b", "c", "test", "")),
        ("hf:a/b:test:body", ("a/b", "", "test", "body")),
        ("hf:a/b::body", ("a/b", "", "train", "body")),
        ("hf:a/b:train[:10%]", ("a/b", "", "train[:10%]", "")),
        ("hf:a/b@c:train[5:9]+test[:2]:body", ("a/b", "c", "train[5:9]+test[:2]", "body")),
    ],
)
def test_parts_of_a_name(source, parts):
    assert HubSource.parse(source) == HubSource(*parts)


def test_no_name():
    with pytest.raises(UserError, match=r"'hf:' names no data set; write hf:NAME"):
        HubSource.parse("hf:")


def test_a_part_too_many():
    with pytest.raises(UserError, match=r"'hf:a/b:train:text:meta' has too many parts; write hf:"):
        HubSource.parse("hf:a/b:train:text:meta")


def test_a_data_set_made_by_a_script_is_read_from_its_conversion(monkeypatch):
    calls = []

    def load_dataset(name, config=None, **options):
        calls.append((name, config, options))
        if "revision" not in options:
            raise RuntimeError("Dataset scripts are no longer supported, but found a.py")
        return ["table"]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert HubSource.parse("hf:a/b@task").load() == ["table"]
    assert calls[1] == (
        "a/b",
        None,
        {"data_dir": "task", "split": "train", "revision": "refs/convert/parquet"},
    )


@pytest.mark.parametrize("error", [RuntimeError("no memory"), ConnectionError("no network")])
def test_any_failure_names_the_source(monkeypatch, error):
    def load_dataset(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"data\.source 'hf:a/b@task:train': no (memory|network)"):
        HubSource.parse("hf:a/b@task").load()
