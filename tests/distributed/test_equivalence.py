"""Every mesh computes what one process computes: the contract of the library.

`make test` takes a sample in which every setting and every kind of axis occurs; the slow tests take
all layouts with all settings, as `benchmarks/equivalence.py` does for docs/equivalence.md.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from expertmesh.testing.equivalence import COLUMNS
from tests.distributed.compared import LIMIT, compare, reference, suited
from tests.distributed.layouts import LAYOUTS, Layout
from tests.distributed.settings import SETTINGS
from tests.distributed.training import Numbers

ROOT = Path(__file__).parents[2]
BY_NAME = {layout.name: layout for layout in LAYOUTS}

SAMPLE: dict[str, list[str]] = {
    "dp2 zero3": ["padded"],
    "ep2 zero1/0": ["dropless", "position", "one layer at 3 depths"],
    "ep2 static zero2": ["token", "random"],
    "tp2 ep2 zero2": ["priority", "few tokens", "openmoe"],
    "cp2 ep2 zero3": ["probability", "padded"],
    "pp2 zero0": ["random"],
    "pp2 interleaved2 zero2": ["priority"],
    "edp2 ep2 outside zero1": ["dropless", "one expert", "one layer at 3 depths"],
    "ep2 etp2 zero0/3": ["position"],
    "cp2 tp2 ep2 etp2 zero3": ["token"],
    "pp2 dp2 ep2 zero2": ["one expert", "openmoe"],
    "dp2 cp2 tp2 edp2 ep2 etp2 zero2": ["dropless"],
}


def assert_equivalent(layout: Layout, names: list[str], timeout: float) -> None:
    found = compare(layout, names, timeout=timeout)
    for name, row in found.items():
        print(f"{layout.name}, {name}: " + ", ".join(f"{c} {row[c]:.1e}" for c in COLUMNS))
    worst = max(error for row in found.values() for error in row.values())
    assert worst <= LIMIT, found


@pytest.mark.parametrize("layout", SAMPLE)
def test_sample_of_the_table(layout: str) -> None:
    assert_equivalent(BY_NAME[layout], SAMPLE[layout], timeout=120)


def test_float32_agrees_to_its_own_rounding() -> None:
    layout = BY_NAME["tp2 ep2 zero2"]
    found = compare(layout, ["dropless", "token"], Numbers(torch.float32), timeout=120)
    worst = max(error for row in found.values() for error in row.values())
    assert 1e-9 < worst < 1e-3, found


def test_the_sample_has_every_setting_and_every_axis() -> None:
    assert {name for names in SAMPLE.values() for name in names} == SETTINGS.keys()
    axes = {axis for name in SAMPLE for axis, n in BY_NAME[name].axes.items() if n > 1}
    assert axes == {"pp", "dp", "cp", "tp", "edp", "ep", "etp"}
    assert {BY_NAME[name].zero for name in SAMPLE} == {0, 1, 2, 3}


def test_the_table_has_meshes_enough_of_every_size() -> None:
    assert {layout.world for layout in LAYOUTS} == {1, 2, 4, 8}
    assert len(BY_NAME) == len(LAYOUTS) >= 24


@pytest.mark.slow
@pytest.mark.parametrize("layout", BY_NAME)
def test_whole_table(layout: str) -> None:
    assert_equivalent(BY_NAME[layout], suited(BY_NAME[layout]), timeout=1800)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_reference_learns_and_is_worth_comparing(name: str) -> None:
    seen = reference(name)
    assert seen.loss_S.isfinite().all()
    assert (seen.norm_S > 0.5).all()  # so that clipping at 0.5 does something
    idle = name == "one expert"
    zero = [n for n, gradient in seen.gradients.items() if gradient.norm() < 1e-6]
    assert not zero or idle, zero
    assert len({gradient.dtype for gradient in seen.gradients.values()} - {torch.float64}) == 0


def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("equivalence", ROOT / "benchmarks/equivalence.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_what_its_command_writes_and_shows_every_layout() -> None:
    module = benchmark()
    result = module.load()
    assert module.render(result) == (ROOT / "docs/equivalence.md").read_text(encoding="utf-8")
    assert result["layouts"].keys() == BY_NAME.keys()
    for name, row in result["layouts"].items():
        assert row["errors"].keys() == set(suited(BY_NAME[name]))
        assert max(e for errors in row["errors"].values() for e in errors.values()) <= LIMIT
