import pytest

from expertmesh.errors import MissingDependency, UserError, nearest, require


def test_require_returns_the_module_or_names_the_pip_command():
    assert require("json", extra="hf").dumps([]) == "[]"
    with pytest.raises(MissingDependency, match=r"pip install 'expertmesh\[report\]'"):
        require("no_such_module_here", extra="report")


def test_a_broken_module_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("import another_missing_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="another_missing_module") as caught:
        require("broken_module", extra="hf")
    assert not isinstance(caught.value, UserError)


def test_nearest_names_only_what_is_near():
    assert nearest("steps", ["step", "lr"]) == "; did you mean 'step'?"
    assert nearest("zzz", ["step", "lr"]) == ""
