"""What the interpreter does not run: the router's first kernel, made for Hopper without a GPU."""

import os
import subprocess
import sys

PROGRAM = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from expertmesh.kernels.blocks import power_of_2
from expertmesh.kernels.router.logits import _few_logits_kernel as kernel

POINTERS = {"x": "*bf16", "logits": "*fp32", "T": "i32"}
for weight in ("*fp32", "*bf16"):
    for width in (1, 4, 20, 1536, 4096):
        types = POINTERS | {"weight": weight}
        fixed = {"E": 5, "D": width, "BLOCK_E": 4, "BLOCK_T": 1, "PDL": True}
        fixed["BLOCK_D"] = min(2048, power_of_2(width))
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
        source = ASTSource(kernel, signature, places)
        made = compile(source, target=GPUTarget("cuda", 90, 32), options={"launch_pdl": True})
        before, _, after = made.asm["ptx"].partition("griddepcontrol.wait")
        # Lines are asked for before the wait, and nothing is read before it.
        assert "prefetch.global.L2" in before and "ld.global" not in before, (weight, width)
        assert "ld.global" in after, (weight, width)
"""


def test_logits_of_every_width_are_made_for_hopper() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
