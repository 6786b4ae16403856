import re

import pytest

from expertmesh.data import DataConfig, build_data
from expertmesh.data.catalog import CATALOG, find
from expertmesh.data.sources import NpmPackage
from expertmesh.data.tokenizer import load_tokenizer
from expertmesh.errors import UserError


@pytest.mark.parametrize("entry", CATALOG.values(), ids=CATALOG)
def test_an_entry_is_complete(entry):
    assert entry.summary
    assert entry.licence
    for source in entry.sources:
        assert re.fullmatch("[0-9a-f]{64}", source.sha256)
        assert source.size > 0
        assert source.keep


def test_the_demos_text_has_two_registries():
    kinds = [type(source) for source in CATALOG["classics"].sources]
    assert len(set(kinds)) == 2
    assert kinds[0] is not NpmPackage, "the first choice must not need npm"


def test_find_names_the_nearest():
    with pytest.raises(UserError, match="no data set is called 'clasics'; did you mean 'classics'"):
        find("clasics")


@pytest.mark.slow
def test_the_demos_text_really_comes():
    data = build_data(DataConfig(source="classics"))
    assert len(data.train) > 20_000
    assert len(data.val) > 1_000
    assert len(data.provenance["sources"][0]["archive_sha256"]) == 64


@pytest.mark.slow
def test_gpt2s_tokenizer_really_comes():
    tokenizer = load_tokenizer("tokenizer-gpt2")
    assert tokenizer.encode("Hello world!").tolist() == [15496, 995, 0]
    assert tokenizer.decode([15496, 995, 0, tokenizer.eos_id]) == "Hello world!"
