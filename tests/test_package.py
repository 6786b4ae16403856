"""What the package promises as a whole: what it imports, and that its parts depend one way."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import expertmesh

ROOT = Path(expertmesh.__file__).parent

# Each folder or file may import those above it, and itself.
ORDER = [
    "errors",
    "shards",
    "gradients",
    "random",
    "recompute",
    "uncompiled",
    "testing",
    "kernels",
    "routing",
    "dispatch",
    "experts",
    "metrics",
    "layer",
    "residual_moe",
    "soft_moe",
    "phases",
    "models",
    "parallel",
    "convert",
    "hf",
    "data",
    "train",
    "report",
    "launch",
    "cli",
    "__main__",
]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def sources():
    return [path for path in sorted(ROOT.rglob("*.py")) if path != ROOT / "__init__.py"]


def test_data_flows_one_way_through_the_folders():
    wrong = []
    for path in sources():
        place = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for module in imports(path):
            if module.startswith("expertmesh."):
                other = module.split(".")[1]
                if ORDER.index(other) > ORDER.index(place):
                    wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_torch_distributed_stays_in_its_folders():
    # Beside the two: what a tensor's shards are, ranks for tests, torchrun's agent.
    allowed = {"parallel", "dispatch", "shards.py", "testing", "launch"}
    wrong = [
        str(path.relative_to(ROOT))
        for path in sources()
        if path.relative_to(ROOT).parts[0] not in allowed
        and any(module.startswith("torch.distributed") for module in imports(path))
    ]
    assert not wrong


def test_files_have_one_subject_by_their_length():
    long = {p.name: n for p in sources() if (n := len(p.read_text().splitlines())) > 500}
    assert not long


def test_import_brings_in_nothing_but_torch():
    # The parallel names bring in what they are made of, when they are used.
    names = [n for n, place in expertmesh._MODULES.items() if not place.startswith("parallel")]
    code = (
        f"import sys, torch; before = set(sys.modules); from expertmesh import {', '.join(names)};"
        "print(*sorted(m for m in set(sys.modules) - before if not m.startswith('expertmesh')))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    extra = (
        {name.split(".")[0] for name in run.stdout.split()} - {"torch"} - sys.stdlib_module_names
    )
    assert not extra
    assert "torch.distributed.fsdp" not in run.stdout
    assert "torch._dynamo" not in run.stdout


def test_the_compiler_is_imported_to_compile_alone():
    code = (
        "import sys, torch, expertmesh.train.loop, expertmesh.train.build, expertmesh.report;"
        "from expertmesh.models import DecoderLM, decoder_preset;"
        "model = DecoderLM(decoder_preset('nano')); model(torch.zeros(1, 4, dtype=torch.int64));"
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_bare_import_does_not_wait_for_torch():
    code = "import sys, expertmesh; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'MoEE'"):
        expertmesh.MoEE  # noqa: B018


def test_type_checkers_see_the_same_names():
    stub = ast.parse((ROOT / "__init__.pyi").read_text())
    assigned = [node for node in stub.body if isinstance(node, ast.Assign)]
    assert set(ast.literal_eval(assigned[-1].value)) == set(expertmesh.__all__)
    imported = {
        f"{node.module}.{alias.name}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    looked_up = {
        f"expertmesh.{module}.{name}"
        for module, names in expertmesh._PLACES.items()
        for name in names
    }
    assert imported == looked_up


def test_public_names_are_there_and_documented():
    for name in expertmesh.__all__:
        thing = getattr(expertmesh, name)
        if name != "__version__":
            assert thing.__doc__, name
    assert (ROOT / "py.typed").exists()
