"""Starts kernels past Triton's lookup and through it; see ``test_remembered.py``."""

import importlib
import itertools
import pkgutil

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from expertmesh.kernels.remembered import Remembered, remembered

STARTED = []
MADE = itertools.count()


class Utils:
    def load_binary(self, name, kernel, shared, device):
        return 0, f"{name} {next(MADE)}", 32, 0, 1024

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
        STARTED.append((x, y, z, function, arguments))


class Driver:
    utils, launcher_cls = Utils(), Launcher
    device = 0

    def get_current_device(self):
        return self.device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


driver.set_active(Driver())


@triton.jit(do_not_specialize=["free"])
def plain(a, b, number, free, scale, FLAG: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK) + number + free
    value = tl.load(a + i) * scale
    if FLAG:
        value += tl.load(b + i)
    tl.store(a + i, value)


@triton.jit
def described(desc, out, WIDE: tl.constexpr):
    tl.store(out, tl.sum(tl.sum(desc.load([0, 0]), axis=0), axis=0))


kernel = remembered(plain)
assert isinstance(kernel, Remembered)
numbers = torch.arange(64.0)
tensors = [numbers, numbers[1:], numbers.half(), numbers.half()[8:], numbers.double()]
times = 2
for device in (0, 1):
    Driver.device = device
    for a, b in itertools.product(tensors, [*tensors[:2], None]):
        for number, free in itertools.product((1, 2, 7, 16, 33, 2**31, 2**33 + 1), (1, 5, 16)):
            flag, scale = b is not None and number % 2 == 0, 0.5 if number < 16 else 3
            arguments = (a, b, number, free, scale, flag, 32)
            for _ in range(times):
                kernel[(7,)](*arguments, num_warps=2)
                kernel[(7,)](*arguments[:-1], BLOCK=32, num_warps=2)
                plain[(7,)](*arguments, num_warps=2)
            started = STARTED[-3 * times :]
            assert all(one[:4] == started[-1][:4] for one in started), (arguments, started)
            for one in started:
                assert len(one[4]) == len(arguments), one
                assert all(x is y or x == y for x, y in zip(one[4], arguments, strict=True))
forms = len(kernel._compiled)
for free in range(100, 200):
    kernel[(7,)](numbers, None, 7, free, 0.5, False, 32, num_warps=2)
assert len(kernel._compiled) <= forms + 3

kernel = remembered(described)
out = torch.zeros(1)
for rows, block in itertools.product((64, 128), ([16, 16], [16, 32], [32, 16])):
    descriptor = TensorDescriptor.from_tensor(torch.zeros(rows, 64), block)
    for _ in range(2):
        kernel[(2, 3)](descriptor, out, WIDE=1)
        described[(2, 3)](descriptor, out, WIDE=1)
    assert len({one[:4] for one in STARTED[-4:]}) == 1, STARTED[-4:]
    assert all(one[4][0] is descriptor for one in STARTED[-4:])
assert len(kernel._compiled) == 3

# Every kernel that is started from the host can be remembered.
import expertmesh.kernels  # noqa: E402

for module in pkgutil.walk_packages(expertmesh.kernels.__path__, "expertmesh.kernels."):
    importlib.import_module(module.name)
print("equal")
