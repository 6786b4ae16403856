"""Sections made of small results that never were."""

import json

import pytest

STAMP = {
    "command": "python benchmarks/made_up.py",
    "date": "2026-01-02T03:04:05+00:00",
    "commit": "0123",
    "hardware": {"cpu": "a processor", "threads": 3, "gpus": ["a GPU"]},
    "versions": {"torch": "2.11.0"},
}
STEP = {
    "model": "olmoe-1b-7b",
    "layers": 16,
    "rows": 4,
    "micro_batches": 1,
    "sequence": 4096,
    "rounds": 8,
    "precision": "bfloat16",
    "mfu_is": "tokens/s * 3 * forward FLOPs per token / the device's bfloat16 peak",
    "contenders": {
        "expertmesh": {
            "tokens_per_second": 41234.5,
            "step_ms": 397.3,
            "mfu": 0.312,
            "peak_gib": 80.25,
            "num_params": 6_900_000_000,
            "num_active_params": 1_280_000_000,
            "forward_flops_per_token": 1,
            "profile": {"parts": {"experts": 0.55, "attention": 0.2}, "kernels": []},
        },
        "transformers, grouped_mm": {"error": "out of memory"},
    },
    "aims": [{"what": "tokens/s", "found": 41234.5, "wanted": "at least 40000", "met": True}],
}
OPENMOE = {
    "seq_len": 2048,
    "mfu_is": "a formula",
    "published": {"samples_per_second": 2.61, "memory_gb": {"8b bf16": 23}},
    "training": {
        "8b, 4 rows": {
            "samples_per_second": 3.125,
            "tokens_per_second": 6400.0,
            "mfu": 0.25,
            "memory_gb": 99.5,
            "first_loss": 12.5,
            "last_loss": 1.25,
            "experts_backend": "triton",
        },
        "8b, 16 rows, recomputed": {"error": "out of memory"},
    },
    "inference": {"8b bf16": {"weights_gb": 20.0, "memory_gb": 21.5, "ms_per_token": 12.25}},
}
LOADED = {
    "published_gb": {"8b bfloat16": 23},
    "new_tokens": 32,
    "settings": {
        "8b, GPU": {
            "size": "8b",
            "dtype": "bfloat16",
            "devices": [],
            "gpu_gb_load": 20.0,
            "gpu_gb": 20.5,
            "host_gb": 1.5,
        },
        "34b, GPU": {"size": "34b", "error": "killed by signal 9, Killed"},
    },
}
TIMES = {
    "forward": {"grouped_mm": 1.0, "block_sparse": 2.0},
    "forward and backward": {"grouped_mm": 3.0, "block_sparse": 4.0},
}
SPARSE = {
    "dtype": "bfloat16",
    "block": 128,
    "shapes": {"olmoe-1b-7b": {}},
    "median_ms": {"olmoe-1b-7b": TIMES},
    "saved_mib": {"olmoe-1b-7b": {"grouped_mm": 100.0}},
    "relative_error": {"olmoe-1b-7b": {"y": 0.001, "dx": 0.002}},
    "parts_ms": {"olmoe-1b-7b": {"topology": 0.125, "SDD": 0.5}},
    "unequal": {"olmoe-1b-7b": {"widths": [512, 1536], "median_ms": TIMES}},
}
PEERS = {
    "tuned": False,
    "matmul_tflops": 800.0,
    "shapes": {name: dict.fromkeys("TDFEK", 1) for name in ("first", "second")},
    "median_ms": {
        "first": {"forward": {"expertmesh": 1.0}, "forward and backward": {"expertmesh": 2.0}},
        "second": {
            "forward": {"expertmesh": 1.0, "SonicMoE": 3.0},
            "forward and backward": {"expertmesh": 2.0, "SonicMoE": 5.0},
        },
    },
    "saved_mib": {"first": {}, "second": {"SonicMoE": 7.0}},
    "missing": {"first": {"SonicMoE": "failed: RuntimeError"}, "second": {}},
}
KERNELS = {
    "kernels": {
        "first": {"expertmesh": [["up", 1.25], ["down", 0.5]], "SonicMoE": [["gemm", 2.0]]},
        "second": {"expertmesh": [["up", 4.0]]},
    }
}
CUT = {"first_step_s": {}, "skew_ms": {"first": {"uniform": 2.0, "Zipf": 3.0}}, "tokens": {}}
MADE_UP = {
    "loads_gpu": (
        CUT,
        "## Experts under load on one GPU",
        ["| first | 2.00 (1.00) | 3.00 (1.50) |"],
    ),
    "step_gpu": (
        STEP,
        "## A training step on one GPU",
        [
            "| expertmesh | 41,234 | 397.3 | 31.2% | 80.2 | 6,900,000,000 | 1,280,000,000 |",
            "| transformers, grouped_mm | out of memory | | | | | |",
            "| tokens/s | 41,234.50 | at least 40000 | met |",
            "experts 55%, attention 20%",
        ],
    ),
    "openmoe_gpu": (
        OPENMOE,
        "## OpenMoE on one GPU",
        [
            "| 8b, 4 rows | 3.12 | 6,400 | 25.0% | 99.5 | 12.50 to 1.25 | triton |",
            "| 8b, 16 rows, recomputed | out of memory |",
            "| 8b bf16 | 20.0 | 21.5 | 23 | 12.2 |",
        ],
    ),
    "openmoe_load": (
        LOADED,
        "## Loading OpenMoE",
        [
            "| 8b, GPU | one device | 20.0 | 20.5 | 1.5 | 23 |",
            "| 34b, GPU | killed by signal 9, Killed |",
        ],
    ),
    "block_sparse_gpu": (
        SPARSE,
        "## Experts as block-sparse products on one GPU",
        [
            "| olmoe-1b-7b | 1.00 / 3.00, 100 | 2.00 / 4.00 |",
            "| olmoe-1b-7b | 1.00 / 3.00 | 2.00 / 4.00 |",
            "topology 0.12, SDD 0.50 ms of the forward pass; outputs and gradients within 2e-03",
        ],
    ),
    "products_gpu": (
        KERNELS,
        "## The kernels of the layer's step one by one",
        ["| first | 1.75, 2 | 2.00, 1 |", "| second | 4.00, 1 |  |"],
    ),
    "energy_gpu": (
        {"rows": {"first": {"up": {"ms": 0.5, "mhz": 1400, "watts": 690, "joules": 0.345}}}},
        "## Energy of the layer's step on one GPU",
        ["| first | up | 0.50 | 1400 | 690 | 0.345 |"],
    ),
    "bench_gpu": (
        PEERS,
        "## The layer beside other libraries' on one GPU",
        [
            "| first (1, 1, 1, 1, 1) | 1.00 / 2.00 |  | 0.00 |",
            "| second (1, 1, 1, 1, 1) | 1.00 / 2.00 | 3.00 / 5.00, 7 | 0.00 |",
            "SonicMoE, forward and backward: 2.50 times ours in the geometric mean of 1 shapes",
            "- SonicMoE at first: failed: RuntimeError",
        ],
    ),
}


