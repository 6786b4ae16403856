"""Dispatch's kernels made for Hopper without a GPU."""

import os
import subprocess
import sys

PROGRAM = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from expertmesh.kernels.dispatch import kernels

SIZES = {"num_tokens": "i32", "num_rows": "i32", "size": "i32"}
OTHERS = {"sentinel": "i32", "first": "i32", "num_local": "i32"}
NARROW = {name: "*i32" for name in ("weight_ptr", "token_ptr", "choice_ptr", "value_ptr")}
WIDE = {"expert_ptr": "*i64", "id_ptr": "*i64", "empty_ptr": "*u8"}


def make(remembered, pointers, **fixed):
    kernel = remembered.kernel
    types = SIZES | OTHERS | NARROW | WIDE | pointers
    signature = {
        name: "constexpr" if name in fixed else types[name] for name in kernel.arg_names
    }
    places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    made = compile(ASTSource(kernel, signature, places), target=GPUTarget("cuda", 90, 32))
    assert "st.global" in made.asm["ptx"], kernel


for expert in ("*i64", "*i32"):
    for EP, ETP, K in ((2, 1, 8), (2, 2, 2), (8, 1, 6), (8, 2, 1), (64, 1, 8)):
        experts = {"NUM_LOCAL": 3, "EP": EP, "ETP": ETP, "K": K}
        kernel, name, width = kernels._choices_kernel, "BLOCK_K", 8
        if EP <= K:
            kernel, name, width = kernels._ranks_kernel, "BLOCK_P", 4
        blocks = {"BLOCK_T": 1024 // width, name: width}
        make(kernel, {"expert_ptr": expert, "out_ptr": "*i64"}, **experts, **blocks)
    for K, width in ((1, 1), (6, 8)):
        for has_empty in (False, True):
            blocks = {"BLOCK_N": 1024 // width, "BLOCK_K": width}
            pointers = {"expert_ptr": expert, "out_ptr": "*i32"}
            make(kernels._pack_kernel, pointers, K=K, HAS_EMPTY=has_empty, **blocks)
for K, width in ((1, 1), (6, 8)):
    pointers = {"weight_ptr": "*i32"}
    make(kernels._unpack_kernel, pointers, K=K, BLOCK_R=1024 // width, BLOCK_K=width)
make(kernels._mask_kernel, {"out_ptr": "*i32"}, BLOCK=1024)
"""


def test_kernels_are_made_for_hopper() -> None:
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
