"""What the interpreter does not run: kernels that ask for lines before they wait, for Hopper."""

import os
import subprocess
import sys

import pytest

MADE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from expertmesh.kernels.blocks import power_of_2

def check(kernel, types, fixed, case):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(kernel, signature, places)
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"launch_pdl": True})
    before, _, after = made.asm["ptx"].partition("griddepcontrol.wait")
    # Lines are asked for before the wait, and nothing is read before it.
    assert "prefetch.global.L2" in before and "ld.global" not in before, case
    assert "ld.global" in after, case
"""

LOGITS = """
from expertmesh.kernels.router.logits import _few_logits_kernel

kernel = _few_logits_kernel.kernel

for weight in ("*fp32", "*bf16"):
    for width in (1, 4, 20, 1536, 4096):
        types = {"x": "*bf16", "logits": "*fp32", "T": "i32", "weight": weight}
        fixed = {"E": 5, "D": width, "BLOCK_T": 1, "PDL": True}
        fixed["BLOCK_D"] = min(2048, power_of_2(width))
        for experts in (1, 4):
            check(kernel, types, fixed | {"BLOCK_E": experts}, (weight, width, experts))
"""

COUNTERS = """
from expertmesh.kernels.router.count import _one_program_kernel

kernel = _one_program_kernel.kernel

words = ("chosen", "load", "load_total", "choices_total", "dropped_total", "tokens_total")
floats = ("logits", "entropy_total", "max_logit")
for tokens, experts, k in ((1, 1, 1), (1, 128, 8), (16, 64, 6), (3, 60, 5)):
    for dropped in (None, "*i1"):
        types = {name: "*i64" for name in words} | {name: "*fp32" for name in floats}
        types |= {"T": "i32", "length": "i32"} | ({} if dropped is None else {"dropped": dropped})
        fixed = {"E": experts, "K": k, "BINS": 16, "BLOCK_T": power_of_2(tokens), "PDL": True}
        fixed |= {"BLOCK_E": power_of_2(experts), "BLOCK_K": power_of_2(k)}
        fixed |= {"dropped": None} if dropped is None else {}
        check(kernel, types, fixed, (tokens, experts, k, dropped))
"""


@pytest.mark.parametrize("program", [LOGITS, COUNTERS], ids=["logits", "counters"])
def test_lines_are_asked_for_before_the_wait(program: str) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", MADE + program]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