@pytest.mark.parametrize("name", MADE_UP)
def test_a_result_has_its_section(script, tmp_path, name):
    result, title, expected = MADE_UP[name]
    page = script("page")
    assert page.render(tmp_path) == page.INTRODUCTION
    (tmp_path / f"{name}.json").write_text(json.dumps(STAMP | result), encoding="utf-8")
    text = page.render(tmp_path)
    assert text.count("\n## ") == 1
    assert title in text
    assert "`python benchmarks/made_up.py`, commit 0123, a GPU, torch 2.11.0" in text
    for words in expected:
        assert words in text


def test_every_result_is_shown(script):
    page = script("page")
    names = {path.stem for path in page.RESULTS.glob("*.json")}
    assert names - page.SECTIONS.keys() == {"equivalence"}


def test_tables_have_as_many_cells_in_every_row(script):
    width = 0
    for line in script("page").render().splitlines():
        width = width if line.startswith("|") else 0
        if line.startswith("|"):
            assert line.count("|") == (width or line.count("|")), line
            width = line.count("|")


def test_missed_aims_are_on_the_page(script):
    page = script("page")
    result = script("record").load("routing_cost")
    text = page.SECTIONS["routing_cost"](result, "")
    for name, ms in result["median_ms"].items():
        above = ms > result["median_ms"]["top-k"] and name not in result["targets"]
        assert (f"{name} ({ms / result['median_ms']['top-k']:.2f})" in text) == above
    several = script("record").load("multi_gpu")
    several["layer"]["mixtral-8x7b"] |= {"fraction of plain": 0.5, "host waits": 3}
    text = page.SECTIONS["multi_gpu"](several, "")
    assert "- layer: mixtral-8x7b all-to-all at 0.50 of a plain one" in text
    assert "- layer: mixtral-8x7b waits 3x for the device" in text
    missed = text.index("Missed:")
    assert "at least 0.85" in text[:missed]


def test_a_table_is_apart_from_words_on_both_sides(script):
    apart = script("multi_sections")._apart
    assert apart(["words", "| a |", "|---|", "more"]) == ["words", "", "| a |", "|---|", "", "more"]
