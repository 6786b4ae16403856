"""The run file of OpenMoE's pre-training: a weighted mixture of prose and code that resumes."""

import json
import random
import tomllib
from pathlib import Path

import pyarrow
import pytest
import zstandard
from pyarrow import parquet

from expertmesh.models.presets import decoder_preset
from expertmesh.train.loop import Trainer
from expertmesh.train.run_file import load_run_file, parse_run
from tests.train.tiny import Silent

RUN_FILE = Path(__file__).parents[2] / "examples" / "openmoe" / "pretrain.toml"
WORDS = ["the", "experts", "share", "work", "and", "tokens", "choose", "two", "of", "them"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Folders like RedPajama's, one of them packed, and like The Stack's; three shards each."""
    root, draw = tmp_path_factory.mktemp("text"), random.Random(0)

    def sentence():
        return " ".join(draw.choices(WORDS, k=40)) + ".\n"

    for name in ("c4", "book", "code"):
        (root / name).mkdir()
        for shard in range(3):
            path = root / name / f"shard_{shard}"
            if name == "code":
                table = {"content": [f"def f_{n}():\n    return {n}\n" * 8 for n in range(60)]}
                table |= {"lang": ["Python"] * 60}
                parquet.write_table(pyarrow.table(table), path.with_suffix(".parquet"))
                continue
            records = [{"text": sentence(), "meta": {"url": "u"}} for _ in range(60)]
            content = "".join(json.dumps(record) + "\n" for record in records).encode()
            if name == "book":
                path.with_suffix(".jsonl").write_bytes(content)
            else:
                path.with_suffix(".jsonl.zst").write_bytes(zstandard.compress(content))
    return root


def tables(sources, folder, steps):
    """The shipped run file, shorter and on these texts."""
    content = tomllib.loads(RUN_FILE.read_text(encoding="utf-8"))
    mix = {"c4": 25.0, "book": 25.0, "code": 50.0}
    content["data"] |= {
        "mix": {str(sources / name): weight for name, weight in mix.items()},
        "seq_len": 64,
    }
    content["train"] |= {
        "steps": steps, "batch": 8, "micro_batch": 8, "save_every": 6, "log_every": 1
    }  # fmt: skip
    content["optim"]["warmup_steps"] = 4
    content["eval"] = {"every": 0, "batches": 1}
    content["run"]["dir"] = str(folder)
    return content


def fit(content):
    display = Silent()
    Trainer(parse_run(content)).fit(display)
    return display.losses


@pytest.mark.filterwarnings("ignore::expertmesh.errors.CausalityWarning")
def test_it_learns_and_continues_where_it_stopped(sources, tmp_path):
    whole = fit(tables(sources, tmp_path / "whole", 12))
    assert whole[-1] < whole[0] - 0.5
    begun = fit(tables(sources, tmp_path / "halves", 6))
    continued = fit(tables(sources, tmp_path / "halves", 12))
    assert begun + continued == whole
    told = json.loads((tmp_path / "whole" / "data.json").read_text())
    assert told["objective"] == "ul2-openmoe"
    for record, name in zip(told["sources"], ("c4", "book", "code"), strict=True):
        assert record["source"].endswith(name)
        assert record["files"] == 3
        assert min(record["train_tokens"], record["val_tokens"], record["train_samples"]) > 0


def test_the_run_file_is_the_published_recipe():
    run = load_run_file(RUN_FILE)
    assert run.data.objective == "ul2-openmoe"
    assert (run.optim.name, run.optim.schedule) == ("adafactor", "inverse_sqrt")
    assert (run.optim.lr, run.optim.beta2_decay) == (0.01, 0.8)
    preset = decoder_preset("openmoe-test")
    assert run.model.router_options == {**preset.router_options, "capacity": "jax"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::expertmesh.errors.CausalityWarning")
def test_it_runs_as_it_is_shipped(tmp_path):
    overrides = [f"--run.dir={tmp_path}", "--train.steps=30", "--eval.batches=1"]
    display = Silent()
    Trainer(load_run_file(RUN_FILE, overrides)).fit(display)
    assert display.losses[-1] < display.losses[0] - 1
